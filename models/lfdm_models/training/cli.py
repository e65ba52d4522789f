"""``lfdm-train``: the two stages of training as commands.

Exit status: 0 success; 1 an error, reported in one line; 2 a usage error; 130 stopped by Ctrl-C, with a checkpoint (128
plus the signal number for other signals: 143, 129).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import io
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lfdm_models.command_line import Parser
from lfdm_models.paths import expanded
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.settings import (
    DATA,
    DEFAULT_TIMES,
    DEVICES,
    DISTILL_LEARN,
    DM_OPTIMIZER,
    LAST_BATCH,
    LAST_EMA,
    LAST_OPTIMIZER,
    LAST_UPDATES,
    LEARN,
    LFAE_OPTIMIZER,
    PRECISIONS,
    SIZES,
    OptimizerSettings,
    RunSettings,
)

if TYPE_CHECKING:
    from lfdm_models.config import LfdmConfig
    from lfdm_models.training.loop import Outcome
    from lfdm_models.training.recipes import DataSettings

PROGRAM = "lfdm-train"
#: Control characters except the line feed, and bytes of names that are not UTF-8.
_CONTROL = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\udc80-\\udcff]")
OK, FAILED, STOPPED = 0, 1, 130
# Share of a person's pictures and frames that is measured.
_HOLD_OUT = 0.2
_PATHS = ("out", "root", "vgg", "start", "lfae", "dm", "images")
_EXAMPLES = """\
  lfdm-train lfae --out runs/lfae --steps 20000
  lfdm-train dm --lfae runs/lfae/lfae.pth --out runs/dm --steps 20000
  lfdm-train lfae --data mug --root MUG --size published --image-size 128 --vgg vgg19.pth --out runs/mug-lfae \\
              --steps 100000
  lfdm-train dm --data mug --root MUG --size published --image-size 128 --frames 40 \\
              --lfae runs/mug-lfae/lfae.pth --text-encoder bert-base-cased --out runs/mug-dm --steps 100000
  lfdm-train lfae --learn decoder --start runs/lfae/lfae.pth --root photos --out runs/me --steps 400
  lfdm-train distill --lfae runs/lfae/lfae.pth --dm runs/dm/dm.pth --out runs/two --steps 2
  lfdm-train evaluate bundle
  lfdm-train recipe characters64 --out runs/characters64
"""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    for name in _PATHS:
        if getattr(args, name, None) is not None:
            try:
                setattr(args, name, Path(expanded(getattr(args, name))))
            except ValueError as error:
                parser.error(f"--{name}: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-train``; returns the exit status."""
    args = _parsed(argv)
    if args.stage in ("evaluate", "schedule", "recipe"):  # the toolkit's command handles these
        _complain(f"error: {args.stage} is for exported bundles, and comes with lfdm_export: run lfdm-train")
        return FAILED
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not support a path's characters
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    logger = logging.getLogger("lfdm_models")
    logger.addHandler(handler)
    try:
        if args.stage == "classifier":
            return _train_classifier(args)
        outcome, table = _learn_decoder(args) if _of_decoder(args) else (_train(args), None)
    except KeyboardInterrupt as error:
        _complain("interrupted")
        return int(getattr(error, "status", STOPPED))  # the toolkit's handlers store the signal in it
    except Exception as error:
        if args.debug:
            raise
        _complain("error: " + _describe(error))
        return FAILED
    finally:
        logger.removeHandler(handler)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in outcome.losses.items()) or "not trained"
    if not args.quiet:
        Console(soft_wrap=True).print(f"step {outcome.step}: {losses}\ncheckpoint  {outcome.checkpoint}", markup=False)
        if table is not None:
            Console(soft_wrap=True).print(table, markup=False, highlight=False)
    if not outcome.finished:
        _complain(f"stopped after step {outcome.step} of {args.updates}; continue with --resume")
        return 128 + outcome.signal if outcome.signal else STOPPED
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Train the latent flow autoencoder (lfae), then the diffusion model (dm); measure the results.",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("lfdm-export")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    lfae = stages.add_parser("lfae", help="train the autoencoder (LFAE), which learns motion from clips")
    dm = stages.add_parser("dm", help="train the diffusion model (DM), which generates motion for a label")
    lfae.add_argument("--vgg", metavar="FILE", help="torchvision's VGG-19, for the perceptual loss")
    lfae.add_argument(
        "--learn",
        choices=LEARN,
        default="all",
        help="parts to train; more with --start (%(default)s). decoder: adapts a --start to the pictures and clips of "
        "one person in --root; --data names the data set of the start",
    )
    lfae.add_argument("--equivariance", type=float, default=10.0, metavar="X", help="weight of this loss (%(default)s)")
    lfae.add_argument(
        "--landmarks", type=float, default=0.0, metavar="X", help="weight of this loss; procedural data (%(default)s)"
    )
    lfae.add_argument("--mixture", type=float, default=0.0, metavar="X", help="weight of this loss (%(default)s)")
    lfae.add_argument("--from-first", action="store_true", help="the source is always a clip's first frame")
    lfae.add_argument("--camera-still", action="store_true", help="fix the background, instead of learning its motion")
    lfae.add_argument("--freeze-norm", action="store_true", help="do not update batch norm's statistics")
    lfae.add_argument("--start", metavar="FILE", help="initial LFAE checkpoint")
    lfae.add_argument(
        "--hold-out",
        type=float,
        metavar="X",
        help="--learn decoder: share of pictures and frames that is measured, not learned (0.2)",
    )
    dm.add_argument("--lfae", required=True, metavar="FILE", help="the trained autoencoder")
    dm.add_argument("--released-lfae", action="store_true", help="--lfae is a released one, of the published size")
    dm.add_argument("--signal-std", type=float, default=0.0, metavar="X", help="weight errors by noise level; 0: off")
    dm.add_argument("--start", metavar="FILE", help="initial DM checkpoint")
    dm.add_argument("--text-encoder", metavar="FOLDER|NAME", help="a BERT for the labels (default: fixed vectors)")
    dm.add_argument(
        "--residual-flow",
        action=argparse.BooleanOptionalAction,
        help="train on offsets from the identity (default: small yes, published no)",
    )
    distill = stages.add_parser("distill", help="train a diffusion model that needs 1, 2 or 4 sampling steps")
    _add_distill(distill)
    _add_classifier(stages.add_parser("classifier", help="train the network with which evaluate judges clips"))
    stages.add_parser("evaluate", help="measure an exported bundle (see lfdm-train evaluate --help)", add_help=False)
    stages.add_parser("schedule", help="tune a sampler for few steps (see lfdm-train schedule --help)", add_help=False)
    stages.add_parser("recipe", help="make a model from nothing (see lfdm-train recipe --help)", add_help=False)
    _add_options(lfae, batch_size=16)
    _add_options(dm, batch_size=8)
    _add_options(distill, batch_size=LAST_BATCH, updates="--updates")
    distill.set_defaults(
        ema=LAST_EMA,
        warm_up=LAST_OPTIMIZER.warm_up,
        clip_norm=LAST_OPTIMIZER.clip_norm,
        cosine=LAST_OPTIMIZER.cosine,
    )
    return parser


def _add_distill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lfae", required=True, metavar="FILE", help="the trained autoencoder")
    parser.add_argument("--dm", required=True, metavar="FILE", help="the trained diffusion model")
    parser.add_argument(
        "--steps",
        type=int,
        required=True,
        choices=sorted(DEFAULT_TIMES),
        help="sampling steps of the new model",
    )
    parser.add_argument(
        "--learn",
        choices=DISTILL_LEARN,
        default="last",
        help="what is trained: the last level, in minutes on a CPU, or all (%(default)s)",
    )
    parser.add_argument(
        "--synthetic",
        type=int,
        metavar="N",
        help="learn from N samples of the trained model instead of the data's clips",
    )
    parser.add_argument("--images", metavar="DIR", help="pictures for the samples (default: the data's first frames)")
    parser.add_argument(
        "--teacher-steps", type=int, default=25, metavar="N", help="DDIM steps per sample (%(default)s)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="guidance scale of the samples, distilled into the new model (default: 1)",
    )
    parser.add_argument("--text-encoder", metavar="FOLDER|NAME", help="a BERT, for checkpoints without labels")


def _add_options(parser: argparse.ArgumentParser, *, batch_size: int, updates: str = "--steps") -> None:
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the networks (%(default)s)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=DATA, default="procedural", help="the data set (%(default)s)")
    data.add_argument("--root", metavar="DIR", help="folder of the data set")
    data.add_argument("--image-size", type=int, default=64, metavar="N", help="pixels per side (%(default)s)")
    data.add_argument("--frames", type=int, default=16, metavar="T", help="frames per clip (%(default)s)")
    data.add_argument("--subjects", metavar="1,3,5", help="subjects to train on (mhad, natops)")
    data.add_argument("--pool", type=int, default=0, metavar="N", help="procedural clips, kept in memory; 0: unlimited")
    data.add_argument("--no-jitter", action="store_true", help="do not change colors")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load data (%(default)s)")
    run = parser.add_argument_group("run")
    if updates == "--steps":
        run.add_argument(updates, dest="updates", type=int, required=True, metavar="N", help="steps of the optimizer")
    else:  # --steps is the number of sampling steps
        several = f"steps of the optimizer; 0: none (default: {LAST_UPDATES} for one or two sampling steps, 0 for more)"
        run.add_argument(updates, type=int, metavar="N", help=several)
    run.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help="examples per pass (%(default)s)")
    run.add_argument("--accumulate", type=int, default=1, metavar="N", help="passes per step (%(default)s)")
    run.add_argument("--learning-rate", type=float, metavar="RATE", help="initial step size (default: as published)")
    run.add_argument("--beta1", type=float, metavar="X", help="Adam's first beta (default: as published)")
    run.add_argument("--warm-up", type=int, default=0, metavar="N", help="steps until the full rate (%(default)s)")
    run.add_argument("--cosine", action="store_true", help="decrease the rate along half a cosine")
    run.add_argument(
        "--clip-norm", type=float, default=0.0, metavar="X", help="max gradient norm; 0: no limit (%(default)s)"
    )
    run.add_argument("--ema", type=float, default=0.999, metavar="X", help="decay of averaged weights (%(default)s)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the run (%(default)s)")
    run.add_argument("--device", choices=DEVICES, default="auto")
    run.add_argument("--precision", choices=PRECISIONS, default="auto")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    run.add_argument("--checkpoint-every", type=int, default=500, metavar="N", help="steps between (%(default)s)")
    run.add_argument("--preview-every", type=int, default=0, metavar="N", help="steps between; 0: none (%(default)s)")
    run.add_argument("--log-every", type=int, default=50, metavar="N", help="steps between (%(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--clips", type=int, default=1600, metavar="N", help="procedural clips (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="steps of the optimizer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _train_classifier(args: argparse.Namespace) -> int:
    import torch

    from lfdm_models.training.classifier import ClassifierSettings, save_classifier, train_classifier

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = ClassifierSettings(args.clips, args.steps, args.seed)
    with _Bar(quiet=args.quiet, log_every=500) as bar:
        network = train_classifier(settings, lambda done, total: bar(done, total, {}))
    save_classifier(network, args.out)
    if not args.quiet:
        Console(soft_wrap=True).print(f"classifier  {args.out}", markup=False)
    return OK


def _train(args: argparse.Namespace) -> Outcome:
    import torch

    from lfdm_models.training import recipes
    from lfdm_models.training.files import refuse_input

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = recipes.network_config(args.size, args.data)
    if args.stage == "distill" and args.updates is None:  # four steps are good without it, and not measured with it
        args.updates = LAST_UPDATES if args.steps <= 2 and args.learn == "last" else 0
    untrained = args.stage == "distill" and args.updates == 0
    if args.stage == "lfae" and args.hold_out is not None:
        raise TrainingError("--hold-out is for --learn decoder; other training takes the data's own split")
    data, run = _data(args), _run(args, 1 if untrained else args.updates)
    inputs = {f"--{name}": getattr(args, name, None) for name in ("start", "lfae", "dm", "vgg")}
    refuse_input(args.out / ("lfae.pth" if args.stage == "lfae" else "dm.pth"), inputs)
    with _Bar(quiet=args.quiet, log_every=args.log_every) as bar:
        if args.stage == "lfae":
            return recipes.train_lfae(
                config.lfae,
                data,
                _optimizer(args, LFAE_OPTIMIZER),
                run,
                args.out,
                vgg=args.vgg,
                start=args.start,
                learn=args.learn,
                equivariance=args.equivariance,
                landmarks=args.landmarks,
                mixture=args.mixture,
                from_first=args.from_first,
                camera_still=args.camera_still,
                freeze_norm=args.freeze_norm,
                resume=args.resume,
                progress=bar,
            )
        if args.stage == "distill":
            return _distill(args, config, data, run, bar)
        if args.residual_flow is not None:
            config = dataclasses.replace(config, residual_flow=args.residual_flow)
        return recipes.train_dm(
            config,
            args.lfae,
            data,
            _optimizer(args, DM_OPTIMIZER),
            run,
            args.out,
            lfae_tells_config=not args.released_lfae,
            text_encoder=args.text_encoder,
            start=args.start,
            signal_std=args.signal_std,
            resume=args.resume,
            progress=bar,
        )


def _of_decoder(args: argparse.Namespace) -> bool:
    return bool(args.stage == "lfae" and args.learn == "decoder")


def _learn_decoder(args: argparse.Namespace) -> tuple[Outcome, str]:
    """Adapt a decoder; returns the outcome, and the table of its quality before and after."""
    import torch

    from lfdm_models.training import layouts, recipes
    from lfdm_models.training.decoder import learn_decoder
    from lfdm_models.training.files import refuse_input
    from lfdm_models.training.person import read_person

    if args.start is None or args.root is None:
        raise TrainingError("--learn decoder adapts a trained LFAE; give it with --start, and the folder with --root")
    others = ("landmarks", "mixture", "from_first", "camera_still", "subjects", "pool")
    given = [name for name in others if getattr(args, name)]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise TrainingError(f"{option} does not apply to --learn decoder, which trains no motion; leave it out")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    refuse_input(args.out / "lfae.pth", {"--start": args.start, "--vgg": args.vgg})
    framing = layouts.FRAMING["plain" if args.data == "procedural" else args.data]
    with _Bar(quiet=args.quiet, log_every=args.log_every) as bar:
        adapted = learn_decoder(
            recipes.network_config(args.size, args.data).lfae,
            args.start,
            read_person(args.root, framing, args.image_size),
            _optimizer(args, LFAE_OPTIMIZER),
            _run(args, args.updates),
            args.out,
            vgg=args.vgg,
            hold_out=_HOLD_OUT if args.hold_out is None else args.hold_out,
            jitter=not args.no_jitter,
            resume=args.resume,
            progress=bar,
        )
    return adapted.outcome, adapted.table()


def _distill(args: argparse.Namespace, config: LfdmConfig, data: DataSettings, run: RunSettings, bar: _Bar) -> Outcome:
    from lfdm_models.training.distill import Teacher, distill
    from lfdm_models.training.teacher import Sampling

    if args.guidance is not None and not args.updates:
        raise TrainingError("guidance is distilled by training, but --updates is 0; set --updates")
    sampling = None
    if args.synthetic is not None:
        guidance = 1.0 if args.guidance is None else args.guidance
        sampling = Sampling(args.synthetic, args.images, args.teacher_steps, guidance, args.seed)
    elif args.guidance is not None or args.images is not None:
        given = "--images" if args.guidance is None else "--guidance"
        raise TrainingError(f"{given} is for samples of the teacher, but the data's clips are used; add --synthetic N")
    return distill(
        Teacher(args.lfae, args.dm, config, args.text_encoder),
        args.steps,
        data,
        _optimizer(args, LAST_OPTIMIZER if args.learn == "last" else DM_OPTIMIZER),
        run,
        args.out,
        sampling=sampling,
        untrained=args.updates == 0,
        learn=args.learn,
        resume=args.resume,
        progress=bar,
        on_sample=lambda done, total: bar(done, total, {}),
    )


def _data(args: argparse.Namespace) -> DataSettings:
    from lfdm_models.training.recipes import DataSettings

    subjects = None
    if args.subjects is not None:
        try:
            subjects = tuple(int(part) for part in args.subjects.split(","))
        except ValueError:
            raise TrainingError(f"--subjects is {args.subjects!r}, expected numbers such as 1,3,5") from None
    return DataSettings(args.data, args.root, args.image_size, args.frames, subjects, not args.no_jitter, args.pool)


def _run(args: argparse.Namespace, steps: int) -> RunSettings:
    return RunSettings(
        steps=steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        seed=args.seed,
        ema=args.ema,
        checkpoint_every=args.checkpoint_every,
        preview_every=args.preview_every,
        log_every=args.log_every,
        workers=args.workers,
        device=args.device,
        precision=args.precision,
    )


def _optimizer(args: argparse.Namespace, published: OptimizerSettings) -> OptimizerSettings:
    rate = published.learning_rate if args.learning_rate is None else args.learning_rate
    published = dataclasses.replace(
        published, cosine=args.cosine, milestones=() if args.cosine else published.milestones
    )
    betas = published.betas if args.beta1 is None else (args.beta1, published.betas[1])
    return dataclasses.replace(
        published, learning_rate=rate, betas=betas, warm_up=args.warm_up, clip_norm=args.clip_norm
    )


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"training needs the package {error.name!r}, which is not installed; "
            "install it with: pip install 'lfdm-export[train]'"
        )
    from lfdm_models.text import TextEncoderError

    if isinstance(error, TrainingError | TextEncoderError | ValueError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{type(error).__name__}: {error} (a fault of this program: run again with --debug, and report it)"


def _complain(message: str) -> None:
    text = _visible(f"{PROGRAM}: {' '.join(message.split())}")
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def _visible(text: str) -> str:
    """Control characters as escapes, so that names of files cannot control the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _visible(super().format(record))


class _Bar:
    """Progress on stderr: a bar on a terminal, occasional lines in a log file."""

    def __init__(self, *, quiet: bool, log_every: int) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._log_every = 0 if quiet or self._console.is_terminal else log_every
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int, losses: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._progress.update(self._task, completed=done, total=total, description=text)
        if self._log_every and done % self._log_every == 0:
            self._console.print(f"step {done}/{total}  {text}", markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())

"""``lfdm-train``: the two stages of training as commands.

Exit status: 0 success; 1 an error, reported in one line; 2 a usage error; 130 stopped by Ctrl-C, with a checkpoint (128
plus the signal number for other signals: 143, 129).
"""

from __future__ import annotations

import argparse
import dataclasses
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

from lfdm_models.memory import keep_freed_memory
from lfdm_models.paths import expanded
from lfdm_models.training.arguments import PROGRAM, make_parser
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.settings import (
    DM_OPTIMIZER,
    LAST_OPTIMIZER,
    LAST_UPDATES,
    LFAE_OPTIMIZER,
    OptimizerSettings,
    RunSettings,
)

if TYPE_CHECKING:
    from lfdm_models.config import LfdmConfig
    from lfdm_models.training.loop import Outcome
    from lfdm_models.training.recipes import DataSettings

#: Control characters except the line feed, and bytes of names that are not UTF-8.
_CONTROL = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\udc80-\\udcff]")
OK, FAILED, STOPPED = 0, 1, 130
# Share of a person's pictures and frames that is measured.
_HOLD_OUT = 0.2
_PATHS = ("out", "root", "vgg", "start", "lfae", "dm", "images")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
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
    keep_freed_memory()
    try:
        _use_threads(args.threads)
        if args.stage == "classifier":
            return _train_classifier(args)
        of_decoder = args.stage == "lfae" and args.learn == "decoder"
        outcome, table = _learn_decoder(args) if of_decoder else (_train(args), None)
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


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _train_classifier(args: argparse.Namespace) -> int:
    from lfdm_models.training.classifier import ClassifierSettings, save_classifier, train_classifier

    settings = ClassifierSettings(args.clips, args.steps, args.seed)
    with _Bar(quiet=args.quiet, log_every=500) as bar:
        network = train_classifier(settings, lambda done, total: bar(done, total, {}))
    save_classifier(network, args.out)
    if not args.quiet:
        Console(soft_wrap=True).print(f"classifier  {args.out}", markup=False)
    return OK


def _train(args: argparse.Namespace) -> Outcome:
    from lfdm_models.training import recipes
    from lfdm_models.training.files import refuse_input

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


def _learn_decoder(args: argparse.Namespace) -> tuple[Outcome, str]:
    """Adapt a decoder; returns the outcome, and the table of its quality before and after."""
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

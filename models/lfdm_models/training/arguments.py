"""The options of ``lfdm-train``."""

from __future__ import annotations

import argparse
import importlib.metadata

from lfdm_models.command_line import Parser
from lfdm_models.training.settings import (
    DATA,
    DEFAULT_TIMES,
    DEVICES,
    DISTILL_LEARN,
    LAST_BATCH,
    LAST_EMA,
    LAST_OPTIMIZER,
    LAST_UPDATES,
    LEARN,
    PRECISIONS,
    SIZES,
)

PROGRAM = "lfdm-train"
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command, with a subcommand per stage."""
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
    _add_output(parser)


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--clips", type=int, default=1600, metavar="N", help="procedural clips (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="steps of the optimizer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

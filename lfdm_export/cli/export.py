"""``lfdm-export``: checkpoints -> bundle."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OK, OneBar, add_common_options, make_parser, run, say
from lfdm_export.cli.models import UNTRAINED, add_model_options, check_model_options, open_model
from lfdm_export.cli.verify import verify_and_report
from lfdm_export.errors import InputError
from lfdm_export.preprocess import Preprocessing
from lfdm_models.labels import DATASETS

if TYPE_CHECKING:
    from lfdm_export.bundle import Bundle

PROGRAM = "lfdm-export"
#: What the published models were trained with, by its name on the Hugging Face hub.
PUBLISHED_ENCODER = "bert-base-cased"
#: Value of --text-encoder that asks for none.
NO_ENCODER = "none"
_EXAMPLES = """\
  lfdm-export                                   a small untrained model, to try things out
  lfdm-export --lfae RegionMM.pth --dm flowdiff.pth --dataset mug --out mug
  lfdm-export --lfae RegionMM.pth --dm flowdiff.pth --dataset mhad \\
              --text-encoder folder/of/bert-base-cased --out mhad
  lfdm-export --model trained/ --frames 20 --image-size 64 --out small
"""


def export_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-export``; returns the exit status (see `lfdm_export.cli`)."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    return run(PROGRAM, args, lambda: _export(args))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        PROGRAM, "Turn a latent flow diffusion model into a bundle of ONNX graphs, and verify it.", _EXAMPLES
    )
    add_model_options(parser, "Both checkpoints, or a model folder; none means the small untrained model.")
    group = parser.add_argument_group("bundle")
    group.add_argument("-o", "--out", type=Path, default=Path("bundle"), metavar="DIR", help="where to (%(default)s)")
    group.add_argument("--engine", default="fp32", metavar="PRECISION", help="precision of the graphs: %(default)s")
    group.add_argument("--frames", type=int, default=40, metavar="T", help="frames of a clip (%(default)s)")
    group.add_argument("--image-size", type=int, default=128, metavar="N", help="pixels a side (%(default)s)")
    group.add_argument("--labels", metavar="FILE|A,B,C", help="the labels: a file with one a line, or a list")
    group.add_argument(
        "--text-encoder",
        metavar="FOLDER|NAME",
        help="the BERT of the DM's training: embeds the labels, and lets the bundle take free text; "
        f"with --dataset it is {PUBLISHED_ENCODER}; {NO_ENCODER!r} exports without labels and text",
    )
    group.add_argument("--no-verify", action="store_true", help="do not run PyTorch and compare")
    add_common_options(parser)
    return parser


def _export(args: argparse.Namespace) -> int:
    # Read before the model is loaded: a misspelt file name shows at once.
    labels = DATASETS[args.dataset] if args.dataset else None
    if args.labels is not None:
        labels = read_labels(args.labels)
    encoder = args.text_encoder
    if encoder is None and args.dataset is not None:
        encoder = PUBLISHED_ENCODER
    elif encoder == NO_ENCODER:
        encoder, labels = None, None if args.labels is None else labels
    if args.lfae is None and args.model is None:
        say(args, f"no checkpoints given: exporting the small model {UNTRAINED!r}, whose weights are untrained")
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when transformers is imported
    from lfdm_export.export import export_bundle

    model = open_model(args)
    with OneBar(quiet=args.quiet) as progress:
        bundle = export_bundle(
            model,
            args.out,
            engine=args.engine,
            frames=args.frames,
            image_size=args.image_size,
            text_encoder=encoder,
            labels=labels,
            preprocessing=Preprocessing.for_dataset(args.dataset),
            reference=not args.no_verify,
            progress=progress,
        )
    say(args, f"bundle  {bundle.path} ({describe(bundle)})")
    if args.no_verify:
        return OK
    return verify_and_report(PROGRAM, args, bundle)


def read_labels(value: str) -> tuple[str, ...]:
    """Labels out of a file with one a line, or out of a list with commas.

    Raises:
        InputError: the file cannot be read, or there are no labels.
    """
    if Path(value).is_file():
        try:
            names = Path(value).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the labels in {value} cannot be read ({error}); give a text file in UTF-8") from error
    elif "/" in value or value.lower().endswith(".txt"):
        raise InputError(f"{value} does not exist; give a file with a label a line, or a list such as jump,run")
    else:
        names = value.split(",")
    labels = tuple(name.strip() for name in names if name.strip())
    if not labels:
        raise InputError(f"there are no labels in {value!r}; give a file with one a line, or a list such as jump,run")
    return labels


def describe(bundle: Bundle) -> str:
    """A bundle in a few words."""
    manifest = bundle.manifest
    megabytes = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    size, count = manifest.geometry.image_size, len(manifest.labels)
    return f"{megabytes:.1f} MB, {manifest.geometry.frames} frames of {size}x{size}, {count} labels"

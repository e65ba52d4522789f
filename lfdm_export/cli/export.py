"""``lfdm-export``: checkpoints -> bundle."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.bundle.manifest import check_labels
from lfdm_export.checkpoints.datasets import NO_ENCODER, PUBLISHED_ENCODER, dataset_facts
from lfdm_export.cli.console import OK, OneBar, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.models import SHIPPED, add_model_options, check_model_options, open_model
from lfdm_export.cli.plans import add_plan_options, check_plan_options, choose_target, make_bundle_plans
from lfdm_export.cli.verify import verify_and_report
from lfdm_export.engines.target_table import as_text
from lfdm_export.engines.targets import target_names
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.stages import PRECISIONS
from lfdm_models.paths import LFS_POINTER

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.sampling.tuned import TunedSampler

PROGRAM = "lfdm-export"
#: Limit in bytes of a label file; a label has a few words.
_LARGEST_LABEL_FILE = 4 << 20
_EXAMPLES = """\
  lfdm-export                                   the small trained model that is shipped
  lfdm-export --lfae RegionMM.pth --dm flowdiff.pth --dataset mug --out mug
  lfdm-export --lfae RegionMM.pth --dm flowdiff.pth --dataset mhad \\
              --text-encoder folder/of/bert-base-cased --out mhad
  lfdm-export --model trained/ --frames 20 --image-size 64 --engine fp16 --out small
  lfdm-export --plans mug --target tensorrt-rtx --gpus SM89,SM120
"""


@orderly()
def export_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-export``; returns the exit status (see `lfdm_export.cli`)."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    check_plan_options(parser, args)
    return run(PROGRAM, args, lambda: _export(args) if args.plans is None else _make_plans(args), extra="export")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        PROGRAM,
        "Turn a latent flow diffusion model into a bundle of ONNX graphs, and verify it.",
        f"{_EXAMPLES}\ntargets:\n{as_text()}",
    )
    add_model_options(parser, "Both checkpoints, or a model folder; none means the small trained one that is shipped.")
    group = parser.add_argument_group("bundle")
    group.add_argument(
        "-o", "--out", default="bundle", metavar="DIR", help="folder of the bundle (default: %(default)s)"
    )
    group.add_argument(
        "--engine",
        default="fp32",
        metavar="PRECISION",
        help=f"precision of the graphs: {', '.join(PRECISIONS)} (default: %(default)s); see docs/precision.md",
    )
    group.add_argument("--frames", type=int, metavar="T", help="frames per clip (default: as trained, else 40)")
    group.add_argument("--image-size", type=int, metavar="N", help="pixels per side (default: as trained, else 128)")
    group.add_argument("--labels", metavar="FILE|A,B,C", help="labels: a file with one per line, or a list")
    group.add_argument(
        "--text-encoder",
        metavar="FOLDER|NAME",
        help="the BERT model of the DM's training: embeds the labels and enables free text; "
        f"default with --dataset: {PUBLISHED_ENCODER}; {NO_ENCODER!r} exports without labels and text",
    )
    group.add_argument(
        "--without-drive",
        action="store_true",
        help="omit the stages for lfdm-generate --drive: half of a bundle of the published size",
    )
    group.add_argument(
        "--tuned", metavar="FILE", help="sampler tables for these weights, written by lfdm-train schedule --out"
    )
    group.add_argument("--triton", metavar="DIR", help="also write a Triton model repository that serves the bundle")
    group.add_argument("--no-verify", action="store_true", help="skip the comparison with PyTorch")
    add_plan_options(parser)
    add_common_options(parser)
    return parser


def _make_plans(args: argparse.Namespace) -> int:
    """Make the plans of an existing bundle."""
    from lfdm_export.bundle.reader import Bundle

    bundle = Bundle.open(args.plans)
    make_bundle_plans(args, bundle, choose_target(args, bundle.manifest.precision))
    return OK


def _export(args: argparse.Namespace) -> int:
    # Read before the model is loaded, so that a misspelled file name fails at once.
    labels = None if args.labels is None else read_labels(args.labels)
    if args.lfae is None and args.model is None:
        say(args, f"no checkpoints given: exporting the shipped model {SHIPPED!r}")
    if args.triton is not None:
        from lfdm_export.serving.triton.repository import require_apart

        require_apart(args.out, args.triton)
    from lfdm_export.export.bundle_export import export_bundle
    from lfdm_export.export.precisions import check_precision

    # Checked before minutes of exporting, so that an unavailable option fails at once.
    check_precision(args.engine)
    choice = choose_target(args, args.engine)
    tuned = _tuned(args)
    encoder = _text_encoder(args)
    model = open_model(args)
    with OneBar(quiet=args.quiet) as progress:
        bundle = export_bundle(
            model,
            args.out,
            engine=args.engine,
            dataset=args.dataset,
            frames=args.frames,
            image_size=args.image_size,
            text_encoder=args.text_encoder if encoder is None else encoder,
            labels=labels,
            drive=not args.without_drive,
            reference=not args.no_verify,
            torch_weights=choice is not None and choice.target in target_names("weights"),
            tuned=tuned,
            progress=progress,
        )
    say(args, f"bundle  {bundle.path} ({describe(bundle)})")
    _tell_sensitivity(args, bundle)
    targets = make_bundle_plans(args, bundle, choice)
    if args.triton is not None:
        from lfdm_export.serving.triton.repository import write_repository

        say(args, f"triton  {write_repository(bundle, args.triton)}")
    if args.no_verify:
        return OK
    return verify_and_report(PROGRAM, args, bundle, targets=targets)


def _tuned(args: argparse.Namespace) -> TunedSampler | None:
    """Return the tuned sampler of --tuned; by default, the one shipped with the shipped model."""
    from lfdm_export.bundle.ready import MODEL
    from lfdm_export.sampling.tuned import TunedSampler

    if args.tuned is not None:
        return TunedSampler.load(user_path(args.tuned))
    if args.lfae is None and args.model in (None, SHIPPED):
        return TunedSampler.load(MODEL / "tuned.json")
    return None


def _text_encoder(args: argparse.Namespace) -> Path | None:
    """Return the text encoder's folder, downloaded if its name is one on the hub; None for no text encoder.

    Raises:
        InputError: the text encoder is not available; the message names both remedies.
    """
    from lfdm_models import text_files

    source = args.text_encoder
    if source is None and args.dataset is not None:
        source = dataset_facts(args.dataset).text_encoder
    if source is None or source == NO_ENCODER:
        return None
    try:
        return text_files.find_folder(source)
    except text_files.TextEncoderError as error:
        raise InputError(str(error)) from error


def _tell_sensitivity(args: argparse.Namespace, bundle: Bundle) -> None:
    """Print which layers of an 8-bit bundle are quantized, and which of them cost the most accuracy."""
    if bundle.manifest.precision not in ("int8", "fp8"):
        return
    from lfdm_export.bundle.reader import PARITY_FOLDER
    from lfdm_export.quantize.report import MARKDOWN_NAME, SensitivityReport

    folder = bundle.path / PARITY_FOLDER
    say(args, f"layers  {folder / MARKDOWN_NAME} ({SensitivityReport.read(folder).summary()})")


def read_labels(value: str) -> tuple[str, ...]:
    """Read labels from a file with one per line, or from a comma-separated list.

    A byte-order mark, Windows line endings and blank lines are ignored.

    Raises:
        InputError: the file cannot be read, there are no labels, or a label is given twice or not printable.
    """
    if _is_file(value):
        try:
            with user_path(value).open("rb") as file:
                data = file.read(_LARGEST_LABEL_FILE + 1)
            if len(data) > _LARGEST_LABEL_FILE:
                raise InputError(f"{value} has more than {_LARGEST_LABEL_FILE} bytes; give a file with a label a line")
            names = _lines_of(data.decode("utf-8-sig"), value)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the labels in {value} cannot be read ({error}); give a text file in UTF-8") from error
    elif "," not in value and ("/" in value or value.lower().endswith(".txt")):
        raise InputError(f"{value} does not exist; give a file with a label a line, or a list such as jump,run")
    else:
        names = value.split(",")
    labels = tuple(name.strip() for name in names if name.strip())
    if not labels:
        raise InputError(f"there are no labels in {value!r}; give a file with one per line, or a list such as jump,run")
    try:
        check_labels(labels)
    except ValueError as error:
        raise InputError(f"the labels cannot be used: {error}; give each once, in printable text") from error
    return labels


def _lines_of(text: str, name: str) -> Sequence[str]:
    """The labels in a file's text: its lines, or the strings of a JSON list."""
    if re.match(rf"{re.escape(LFS_POINTER)}|\s*<(!doctype|html)", text, re.IGNORECASE):
        raise InputError(f"{name} is a Git LFS pointer or a web page, expected a label per line; fetch the file itself")
    if not text.lstrip().startswith(("[", "{")):
        return text.splitlines()
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return text.splitlines()  # a label may begin with a bracket
    if not isinstance(names, list) or not all(isinstance(label, str) for label in names):
        raise InputError(f"the JSON in {name} is not a list of strings; give one, or a text file with a label per line")
    return names


def _is_file(value: str) -> bool:
    try:
        path = user_path(value)
        return path.exists() and not path.is_dir()  # a pipe too
    except (OSError, ValueError, RuntimeError):  # e.g. a list of labels longer than any file name
        return False


def describe(bundle: Bundle) -> str:
    """Describe a bundle in a few words."""
    manifest = bundle.manifest
    megabytes = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    size, count = manifest.geometry.image_size, len(manifest.labels)
    return f"{megabytes:.1f} MB, {manifest.geometry.frames} frames of {size}x{size}, {count} labels"

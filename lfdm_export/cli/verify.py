"""``lfdm-verify``: compares a bundle with its model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OK, PARITY_FAILED, Bars, add_common_options, complain, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.models import add_model_options, check_model_options, open_model
from lfdm_export.engines.targets import EVERY_TARGET, SIMULATION, target_names
from lfdm_export.errors import BundleError

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_models.model import LfdmModel

PROGRAM = "lfdm-verify"
_EXAMPLES = """\
  lfdm-verify bundle
  lfdm-verify mug --target openvino
  lfdm-verify mug --lfae RegionMM.pth --dm flowdiff.pth
"""


@orderly()
def verify_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-verify``; returns the exit status (see `lfdm_export.cli`)."""
    parser = make_parser(
        PROGRAM,
        "Compare a bundle with the model that it was exported from, stage by stage and as a whole.",
        _EXAMPLES,
    )
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        help="a folder, org/name on the Hugging Face hub, or characters: the shipped model",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    parser.add_argument(
        "--target",
        action="append",
        choices=(EVERY_TARGET, *target_names(), SIMULATION),
        help="target that runs the stages; repeatable (default: all that run this bundle on this machine); "
        f"{SIMULATION}: on the CPU, rounding as a GPU does in fp16 or bf16",
    )
    parser.add_argument(
        "--polygraphy", action="store_true", help="also compare each engine with ONNX Runtime by NVIDIA Polygraphy"
    )
    add_model_options(
        parser,
        "What the bundle was exported from: PyTorch runs again, on fresh inputs. Without it the bundle is compared "
        "with what PyTorch gave at export, which is kept in it; that needs no PyTorch.",
    )
    parser.add_argument("--text-encoder", metavar="FOLDER|NAME", help="text encoder of the bundle, if a model is given")
    add_common_options(parser)
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    return run(PROGRAM, args, lambda: _verify(args), extra="export" if args.lfae or args.model else "run")


def _verify(args: argparse.Namespace) -> int:
    from lfdm_export.bundle.reader import Bundle

    bundle = Bundle.open(args.bundle)
    model = None if args.lfae is None and args.model is None else open_model(args)
    return verify_and_report(
        PROGRAM,
        args,
        bundle,
        model=model,
        threads=args.threads,
        text_encoder=args.text_encoder,
        targets=tuple(args.target or (EVERY_TARGET,)),
        polygraphy=args.polygraphy,
    )


def verify_and_report(
    program: str,
    args: argparse.Namespace,
    bundle: Bundle,
    *,
    targets: Sequence[str],
    model: LfdmModel | None = None,
    threads: int | None = None,
    text_encoder: str | None = None,
    polygraphy: bool = False,
) -> int:
    """Verify a bundle, print the table, write the report to the bundle; returns the exit status."""
    from lfdm_export.bundle.reader import PARITY_FOLDER
    from lfdm_export.parity.verify import verify_bundle

    with Bars(quiet=args.quiet) as progress:
        report = verify_bundle(
            bundle,
            model=model,
            threads=threads,
            text_encoder=text_encoder,
            targets=targets,
            polygraphy=polygraphy,
            progress=progress,
        )
    say(args, report.table())
    page = "the table"
    try:
        page = str(report.write(bundle.path / PARITY_FOLDER))
        say(args, f"report  {page}")
    except BundleError as error:  # the bundle may be mounted read-only
        complain(program, f"warning: {error}")
    if not report.passed:
        complain(program, f"the bundle differs from the model by more than its tolerance; see {page}")
    return OK if report.passed else PARITY_FAILED

"""``lfdm-verify``: bundle against its model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lfdm_export.cli.console import OK, PARITY_FAILED, Bars, add_common_options, make_parser, run, say
from lfdm_export.cli.models import add_model_options, check_model_options, open_model
from lfdm_export.errors import InputError

PROGRAM = "lfdm-verify"
_EXAMPLES = """\
  lfdm-verify bundle
  lfdm-verify mug --lfae RegionMM.pth --dm flowdiff.pth
"""


def verify_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-verify``; returns the exit status (see `lfdm_export.cli`)."""
    parser = make_parser(
        PROGRAM, "Compare a bundle with the model that it was exported from, stage by stage and as a whole.", _EXAMPLES
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that lfdm-export wrote")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (all cores)")
    add_model_options(parser, "What the bundle was exported from; may be left out for the small untrained model.")
    add_common_options(parser)
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    return run(PROGRAM, args, lambda: _verify(args))


def _verify(args: argparse.Namespace) -> int:
    from lfdm_export.bundle import Bundle
    from lfdm_export.verify import verify_bundle

    bundle = Bundle.open(args.bundle)
    if args.lfae is None and args.model is None and bundle.manifest.provenance.get("made_by") != "lfdm_models.demo":
        raise InputError(f"{args.bundle} was not exported from the untrained model; give --lfae and --dm, or --model")
    model = open_model(args)
    with Bars(quiet=args.quiet) as progress:
        report = verify_bundle(bundle, model=model, threads=args.threads, progress=progress)
    say(args, report.table())
    say(args, f"report  {report.html_path}")
    if not report.passed:
        sys.stderr.write(f"{PROGRAM}: the bundle differs from the model by more than its tolerance\n")
    return OK if report.passed else PARITY_FAILED

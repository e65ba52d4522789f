"""``lfdm-info``: describes a bundle, and the targets that run it on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfdm_export.cli.console import FAILED, OK, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly, was_printed
from lfdm_export.wording import count

if TYPE_CHECKING:
    from lfdm_export.engines.bundle_facts import BundleFacts

PROGRAM = "lfdm-info"
_EXAMPLES = """\
  lfdm-info mug
  lfdm-info mug --json
"""


@orderly()
def info_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-info``; returns the exit status (see `lfdm_export.cli`)."""
    parser = make_parser(
        PROGRAM, "Say what a bundle is: labels, sizes, precision, files, provenance, and what runs it here.", _EXAMPLES
    )
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        help="a folder, org/name on the Hugging Face hub, or characters: the shipped model",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_common_options(parser)
    args = parser.parse_args(argv)
    return run(PROGRAM, args, lambda: _info(args))


def _info(args: argparse.Namespace) -> int:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines.bundle_facts import bundle_facts

    facts = bundle_facts(Bundle.open(args.bundle))
    if args.json:
        say(args, json.dumps(facts.to_json(), indent=2, ensure_ascii=False))
    else:
        say(args, _text(facts))
    return OK if was_printed() else FAILED  # all that the command does is to print


def _text(facts: BundleFacts) -> str:
    size = facts.image_size
    sampling = " ".join(f"{key}={value}" for key, value in facts.sampling.given().items())
    lines = [
        ("bundle", facts.path),
        ("clips", f"{count(facts.frames, 'frame')} of {size}x{size}"),
        ("precision", facts.precision),
        ("labels", ", ".join(facts.labels) or "none: it takes text embeddings"),
        ("free text", _yes(facts.text)),
        ("motion transfer", _yes(facts.drive)),
        ("data set", facts.dataset or "none"),
        ("sampling", f"{sampling} (samplers: {', '.join(facts.samplers)})"),
        *((f"target {name}", _runs(facts, name)) for name in facts.targets),
        *((f"provenance {key}", _one_line(value)) for key, value in facts.provenance.items()),
        ("made with", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("files", f"{sum(facts.files.values()) / 1e6:.1f} MB"),
        *((f"  {name}", f"{size / 1e6:.2f} MB") for name, size in facts.files.items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _runs(facts: BundleFacts, name: str) -> str:
    fact = facts.targets[name]
    if not fact.runs:
        return f"not here: {fact.reason}"
    return f"runs here, and is what auto takes ({fact.reason})" if name == facts.auto else "runs here"


def _one_line(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

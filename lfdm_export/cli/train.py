"""``lfdm-train``: trains models (`lfdm_models.training.cli`), and evaluates and tunes exported bundles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lfdm_export.cli.console import OK, Bars, add_common_options, complain, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.files.atomic import rehearse
from lfdm_export.files.names import user_path
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.tables import SAMPLERS

PROGRAM = "lfdm-train evaluate"
_EXAMPLES = """\
  lfdm-train evaluate bundle
  lfdm-train evaluate bundle --samplers ddim,dpm++2m --steps 5,10,25 --clips 20 --out evaluation
  lfdm-train evaluate bundle --samplers tuned --steps 4,5      after lfdm-train schedule bundle
  lfdm-train evaluate bundle --samplers none         the autoencoder alone
"""
_NONE = "none"


@orderly()
def train_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-train``; returns the exit status (see `lfdm_export.cli`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["evaluate"]:
        return evaluate_main(words[1:])
    if words[:1] == ["schedule"]:
        from lfdm_export.cli.schedule import schedule_main

        return schedule_main(words[1:])
    if words[:1] == ["recipe"]:
        from lfdm_export.cli.recipe import recipe_main

        return recipe_main(words[1:])
    from lfdm_models.training.cli import main

    return main(words)


def evaluate_main(argv: Sequence[str]) -> int:
    """Run ``lfdm-train evaluate``; returns the exit status."""
    parser = make_parser(
        PROGRAM,
        "Measure a bundle of the drawn (procedural) characters, on characters that no training has seen. Bundles of "
        "other data are refused.",
        _EXAMPLES,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder written by lfdm-export")
    parser.add_argument("--clips", type=int, default=12, metavar="N", help="clips per label (default: %(default)s)")
    parser.add_argument(
        "--samplers", default="ddim,dpm++2m,unipc", metavar="A,B", help=f"samplers, or {_NONE!r} (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        default="10,25,50",
        metavar="N,M",
        help="steps of each sampler; ddpm always takes all steps (default: %(default)s)",
    )
    parser.add_argument("--eta", type=float, metavar="X", help="eta of samplers that have one (default: the sampler's)")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="guidance scale (default: the bundle's)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of characters and noise (default: %(default)s)"
    )
    parser.add_argument("--classifier", metavar="FILE", help="classifier of motions (default: the shipped one)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    parser.add_argument("-o", "--out", metavar="DIR", help="folder of the report (default: BUNDLE/evaluation)")
    add_common_options(parser)
    args = parser.parse_args(argv)
    return run(PROGRAM, args, lambda: _evaluate(args), extra="train")


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from lfdm_export.evaluation.drawn import require_drawn_characters
    from lfdm_export.evaluation.evaluate import evaluate_bundle
    from lfdm_export.evaluation.report import JSON, markdown, write_evaluation
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_models.training.classifier import load_classifier, shipped_classifier
    from lfdm_models.training.errors import TrainingError

    settings = choose_settings(args.samplers, args.steps, args.eta, args.guidance_scale)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipeline = Pipeline.open(args.bundle, threads=args.threads)
    require_drawn_characters(pipeline.bundle)
    if args.out is None:
        folder = pipeline.bundle.path / "evaluation"
    else:  # checked before minutes of measuring, so that a folder that is not writable fails at once
        folder = user_path(args.out)
        rehearse(folder / JSON)
    try:
        classifier = shipped_classifier() if args.classifier is None else load_classifier(user_path(args.classifier))
    except TrainingError as error:
        raise LfdmExportError(str(error)) from error
    with Bars(quiet=args.quiet) as progress:
        evaluation = evaluate_bundle(
            pipeline, classifier, settings, clips=args.clips, seed=args.seed, progress=progress
        )
    say(args, markdown(evaluation))
    try:
        written = write_evaluation(evaluation, folder)
        say(args, "\n".join(f"report  {path}" for path in written))
    except InputError as error:
        if args.out is not None:
            raise
        complain(PROGRAM, f"warning: {error}")  # the bundle may be mounted read-only; the results are still printed
    return OK


def choose_settings(
    samplers: str, steps: str, eta: float | None, guidance_scale: float | None
) -> tuple[SamplingOptions, ...]:
    """Combine every sampler with every number of steps; "ddpm" once, because it takes every step of the schedule.

    Raises:
        InputError: a sampler is unknown, or a number of steps is not a number.
    """
    if samplers == _NONE:
        return ()
    try:
        counts = [int(part) for part in steps.split(",")]
    except ValueError:
        raise InputError(f"--steps is {steps!r}, expected numbers such as 10,25,50") from None
    settings = []
    for sampler in (part.strip() for part in samplers.split(",")):
        if sampler == "ddpm":
            settings.append(SamplingOptions(sampler, None, None, guidance_scale))
        else:
            takes_eta = sampler in SAMPLERS and SAMPLERS[sampler].default_eta is not None
            settings += [SamplingOptions(sampler, n, eta if takes_eta else None, guidance_scale) for n in counts]
    return tuple(settings)

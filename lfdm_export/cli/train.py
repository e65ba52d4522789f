"""``lfdm-train``: trains models (`lfdm_models.training.cli`), and evaluates and tunes exported bundles.

`lfdm_export.cli.measure` has the options of ``evaluate`` for held-out clips of data sets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lfdm_export.cli.console import OK, Bars, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.measure import DRAWN, add_data_options, measure, refuse_data_options, report_folder, say_reports
from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.files.names import user_path
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.tables import SAMPLERS

PROGRAM = "lfdm-train evaluate"
_EXAMPLES = """\
  lfdm-train evaluate bundle
  lfdm-train evaluate bundle --samplers ddim,dpm++2m --steps 5,10,25 --clips 20 --out evaluation
  lfdm-train evaluate bundle --samplers tuned --steps 4,5      after lfdm-train schedule bundle
  lfdm-train evaluate bundle --samplers none         the autoencoder alone
  lfdm-train evaluate mug --data mug --root MUG --i3d i3d_torchscript.pt --samplers ddpm
  lfdm-train evaluate mine --data plain --root clips --measures l1
"""
_NONE = "none"
# Defaults for the drawn characters.
_SAMPLERS, _STEPS, _CLIPS = "ddim,dpm++2m,unipc", "10,25,50", 12


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
        "Measure a bundle on clips that no training has seen: of the drawn (procedural) characters, or, with --data, "
        "of a data set by the measures of the LFDM paper. Bundles of other data are refused.",
        _EXAMPLES,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder written by lfdm-export")
    parser.add_argument(
        "--clips",
        type=int,
        metavar="N",
        help=f"clips to generate per setting: of drawn characters per label (default: {_CLIPS}), of a data set in all "
        "(default: 10000, as published)",
    )
    parser.add_argument(
        "--samplers",
        metavar="A,B",
        help=f"samplers, or {_NONE!r} (default: {_SAMPLERS}; with --data the bundle's own)",
    )
    parser.add_argument(
        "--steps", metavar="N,M", help=f"steps of each sampler; ddpm always takes all steps (default: {_STEPS})"
    )
    parser.add_argument("--eta", type=float, metavar="X", help="eta of samplers that have one (default: the sampler's)")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="guidance scale (default: the bundle's)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of clips, frames and noise (default: %(default)s)"
    )
    parser.add_argument("--classifier", metavar="FILE", help="classifier of motions (default: the shipped one)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    parser.add_argument("-o", "--out", metavar="DIR", help="folder of the report (default: BUNDLE/evaluation)")
    add_data_options(parser)
    add_common_options(parser)
    args = parser.parse_args(argv)
    return run(PROGRAM, args, lambda: _evaluate(args) if args.data == DRAWN else _measure(args), extra="train")


def _measure(args: argparse.Namespace) -> int:
    if args.classifier is not None:
        raise InputError(f"--classifier judges drawn characters, not --data {args.data}; give --i3d, or leave it out")
    if args.samplers is not None:
        settings = choose_settings(args.samplers, args.steps or _STEPS, args.eta, args.guidance_scale)
    else:
        counts = [None] if args.steps is None else step_numbers(args.steps)
        settings = tuple(SamplingOptions(None, steps, args.eta, args.guidance_scale) for steps in counts)
    return measure(PROGRAM, args, settings)


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from lfdm_export.evaluation.drawn import require_drawn_characters
    from lfdm_export.evaluation.evaluate import evaluate_bundle
    from lfdm_export.evaluation.report import JSON, markdown, write_evaluation
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_models.training.classifier import load_classifier, shipped_classifier
    from lfdm_models.training.errors import TrainingError

    refuse_data_options(args)
    settings = choose_settings(args.samplers or _SAMPLERS, args.steps or _STEPS, args.eta, args.guidance_scale)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipeline = Pipeline.open(args.bundle, threads=args.threads)
    require_drawn_characters(pipeline.bundle)
    folder = report_folder(args, pipeline.bundle, JSON)
    try:
        classifier = shipped_classifier() if args.classifier is None else load_classifier(user_path(args.classifier))
    except TrainingError as error:
        raise LfdmExportError(str(error)) from error
    with Bars(quiet=args.quiet) as progress:
        evaluation = evaluate_bundle(
            pipeline,
            classifier,
            settings,
            clips=_CLIPS if args.clips is None else args.clips,
            seed=args.seed,
            progress=progress,
        )
    say(args, markdown(evaluation))
    say_reports(PROGRAM, args, lambda: write_evaluation(evaluation, folder))
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
    counts, settings = step_numbers(steps), []
    for sampler in (part.strip() for part in samplers.split(",")):
        if sampler == "ddpm":
            settings.append(SamplingOptions(sampler, None, None, guidance_scale))
        else:
            takes_eta = sampler in SAMPLERS and SAMPLERS[sampler].default_eta is not None
            settings += [SamplingOptions(sampler, n, eta if takes_eta else None, guidance_scale) for n in counts]
    return tuple(settings)


def step_numbers(steps: str) -> list[int]:
    """Parse a comma-separated list of numbers of steps.

    Raises:
        InputError: an entry is not a number.
    """
    try:
        return [int(part) for part in steps.split(",")]
    except ValueError:
        raise InputError(f"--steps is {steps!r}, expected numbers such as 10,25,50") from None

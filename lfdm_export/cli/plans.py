"""Options of targets and plans, and the building of plans."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OneBar, say
from lfdm_export.engines.targets import AUTO, Choice, find_target, spec_of, target_names, target_titles
from lfdm_export.engines.tensorrt.target import RTX_ARCHITECTURES

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines.tensorrt.plans import BuildOptions

#: Value of --target that exports only graphs.
NO_TARGET = "none"
_COMPATIBLE = ("ampere+", "same-capability")
# Options of the plan builders.
_BUILDING = ("gpus", "optimization_level", "hardware_compatible", "version_compatible", "strip")


def _gpus_of(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().upper() for name in text.split(",") if name.strip())
    if not all(re.fullmatch(r"SM\d{2,3}", name) for name in names) or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of architectures such as SM89,SM120")
    return names


def add_target_option(parser: argparse._ActionsContainer) -> None:
    """Add --target to a command that runs a bundle."""
    parser.add_argument(
        "--target",
        choices=(AUTO, *target_names()),
        default=AUTO,
        help=f"what runs the stages; auto: {target_titles('plans', 'weights')}, if the bundle has plans or "
        f"weights for it and a GPU is available, else {target_titles('graphs')}, whichever is faster",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add --target, --plans and the options of the plan builders."""
    group = parser.add_argument_group(
        "plans",
        "Built for a GPU, beside the graphs, which are always there; which target takes which is listed below.",
    )
    group.add_argument(
        "--target",
        choices=(AUTO, *target_names(), NO_TARGET),
        help=f"target to make plans for, or to add weights for ({', '.join(target_names('weights'))}); auto (the "
        f"default below fp32): plans of {target_titles('plans')}, the first available here; none (the default of fp32)",
    )
    group.add_argument("--plans", metavar="BUNDLE", help="make plans for an existing bundle; export nothing")
    group.add_argument(
        "--gpus",
        type=_gpus_of,
        metavar="SM89,...",
        help=f"TensorRT for RTX: architectures to build for, of {', '.join(RTX_ARCHITECTURES)} (default: all but SM75)",
    )
    group.add_argument(
        "--optimization-level", type=int, metavar="0-5", help="higher levels build longer (default: the builder's)"
    )
    group.add_argument("--hardware-compatible", choices=_COMPATIBLE, help="TensorRT: other GPUs that run the plans")
    group.add_argument("--version-compatible", action="store_true", help="TensorRT: plans also run with later versions")
    group.add_argument(
        "--strip",
        action="store_true",
        help="TensorRT: plans without weights, read from the graphs: new weights need no new plans",
    )


def check_plan_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject invalid combinations: prints the usage and exits with status 2."""
    if args.plans is not None and args.target == NO_TARGET:
        parser.error("--plans makes plans: leave out --target none")
    given = [name for name in _BUILDING if getattr(args, name)]
    if args.plans is not None and args.target in target_names("weights"):
        title = spec_of(args.target).title
        parser.error(f"{title} runs no plans: export the bundle again from its checkpoints with --target {args.target}")
    if given and args.target not in (None, AUTO, *target_names("plans")):
        parser.error(f"--{given[0].replace('_', '-')} is for plans; --target {args.target} has none")


def choose_target(args: argparse.Namespace, precision: str) -> Choice | None:
    """Choose the target of the plans, with the reason; None if no plans are requested.

    Raises:
        EngineError: the requested target is not available on this machine.
    """
    name = args.target
    if name is None:
        asked = args.plans is not None or any(getattr(args, option) for option in _BUILDING)
        name = AUTO if asked or precision != "fp32" else NO_TARGET
    if name == NO_TARGET:
        return None
    return find_target(name, "run" if name in target_names("graphs") else "export", precision, gpus=args.gpus)


def make_bundle_plans(args: argparse.Namespace, bundle: Bundle, choice: Choice | None) -> tuple[str, ...]:
    """Make the requested plans and print the result; returns the targets to verify the bundle with."""
    if choice is None:
        return (AUTO,)
    if choice.target is None:
        say(args, f"plans   none, graphs only: {choice.reason}")
        return (AUTO,)
    say(args, f"target  {choice.target}: {choice.reason}")
    if choice.target not in target_names("plans"):
        return (choice.target,)
    from lfdm_export.engines.targets import this_machine
    from lfdm_export.engines.tensorrt.plans import PlanFolder
    from lfdm_export.export.plans import make_plans

    with OneBar(quiet=args.quiet) as progress:
        made = make_plans(bundle, choice.target, options=_options(args), gpus=args.gpus, progress=progress)
    built = [one.record for one in made if one.how == "built"]
    megabytes = sum(one.record.plan.bytes for one in made) / 1e6
    took = f", {sum(record.seconds for record in built):.0f} s" if built else ""
    peak = f", {max(record.peak_bytes for record in built) / 1e9:.2f} GB of memory at most" if built else ""
    say(
        args,
        f"plans   {PlanFolder(bundle.path, choice.target).path} ({len(made)} stages, {megabytes:.1f} MB; "
        f"{len(built)} built, {len(made) - len(built)} kept{took}{peak})",
    )
    runs = not spec_of(choice.target).lacking("run", bundle.manifest.precision, this_machine())
    return (AUTO, choice.target) if runs else (AUTO,)


def _options(args: argparse.Namespace) -> BuildOptions:
    from lfdm_export.engines.tensorrt.plans import BuildOptions

    return BuildOptions(
        optimization_level=args.optimization_level,
        hardware_compatible=args.hardware_compatible or "none",
        version_compatible=args.version_compatible,
        strip=args.strip,
    )

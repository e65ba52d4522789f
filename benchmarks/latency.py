"""Time per clip, measured side by side in one process: PyTorch, a naive ONNX export, the bundle.

    python benchmarks/latency.py (--golden mug128 | --checkpoints LFAE DM) [--bundle DIR] [--target T …] [--rounds 5]

Rounds are interleaved (A B C, A B C, …) after a warm-up, so that disturbances affect all contestants equally.
All make the same clip from the same noise; if the clips differ, no times are reported. Results go to
benchmarks/results/latency.json, with a plot beside it (needs the extra `bench`).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import figures, machine, plots, subject
from lfdm_export.engines.targets import target_names
from lfdm_export.machine import available_cores

if TYPE_CHECKING:
    from benchmarks.contestants import Contestant, Made, Task
    from lfdm_export.bundle.reader import Bundle
    from lfdm_models.model import LfdmModel
    from lfdm_models.schedule import Schedule

#: Largest difference (max abs) between contestants that counts as the same clip.
TOLERANCE = 1e-3
PARTS = ("encode", "step", "decode", "clip")
_PHOTO = Path(__file__).resolve().parents[1] / "tests" / "data" / "astronaut.jpg"
_SEED = 0


class Disagreement(Exception):
    """Two contestants made different clips."""


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    if not arguments.no_plot:
        figures.need_matplotlib()
    import torch

    from lfdm_export.checkpoints.load import load_model
    from lfdm_export.errors import LfdmExportError

    facts = machine.at_start()
    torch.set_num_threads(arguments.threads)
    try:
        with subject.checkpoints(arguments) as pair, tempfile.TemporaryDirectory(prefix="lfdm-latency-") as folder:
            model = load_model(*pair)
            bundle = _bundle(model, arguments, Path(folder))
            schedule = model.diffusion.schedule()
            task, warm_up = (make_task(schedule, bundle, steps) for steps in (arguments.steps, 1))
            contestants = list(_contestants(model, bundle, task, arguments, Path(folder)))
            for contestant in contestants:
                contestant.make(warm_up)
            clips, differences = _measure(contestants, task, arguments.rounds)
    except (LfdmExportError, Disagreement) as error:
        print(f"latency: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        **facts,
        "settings": {
            name: getattr(arguments, name) for name in ("threads", "rounds", "frames", "image_size", "steps", "golden")
        },
        "max_abs_difference": differences,
        "seconds": {name: samples(made) for name, made in clips.items()},
    }
    machine.write_json(arguments.out, result)
    print("\n".join(_table(result["seconds"])))
    if not arguments.no_plot:
        plots.plot_latency(result, arguments.out.with_suffix(".png"))
    return 0


def _arguments() -> argparse.Namespace:
    parser = clip_parser("Time clips of PyTorch, a naive ONNX export and the bundle.", "latency")
    parser.add_argument("--bundle", type=Path, help="a bundle of these checkpoints (else it is exported first)")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        choices=target_names(),
        help="run the bundle by it; repeat to compare (auto)",
    )
    parser.add_argument("--skip", choices=("pytorch", "naive"), action="append", default=[], help="leave one out")
    return parse(parser)


def clip_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The parser of a benchmark that times clips of a checkpoint pair; its results are ``name``.json."""
    parser = argparse.ArgumentParser(description=description)
    subject.add_options(parser)
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of each contestant (all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="clips of each contestant (5)")
    parser.add_argument("--frames", type=int, default=40, help="frames per clip (40)")
    parser.add_argument("--image-size", type=int, default=128, help="pixels (128)")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps (10)")
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / f"{name}.json", metavar="FILE", help="results")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments given to a `clip_parser`, checked."""
    arguments = parser.parse_args()
    if min(arguments.threads, arguments.rounds, arguments.frames, arguments.steps) < 1:
        parser.error("threads, rounds, frames and steps must be 1 or more")
    return arguments


def _bundle(model: LfdmModel, arguments: argparse.Namespace, folder: Path) -> Bundle:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.errors import InputError
    from lfdm_export.export.bundle_export import export_bundle

    size = (arguments.frames, arguments.image_size)
    if arguments.bundle is None:
        weights = any(target in target_names("weights") for target in arguments.target)
        return export_bundle(model, folder / "bundle", frames=size[0], image_size=size[1], torch_weights=weights)
    bundle = Bundle.open(arguments.bundle)
    geometry = bundle.manifest.geometry
    if (geometry.frames, geometry.image_size) != size:
        raise InputError(
            f"{arguments.bundle} is for {geometry.frames} frames of {geometry.image_size} pixels, expected "
            f"{size[0]} of {size[1]}; give --frames and --image-size, or leave --bundle out"
        )
    return bundle


def make_task(schedule: Schedule, bundle: Bundle, steps: int) -> Task:
    """The task of one clip by DDIM, always the same."""
    from benchmarks.contestants import Task
    from lfdm_export.pictures.preprocess import prepare_images
    from lfdm_export.sampling.tables import sampler_table

    geometry = bundle.manifest.geometry
    random = np.random.default_rng(_SEED)
    table = sampler_table("ddim", schedule, steps, None)
    shape = (1, 3, geometry.frames, geometry.latent_size, geometry.latent_size)
    draws = [random.standard_normal(shape, np.float32) for _ in range(1 + int(table.draws_noise.sum()))]
    embedding = random.standard_normal((1, geometry.text_width), np.float32) * np.float32(0.3)
    return Task(prepare_images(_PHOTO, geometry.image_size, bundle.manifest.preprocessing), embedding, table, draws)


def _contestants(
    model: LfdmModel, bundle: Bundle, task: Task, arguments: argparse.Namespace, folder: Path
) -> Iterator[Contestant]:
    from benchmarks import contestants
    from lfdm_export.generate.pipeline import Pipeline

    if "pytorch" not in arguments.skip:
        yield contestants.eager(model)
    if "naive" not in arguments.skip:
        graphs = folder / "naive"
        graphs.mkdir()
        yield contestants.naive(model, task, graphs, arguments.threads)
    for target in arguments.target or ("auto",):
        name = "bundle" if target == "auto" else f"bundle, {target}"
        yield contestants.Exported(name, Pipeline(bundle, threads=arguments.threads, target=target))


def _measure(
    contestants: Sequence[Contestant], task: Task, rounds: int
) -> tuple[dict[str, list[Made]], dict[str, dict[str, float]]]:
    """Clips of every contestant, in interleaved rounds, and their differences from the first contestant's.

    Raises:
        Disagreement: a difference is more than `TOLERANCE`.
    """
    clips: dict[str, list[Made]] = {contestant.name: [] for contestant in contestants}
    differences: dict[str, dict[str, float]] = {}
    reference = contestants[0].name
    for number in range(1, rounds + 1):
        for contestant in contestants:
            made = contestant.make(task)
            clips[contestant.name].append(made)
            print(f"round {number}/{rounds}  {contestant.name:12s} {made.clip:7.2f} s", file=sys.stderr, flush=True)
            expected = clips[reference][0]
            found = {
                "latent": float(np.abs(made.latent - expected.latent).max()),
                "frames": float(np.abs(made.frames - expected.frames).max()),
            }
            known = differences.setdefault(contestant.name, dict.fromkeys(found, 0.0))
            for what, difference in found.items():
                if not difference <= TOLERANCE:
                    raise Disagreement(
                        f"{what} of {contestant.name} and {reference} differ by {difference:.2e}, expected at most "
                        f"{TOLERANCE}; their times are not comparable: check that the bundle is of these checkpoints"
                    )
                known[what] = max(known[what], difference)
        if number < rounds:  # of earlier clips only the times are needed
            clips = {name: [without_arrays(m) if i else m for i, m in enumerate(ms)] for name, ms in clips.items()}
    return clips, differences


def without_arrays(made: Made) -> Made:
    """A clip's times alone."""
    nothing = np.zeros(0, np.float32)
    return dataclasses.replace(made, latent=nothing, frames=nothing)


def samples(clips: Sequence[Made]) -> dict[str, list[float]]:
    """Seconds of the parts of some clips, by part."""
    return {
        "encode": [made.encode for made in clips],
        "step": [step for made in clips for step in made.steps],
        "decode": [made.decode for made in clips],
        "clip": [made.clip for made in clips],
        "clip_cpu": [made.cpu for made in clips],
    }


def _table(seconds: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Medians with their spread, and the bundle's speed-up over each other contestant."""
    names = list(seconds)
    yield f"{'median s (min … max)':8s}  " + "  ".join(f"{name:>24s}" for name in names)
    for part in PARTS:
        cells = []
        for name in names:
            samples = seconds[name][part]
            cells.append(f"{statistics.median(samples):8.3f} ({min(samples):6.3f} … {max(samples):6.3f})")
        yield f"{part:20s}  " + "  ".join(f"{cell:>24s}" for cell in cells)
    for name in names[:-1]:
        ratios = []
        for part in PARTS:
            medians = [statistics.median(seconds[who][part]) for who in (name, names[-1])]
            ratios.append(f"{part} {medians[0] / medians[1]:.2f}x")
        yield f"{names[-1]} against {name}: " + ", ".join(ratios)
    busy = [sum(seconds[name]["clip_cpu"]) / sum(seconds[name]["clip"]) for name in names]
    yield "cores in use: " + ", ".join(f"{name} {cores:.2f}" for name, cores in zip(names, busy, strict=True))


if __name__ == "__main__":
    sys.exit(main())

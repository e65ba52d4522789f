"""A saved motion against sampling: `Pipeline.animate` and `generate` with 10 steps, side by side.

    python benchmarks/animate.py (--bundle DIR | --golden mug128 | --checkpoints LFAE DM) [--rounds 5] [--target T]

A round makes a clip by sampling, takes its motion through a `.motion` file, and makes the clip again from it. The
frames have to be equal to the bit, or the program ends with status 1. Rounds alternate after one that does not count.
Results go to benchmarks/results/animate.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, subject
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.machine import available_cores

_PHOTO = Path(__file__).resolve().parents[1] / "tests" / "data" / "astronaut.jpg"


def main() -> int:
    """Measure and print; returns 1 if a clip differs."""
    arguments = _arguments()
    result = machine.at_start()
    with _bundle(arguments) as bundle, tempfile.TemporaryDirectory(prefix="lfdm-animate-") as folder:
        pipeline = Pipeline.open(bundle, threads=arguments.threads, target=arguments.target)
        geometry = pipeline.bundle.manifest.geometry
        equal, seconds = _measure(pipeline, Path(folder) / "a.motion", arguments)
        settings = {name: getattr(arguments, name) for name in ("threads", "rounds", "steps", "golden")}
        result |= {
            "settings": {**settings, "frames": geometry.frames, "image_size": geometry.image_size},
            "target": pipeline.stages.target,
            "equal_to_the_bit": equal,
            "seconds": seconds,
        }
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    result["faster"] = medians["generate"] / medians["animate"]
    machine.write_json(arguments.out, result)
    print(
        f"{geometry.frames} frames of {geometry.image_size}, {result['target']}: {arguments.steps} steps "
        f"{medians['generate']:.2f} s, animate {medians['animate']:.2f} s, × {result['faster']:.2f}; "
        f"frames {'equal to the bit' if equal else 'DIFFER'}"
    )
    return 0 if equal else 1


def _measure(pipeline: Pipeline, motion: Path, arguments: argparse.Namespace) -> tuple[bool, dict[str, list[float]]]:
    """Whether all frames were equal, and the seconds of each clip."""
    seconds: dict[str, list[float]] = {"generate": [], "animate": []}
    width = pipeline.bundle.manifest.geometry.text_width
    embedding = np.random.default_rng(0).standard_normal(width, np.float32) * np.float32(0.3)
    equal = True
    for number in range(arguments.rounds + 1):
        began = time.perf_counter()
        clip = pipeline.generate(_PHOTO, text_embedding=embedding, steps=arguments.steps, seed=number)
        sampled = time.perf_counter()
        clip.save(motion)
        reading = time.perf_counter()
        moved = pipeline.animate(_PHOTO, motion)
        ended = time.perf_counter()
        equal &= np.array_equal(moved.frames, clip.frames)
        if number:
            seconds["generate"].append(sampled - began)
            seconds["animate"].append(ended - reading)
            print(f"round {number}: {sampled - began:.2f} s, {ended - reading:.2f} s", file=sys.stderr, flush=True)
    return equal, seconds


@contextmanager
def _bundle(arguments: argparse.Namespace) -> Iterator[Path]:
    """The bundle that was named, or one exported from checkpoints."""
    if arguments.bundle is not None:
        yield arguments.bundle
        return
    from lfdm_export.checkpoints.load import load_model
    from lfdm_export.export.bundle_export import export_bundle

    with subject.checkpoints(arguments) as pair, tempfile.TemporaryDirectory(prefix="lfdm-animate-") as folder:
        yield export_bundle(load_model(*pair), Path(folder) / "bundle").path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = subject.add_options(parser)
    which.add_argument("--bundle", type=Path, help="a bundle, in place of checkpoints")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "animate.json")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

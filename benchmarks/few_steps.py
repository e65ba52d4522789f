"""Time per clip of 1, 2, 4 and 10 steps, for one or more bundles, measured side by side in one process.

    python benchmarks/few_steps.py BUNDLE [BUNDLE …] [--steps 1,2,4,10] [--rounds 5]

Bundles may differ in precision. Rounds are interleaved after a warm-up, so that disturbances affect all alike. The
steps are DDIM's: time does not depend on the sampler. Results go to benchmarks/results/few_steps.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import latency, machine
from lfdm_export.errors import LfdmExportError
from lfdm_export.machine import available_cores
from lfdm_models.schedule import cosine_schedule

if TYPE_CHECKING:
    from benchmarks.contestants import Exported, Made
    from lfdm_export.bundle.reader import Bundle

#: Seconds of the parts, by number of steps.
Seconds = Mapping[int, Mapping[str, Sequence[float]]]


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    facts = machine.at_start()
    from lfdm_export.bundle.reader import Bundle

    try:
        bundles = {str(path): Bundle.open(path) for path in arguments.bundles}
        found = _measure(bundles, arguments.steps, arguments.rounds, arguments.threads)
    except LfdmExportError as error:
        print(f"few_steps: {error}", file=sys.stderr)
        return 1
    result = {
        **facts,
        "settings": {"threads": arguments.threads, "rounds": arguments.rounds},
        "bundles": [
            {
                "precision": bundle.manifest.precision,
                "frames": bundle.manifest.geometry.frames,
                "image_size": bundle.manifest.geometry.image_size,
                "seconds": found[name],
            }
            for name, bundle in bundles.items()
        ],
    }
    machine.write_json(arguments.out, result)
    for name, bundle in bundles.items():
        print("\n".join(_table(f"{name} ({bundle.manifest.precision})", found[name])))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time clips of few steps of one or more bundles.")
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folder written by lfdm-export")
    parser.add_argument("--steps", type=_steps, default=(1, 2, 4, 10), metavar="N,M", help="DDIM steps (1,2,4,10)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads per engine (all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="clips of each bundle and number of steps (5)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "few_steps.json", metavar="FILE", help="results")
    arguments = parser.parse_args()
    if min(arguments.threads, arguments.rounds) < 1:
        parser.error("threads and rounds must be 1 or more")
    return arguments


def _steps(value: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(part) for part in value.split(","))
    except ValueError:
        steps = ()
    if not steps or min(steps) < 1:
        raise argparse.ArgumentTypeError(f"found {value!r}, expected numbers of steps such as 1,2,4,10")
    return steps


def _measure(bundles: Mapping[str, Bundle], steps: Sequence[int], rounds: int, threads: int) -> dict[str, Seconds]:
    """Seconds of the parts by bundle and number of steps."""
    from benchmarks.contestants import Exported
    from lfdm_export.generate.pipeline import Pipeline

    tasks = {}
    contestants: dict[str, Exported] = {}
    for name, bundle in bundles.items():
        schedule = cosine_schedule(bundle.manifest.config.dm.training_steps)
        tasks[name] = {count: latency.make_task(schedule, bundle, count) for count in steps}
        contestants[name] = Exported(name, Pipeline(bundle, threads=threads))
        contestants[name].make(latency.make_task(schedule, bundle, 1))
    made: dict[str, dict[int, list[Made]]] = {name: {count: [] for count in steps} for name in bundles}
    for number in range(1, rounds + 1):
        for name, contestant in contestants.items():
            for count in steps:
                clip = latency.without_arrays(contestant.make(tasks[name][count]))
                made[name][count].append(clip)
                text = f"round {number}/{rounds}  {name}  {count} steps {clip.clip:7.2f} s"
                print(text, file=sys.stderr, flush=True)
    return {
        name: {count: latency.samples(clips) for count, clips in of_bundle.items()} for name, of_bundle in made.items()
    }


def _table(title: str, seconds: Seconds) -> Iterator[str]:
    """Medians with their spread, by number of steps."""
    yield title
    yield f"{'median s (min … max)':22s}" + "".join(f"{f'{count} steps':>26s}" for count in seconds)
    for part in latency.PARTS:
        cells = []
        for of_count in seconds.values():
            values = of_count[part]
            cells.append(f"{statistics.median(values):8.3f} ({min(values):6.3f} … {max(values):6.3f})")
        yield f"{part:22s}" + "".join(f"{cell:>26s}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of exporting a checkpoint pair and of generating a clip, each in its own process.

    python benchmarks/memory.py (--golden mug128 | --checkpoints LFAE DM) [--threads N]

Prints the largest resident set of each (and of its imports alone, for comparison), and writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Few imports: a child process inherits the peak of its parent.
from benchmarks import machine, subject
from lfdm_export.machine import available_cores

#: Largest acceptable peaks for the published sizes, in bytes.
LIMITS = {"export": 6e9, "generate": 3e9}


def main() -> int:
    """Measure and print; returns 1 if a peak exceeds `LIMITS`."""
    if len(sys.argv) > 1 and sys.argv[1] in _JOBS:
        job, *arguments = sys.argv[1:]
        _run_job(_JOBS[job], arguments)
        return 0
    parser = argparse.ArgumentParser(description="Measure the peak memory of export and generation.")
    subject.add_options(parser)
    parser.add_argument("--frames", type=int, default=40, help="frames per clip (40)")
    parser.add_argument("--image-size", type=int, default=128, help="pixels (128)")
    parser.add_argument("--steps", type=int, default=2, help="DDIM steps; they do not change the peak (2)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads of generation (all cores)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "memory.json", metavar="FILE", help="results")
    options = parser.parse_args()
    facts = machine.describe()
    with subject.checkpoints(options) as pair, tempfile.TemporaryDirectory(prefix="lfdm-memory-") as folder:
        bundle = Path(folder) / "bundle"
        sizes = [str(options.frames), str(options.image_size)]
        results = {
            "export": _measure("export", [*map(str, pair), str(bundle), *sizes]),
            "generate": _measure("generate", [str(bundle), str(options.steps), str(options.threads)]),
        }
    names = ("frames", "image_size", "steps", "threads", "golden")
    machine.write_json(
        options.out, {**facts, "settings": {name: getattr(options, name) for name in names}, "results": results}
    )
    within = True
    for name, result in results.items():
        fits = result["peak_bytes"] <= LIMITS[name]
        within &= fits
        peak, imports, limit = (n / 1e9 for n in (result["peak_bytes"], result["imports_bytes"], LIMITS[name]))
        verdict = "within" if fits else "BEYOND"
        print(f"{name:10s} peak {peak:.2f} GB (imports {imports:.2f}), {verdict} {limit:.0f} GB")
    return 0 if within else 1


def _measure(job: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, job, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _run_job(prepare: Callable[[list[str]], Callable[[], object]], arguments: list[str]) -> None:
    run = prepare(arguments)
    imports, start = _peak(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": _peak(), "imports_bytes": imports, "seconds": seconds}))


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _export(arguments: list[str]) -> Callable[[], object]:
    from lfdm_export.checkpoints.load import load_model
    from lfdm_export.export.bundle_export import export_bundle

    lfae, dm, out, frames, image_size = arguments
    return lambda: export_bundle(load_model(lfae, dm), out, frames=int(frames), image_size=int(image_size))


def _generate(arguments: list[str]) -> Callable[[], object]:
    import numpy as np
    import onnxruntime  # noqa: F401  (its own share of the peak)

    from lfdm_export.generate.pipeline import Pipeline

    bundle, steps, threads = arguments

    def run() -> object:
        pipeline = Pipeline.open(bundle, threads=int(threads))
        geometry = pipeline.bundle.manifest.geometry
        image = np.full((geometry.image_size, geometry.image_size, 3), 128, np.uint8)
        embedding = np.zeros(geometry.text_width, np.float32)
        return pipeline.generate(image, text_embedding=embedding, sampler="ddim", steps=int(steps))

    return run


_JOBS = {"export": _export, "generate": _generate}


if __name__ == "__main__":
    sys.exit(main())

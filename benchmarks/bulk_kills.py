"""A table of many rows, killed at random moments: is every clip that of `Pipeline.generate`, and what does a run cost?

    python benchmarks/bulk_kills.py --rows 1000 --kills 3 [--workers 2] [--bundle DIR]
    python benchmarks/bulk_kills.py --rows 0 --overhead 12 --scaling 40 [--ray]

- kills: `lfdm-generate --jobs` runs until a random number of clips is there, and a random part of a second more; then
  it gets SIGKILL, in turn alone and with its workers. The next run goes on. After the last one each clip is made again
  by `Pipeline.generate`, and compared pixel by pixel; a wrong or missing one ends the program with status 1.
- overhead: seconds per clip of a run of one worker, over those of a plain loop (`generate`, then `save`) over the same
  rows. Blocks alternate, the first clip of each is not counted; the result is the median of the ratios of neighboring
  blocks.
- scaling: clips per second of two workers over one, in turn; beside it the machine's own limit: two plain loops at a
  time over one. `--ray` measures Ray's actors too.

Every engine has one thread. Results go to benchmarks/results/bulk_kills.json.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from benchmarks import machine
from lfdm_export.bulk.job import JobSettings
from lfdm_export.bulk.run import BulkOptions, BulkProgress, run_jobs
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clip_files import contact_sheet
from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.training.procedural import HELD_OUT_SEEDS, clip_parts, render

_PICTURES, _SIZE = 8, 128
#: Contact sheets: small, and without loss.
_FORMAT = "png"
_BLOCKS = 5


def main() -> int:
    """Measure and print; returns 1 if a clip was wrong or missing."""
    arguments = _arguments()
    result = machine.at_start()
    names = ("bundle", "rows", "kills", "workers", "steps", "target", "seed")
    result["settings"] = {name: str(getattr(arguments, name)) for name in names}
    with tempfile.TemporaryDirectory(prefix="lfdm-bulk-") as folder:
        place = Path(folder)
        _draw(place)
        if arguments.rows:
            result["kills"] = _kills(arguments, place)
        if arguments.overhead:
            result["overhead"] = _overhead(arguments, place)
        if arguments.scaling:
            result["scaling"] = _scaling(arguments, place)
    machine.write_json(arguments.out, result)
    print(f"{arguments.out}")
    return 1 if result.get("kills", {}).get("wrong") else 0


# --- Rows ------------------------------------------------------------------------------------------


def _draw(folder: Path) -> None:
    """Photographs of characters that no training has seen."""
    for index in range(_PICTURES):
        character, motion = clip_parts(HELD_OUT_SEEDS[index])
        Image.fromarray(render(character, motion, np.zeros(1), _SIZE)[0]).save(folder / f"p{index}.png")


def _rows(count: int, labels: Sequence[str], first: int = 0) -> list[dict[str, Any]]:
    numbers = range(first, first + count)
    return [
        {"id": f"c{n:05d}", "image": f"p{n % _PICTURES}.png", "label": labels[n % len(labels)], "seed": 7 * n}
        for n in numbers
    ]


def _table(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "label", "seed"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    return Pipeline.open(arguments.bundle, threads=1, target=arguments.target)


# --- Kills -----------------------------------------------------------------------------------------


def _kills(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    draw, pipeline = random.Random(arguments.seed), _pipeline(arguments)
    rows, out = _rows(arguments.rows, pipeline.bundle.labels), folder / "killed"
    table = _table(folder, "killed.csv", rows)
    command = [
        sys.executable, "-c", "from lfdm_export.cli import generate_main; raise SystemExit(generate_main())",
        arguments.bundle, "--jobs", table, "-o", out, "--format", _FORMAT, "--steps", str(arguments.steps),
        "--workers", str(arguments.workers), "--threads", "1", "--target", arguments.target, "-q",
    ]  # fmt: skip
    moments = sorted(draw.sample(range(1, arguments.rows), arguments.kills))
    found, began = [], time.monotonic()
    for index, moment in enumerate([*moments, None]):
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None and (moment is None or len(list(out.glob(f"*.{_FORMAT}"))) < moment):
            time.sleep(0.02)
        if moment is not None and process.poll() is None:
            time.sleep(draw.random())
            with_workers = index % 2 == 1
            (os.killpg if with_workers else os.kill)(process.pid, signal.SIGKILL)
            there = len(list(out.glob(f"*.{_FORMAT}")))
            found.append({"clips": there, "with_workers": with_workers, "status": process.wait()})
            print(
                f"killed at {there} of {arguments.rows} clips{', with its workers' if with_workers else ''}", flush=True
            )
    status, seconds = process.wait(), time.monotonic() - began
    wrong = [row["id"] for row in rows if not _is_right(pipeline, folder, row, out, arguments.steps)]
    left = sorted(path.name for path in out.rglob("*") if path.is_file() and path.parent == out)
    strays = len(left) - len(rows) - sum(name.startswith("summary.") for name in left)
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} clips are right after {len(found)} kills; other files left: {strays}"
    )
    return {
        "kills": found, "last_status": status, "wrong": wrong, "right": len(rows) - len(wrong), "other_files": strays,
        "seconds": seconds,
    }  # fmt: skip


def _is_right(pipeline: Pipeline, folder: Path, row: dict[str, Any], out: Path, steps: int) -> bool:
    path = out / f"{row['id']}.{_FORMAT}"
    if not path.is_file():
        return False
    clip = pipeline.generate(folder / row["image"], label=row["label"], seed=row["seed"], steps=steps)
    with Image.open(path) as picture:
        return np.array_equal(np.asarray(picture), contact_sheet(clip.frames[0]))


# --- Overhead --------------------------------------------------------------------------------------


def _overhead(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pipeline = _pipeline(arguments)
    per_clip: dict[str, list[float]] = {"loop": [], "run": []}
    _loop(pipeline, folder, _rows(2, pipeline.bundle.labels), folder / "warm", arguments.steps)
    for block in range(_BLOCKS):
        rows = _rows(arguments.overhead, pipeline.bundle.labels, 10_000 + block * arguments.overhead)
        table = _table(folder, f"overhead{block}.csv", rows)
        per_clip["loop"].append(_loop(pipeline, folder, rows, folder / f"loop{block}", arguments.steps))
        per_clip["run"].append(_run(arguments, table, folder / f"run{block}", 1, None))
    ratios = [run / loop for run, loop in zip(per_clip["run"], per_clip["loop"], strict=True)]
    print(
        f"overhead per clip: {100 * (statistics.median(ratios) - 1):+.1f}% of a plain loop (blocks: {_percent(ratios)})"
    )
    return {**per_clip, "ratios": ratios, "overhead": statistics.median(ratios) - 1}


def _percent(ratios: Sequence[float]) -> str:
    return ", ".join(f"{100 * (ratio - 1):+.1f}%" for ratio in ratios)


def _loop(pipeline: Pipeline, folder: Path, rows: Sequence[dict[str, Any]], out: Path, steps: int) -> float:
    """Seconds per clip of a plain loop, without its first clip."""
    out.mkdir()
    began = 0.0
    for index, row in enumerate(rows):
        clip = pipeline.generate(folder / row["image"], label=row["label"], seed=row["seed"], steps=steps)
        clip.save(out / f"{row['id']}.{_FORMAT}")
        if index == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / (len(rows) - 1)


def _run(arguments: argparse.Namespace, table: Path, out: Path, workers: int, ray: str | None) -> float:
    """Seconds per clip of a run of workers, without its start and the first clip of each."""
    moments: list[float] = []

    def note(_: BulkProgress) -> None:
        moments.append(time.perf_counter())

    run_jobs(
        arguments.bundle, table, out, progress=note,
        defaults=JobSettings(SamplingOptions(steps=arguments.steps), format=_FORMAT),
        options=BulkOptions(workers=workers, threads=1, target=arguments.target, ray=ray),
    )  # fmt: skip
    return (moments[-1] - moments[workers]) / (len(moments) - 1 - workers)


# --- Scaling ---------------------------------------------------------------------------------------


def _scaling(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    labels = _pipeline(arguments).bundle.labels
    rates: dict[str, list[float]] = {}
    kinds = {"processes": None, **({"ray": "local"} if arguments.ray else {})}
    for block in range(_BLOCKS):
        rows = _rows(arguments.scaling, labels, 20_000 + block * arguments.scaling)
        table = _table(folder, f"scaling{block}.csv", rows)
        for workers in (1, 2):
            for kind, ray in kinds.items():
                out = folder / f"{kind}{workers}-{block}"
                rates.setdefault(f"{kind} {workers}", []).append(1 / _run(arguments, table, out, workers, ray))
            rates.setdefault(f"loops {workers}", []).append(_loops(arguments, folder, rows, workers, block))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    gains = {kind: medians[f"{kind} 2"] / medians[f"{kind} 1"] for kind in (*kinds, "loops")}
    print("two over one: " + ", ".join(f"{kind} × {gain:.2f}" for kind, gain in gains.items()))
    return {"clips_per_second": rates, "two_over_one": gains}


def _loops(
    arguments: argparse.Namespace, folder: Path, rows: Sequence[dict[str, Any]], count: int, block: int
) -> float:
    """Clips per second of some plain loops at a time, each over its share of the rows in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(count) as pool:
        tasks = [
            (arguments, folder, rows[index::count], folder / f"loops{count}-{block}-{index}") for index in range(count)
        ]
        return sum(1 / seconds for seconds in pool.starmap(_one_loop, tasks, chunksize=1))


def _one_loop(arguments: argparse.Namespace, folder: Path, rows: Sequence[dict[str, Any]], out: Path) -> float:
    return _loop(_pipeline(arguments), folder, rows, out, arguments.steps)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="characters", help="default: the shipped model")
    parser.add_argument("--rows", type=int, default=1000, help="0: no kills (default: 1000)")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--overhead", type=int, default=0, metavar="CLIPS", help="clips per block of the overhead")
    parser.add_argument("--scaling", type=int, default=0, metavar="CLIPS", help="clips per block of the scaling")
    parser.add_argument("--ray", action="store_true", help="scaling of Ray's actors too (extra `bulk`)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "bulk_kills.json")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

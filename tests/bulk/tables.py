"""Images, tables and runs for the tests of bulk jobs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lfdm_export.bulk.job import JobSettings
from lfdm_export.bulk.run import BulkOptions, run_jobs
from lfdm_export.bulk.summary import Summary
from lfdm_export.bundle.reader import Bundle
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.sampling.options import SamplingOptions
from tests.fake_bundle import SIZE

LABELS = ("Anger", "happiness", "turn left")
#: Clips are saved as .npz, which stores all outputs unchanged.
NPZ = JobSettings(SamplingOptions(steps=2), format="npz")


def write_picture(path: Path, seed: int = 0, size: int = SIZE) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(path)
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(folder: Path, count: int, pictures: int = 4) -> list[dict[str, Any]]:
    """Return rows of several images and labels, half of them with their own seed."""
    for index in range(min(count, pictures)):
        write_picture(folder / f"p{index}.png", index)
    return [
        {"id": f"c{i:03d}", "image": f"p{i % pictures}.png", "label": LABELS[i % 3], "seed": i if i % 2 else ""}
        for i in range(count)
    ]


def run(bundle: Bundle, table: Path, out: Path, **options: Any) -> Summary:
    progress = options.pop("progress", None)
    defaults = options.pop("defaults", NPZ)
    chosen = BulkOptions(**{"target": "onnxruntime", "threads": 1, **options})
    return run_jobs(bundle, table, out, defaults=defaults, options=chosen, progress=progress)


def frames_of(path: Path) -> NDArray[np.uint8]:
    with np.load(path) as archive:
        found: NDArray[np.uint8] = archive["frames"]
    return found


def assert_right_clips(bundle: Bundle, folder: Path, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Every clip exists, and equals the result of `Pipeline.generate`."""
    from lfdm_export.bulk.job import seed_of

    pipeline = Pipeline.open(bundle, threads=1, target="onnxruntime")
    for row in rows:
        seed = seed_of(row["id"]) if row.get("seed", "") == "" else row["seed"]
        clip = pipeline.generate(folder / row["image"], label=row["label"], seed=seed, steps=2)
        np.testing.assert_array_equal(frames_of(out / f"{row['id']}.npz"), clip.frames)

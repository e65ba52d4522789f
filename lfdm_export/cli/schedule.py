"""``lfdm-train schedule``: tunes a sampler of few steps for a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OK, Bars, add_common_options, make_parser, run, say
from lfdm_export.errors import InputError
from lfdm_export.files.atomic import rehearse
from lfdm_export.files.names import user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lfdm_export.bundle.reader import Bundle

PROGRAM = "lfdm-train schedule"
_EXAMPLES = """\
  lfdm-train schedule bundle --steps 4,5,6         then: lfdm-generate bundle --sampler tuned --steps 5 …
  lfdm-train schedule two --steps 2 --teacher bundle   two: a bundle of a DM that lfdm-train distill wrote
  lfdm-train schedule mug --steps 5 --images faces/ --out tuned.json
  lfdm-export --lfae RegionMM_mug.pth --dm flowdiff_mug.pth --dataset mug --engine fp16 --tuned tuned.json --out mug16
"""


def schedule_main(argv: Sequence[str]) -> int:
    """Run ``lfdm-train schedule``; returns the exit status."""
    parser = make_parser(
        PROGRAM,
        "Learn times, gains and noise of a sampler of few steps for a bundle, whose weights stay as they are, and "
        "write it into the bundle's manifest: the sampler 'tuned'.",
        _EXAMPLES,
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder written by lfdm-export")
    parser.add_argument("--steps", default="4,5,6", metavar="N,M", help="one table per number (default: %(default)s)")
    parser.add_argument(
        "--images", metavar="FOLDER", help="images to tune on (default: drawn characters, for bundles trained on these)"
    )
    parser.add_argument(
        "--teacher",
        metavar="BUNDLE",
        help="for a bundle of a distilled DM: the bundle of the DM that it was distilled from, with the same LFAE",
    )
    parser.add_argument(
        "--conditions", type=int, default=64, metavar="N", help="pairs of image and label (default: %(default)s)"
    )
    parser.add_argument("--clips", type=int, default=16, metavar="N", help="clips per candidate (default: %(default)s)")
    parser.add_argument(
        "--generations", type=int, default=8, metavar="N", help="generations of candidates (default: %(default)s)"
    )
    parser.add_argument(
        "--candidates", type=int, default=10, metavar="N", help="candidates per generation (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of search and noise (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="also write the tables to this file, for lfdm-export --tuned"
    )
    add_common_options(parser)
    args = parser.parse_args(argv)
    return run(PROGRAM, args, lambda: _schedule(args), extra="train")


def _schedule(args: argparse.Namespace) -> int:
    from lfdm_export.bundle.writer import store_tuned
    from lfdm_export.evaluation.tune_bundle import tune_bundle
    from lfdm_export.evaluation.tuning import Search
    from lfdm_export.generate.pipeline import Pipeline

    counts = step_counts(args.steps)
    search = Search(clips=args.clips, generations=args.generations, candidates=args.candidates, seed=args.seed)
    out = None if args.out is None else user_path(args.out)
    if out is not None:  # checked before minutes of tuning
        rehearse(out)
    pipeline = Pipeline.open(args.bundle, threads=args.threads)
    teacher = None if args.teacher is None else Pipeline.open(args.teacher, threads=args.threads)
    pictures = None if args.images is None else read_pictures(user_path(args.images), pipeline.bundle)
    with Bars(quiet=args.quiet) as progress:
        tuned = tune_bundle(
            pipeline,
            counts,
            search=search,
            conditions=args.conditions,
            pictures=pictures,
            teacher=teacher,
            progress=progress,
        )
    bundle = store_tuned(pipeline.bundle, tuned)
    for table in tuned.tables:
        say(args, f"{table.steps} steps  times {', '.join(map(str, table.times))}")
    say(args, f"tuned  {bundle.path}: sampler 'tuned' of {', '.join(str(table.steps) for table in tuned.tables)} steps")
    if out is not None:
        tuned.save(out)
        say(args, f"tables  {out}")
    return OK


def step_counts(value: str) -> tuple[int, ...]:
    """Parse a comma-separated list of numbers of steps.

    Raises:
        InputError: an entry is not a number, or too large for a table.
    """
    from lfdm_export.sampling.tuned import MOST_STEPS

    try:
        counts = tuple(int(part) for part in value.split(","))
    except ValueError:
        counts = ()
    if not counts or not all(1 <= count <= MOST_STEPS for count in counts):
        raise InputError(f"--steps is {value!r}, expected numbers of 1 to {MOST_STEPS} such as 4,5,6")
    return counts


def read_pictures(folder: Path, bundle: Bundle) -> NDArray[np.uint8]:
    """Read all images of a folder, sorted by name: (P, H, W, 3) uint8, in the format of the bundle's model.

    Raises:
        InputError: the folder does not exist or has no files, or a file is not an image.
    """
    import numpy as np

    from lfdm_export.pictures.preprocess import prepare_images

    if not folder.is_dir():
        raise InputError(f"--images is {folder}, expected a folder of photographs")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise InputError(f"{folder} holds no files, expected photographs")
    manifest = bundle.manifest
    size, rule = manifest.geometry.image_size, manifest.preprocessing
    return np.concatenate([prepare_images(path, size, rule) for path in paths])

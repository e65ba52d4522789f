"""Command-line options for a benchmark's checkpoints."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Script beside the repository that makes checkpoints of the published size from fixed random weights.
_MAKER = Path(__file__).resolve().parents[2] / "shared" / "golden" / "make_checkpoints.py"


def add_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add `--checkpoints` and `--golden`; one is required, or another option of the group that is returned."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoints", nargs=2, type=Path, metavar=("LFAE", "DM"), help="a checkpoint pair")
    which.add_argument(
        "--golden", metavar="NAME", help=f"a golden variant (mug128, natops128), made with {_MAKER.name}"
    )
    return which


@contextmanager
def checkpoints(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The requested pair; a golden pair is made in a temporary folder and removed.

    Raises:
        SystemExit: the pair is not available.
    """
    if arguments.checkpoints:
        yield tuple(arguments.checkpoints)
        return
    if not _MAKER.is_file():
        sys.exit(f"--golden needs {_MAKER}, which is not there; give --checkpoints LFAE DM")
    with tempfile.TemporaryDirectory(prefix="lfdm-golden-") as folder:
        # In its own process, so that its memory does not count as the benchmark's.
        subprocess.run([sys.executable, _MAKER, arguments.golden, folder], check=True, stdout=subprocess.DEVNULL)
        yield Path(folder) / "lfae.pth", Path(folder) / "dm.pth"

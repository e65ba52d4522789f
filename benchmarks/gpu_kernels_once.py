"""Runs each kernel once at the decoder's sizes, for ncu; with `checks`, the small checks, for compute-sanitizer.

    python benchmarks/gpu_kernels_once.py [checks] [--device cpu]

On a CPU it runs the host build with small sizes, as a trial of this program.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import torch  # noqa: E402

from benchmarks import gpu_kernels  # noqa: E402
from benchmarks.gpu_errors import WrongResultError  # noqa: E402
from benchmarks.gpu_timing import synchronize  # noqa: E402
from benchmarks.gpu_work import Settings, build_host_kernels, kernels_for  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run the kernels or checks; returns 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Run each kernel once, for a profiler or a sanitizer.")
    parser.add_argument("what", nargs="?", choices=("kernels", "checks"), default="kernels")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    tiny = device.type == "cpu"
    with tempfile.TemporaryDirectory(prefix="lfdm-kernels-") as folder:
        settings = Settings(options.device, tiny, Path(folder), Path(folder))
        if tiny:
            build_host_kernels(settings)
        with kernels_for(settings):
            if options.what == "kernels":
                print(f"{gpu_kernels.run_once(device, toy=tiny)} launches")
                return 0
            try:
                print(f"{len(gpu_kernels.checks(device, toy=True))} checks: right")
            except WrongResultError as error:
                print(error, file=sys.stderr)
                return 1
            finally:
                synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())

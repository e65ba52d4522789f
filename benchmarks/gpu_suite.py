"""Everything that wants a GPU, in one run: kernels right and fast, clips by PyTorch and by us, batch 1 to 32.

    python benchmarks/gpu_suite.py [--golden FOLDER | --checkpoints LFAE DM] [--minutes 8.5] [--out FILE]

Needs torch with CUDA, numpy, pillow and einops; NVRTC comes with torch. Nothing of this repository has to be
installed. Without weights the networks are of the published size and random, which times them as well. What was
measured is written after each part, and nothing that a later part does can lose it; a part that fails, or for which no
time is left, says so in the result, and the exit status is 1 if one failed. Results go to benchmarks/results/gpu.json,
with a plot beside it where matplotlib is installed.

    python benchmarks/gpu_suite.py --device cpu --size toy

tries all of it out without a GPU, on a small model, with the host build of the kernels; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "models")]

from benchmarks import machine  # noqa: E402
from benchmarks.gpu_parts import PARTS, Suite  # noqa: E402
from benchmarks.gpu_timing import Budget, OutOfTimeError  # noqa: E402
from benchmarks.gpu_verdicts import verdicts  # noqa: E402

if TYPE_CHECKING:
    import torch

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; 0 if none failed."""
    options = _arguments(arguments)
    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; give --device cpu --size toy for a trial run", file=sys.stderr)
        return 2
    suite = Suite(options, device, Budget(time.monotonic() + 60 * options.minutes))
    result: Record = {
        **machine.describe(),
        "gpu": _gpu(device),
        "settings": {"device": options.device, "size": options.size, "minutes": options.minutes},
        "parts": {},
    }
    result["versions"] |= {"cuda": torch.version.cuda or "", "cudnn": str(torch.backends.cudnn.version() or "")}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    with _kernels_for(device):
        for name, part in PARTS.items():
            if not options.only or name in options.only:
                _run(name, part, suite, result)
                machine.write_json(options.out, {**result, "targets": verdicts(result)})
    for name, verdict in verdicts(result).items():
        print(f"{name:60s} {verdict['measured']}   (target {verdict['target']:g})")
    _plot({**result, "targets": verdicts(result)}, options.out)
    failed = [name for name, part in result["parts"].items() if part["status"] == "failed"]
    if failed:
        print(f"gpu_suite: failed: {', '.join(failed)}; see {options.out}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time kernels and clips on a GPU.")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--golden", type=Path, metavar="FOLDER", help="folder with make_checkpoints.py and its specs")
    weights.add_argument("--checkpoints", nargs=2, type=Path, metavar=("LFAE", "DM"), help="a pair of published size")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial run")
    parser.add_argument("--size", choices=("full", "toy"), default="full", help="toy: small sizes, for a trial run")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (8.5)")
    parser.add_argument("--only", action="append", default=[], choices=list(PARTS), help="this part alone (repeatable)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "gpu.json", metavar="FILE", help="results")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cpu" and parsed.size == "full":
        parser.error("the full size takes hours on a CPU; give --size toy")
    if parsed.minutes <= 0:
        parser.error("--minutes must be above 0")
    if parsed.only and "model" not in parsed.only:  # what most parts need
        parsed.only.append("model")
    return parsed


def _run(name: str, part: Callable[[Suite], Record], suite: Suite, result: Record) -> None:
    """Run a part; whatever it does, its record says."""
    import torch

    start = time.monotonic()
    record: Record = {"status": "ok"}
    try:
        record["data"] = part(suite)
    except OutOfTimeError as error:
        record |= {"status": "skipped", "reason": str(error), "data": getattr(error, "data", None)}
    except Exception as error:  # noqa: BLE001  (what was measured before must not be lost)
        record |= {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "data": getattr(error, "data", None),
        }
        record["traceback"] = traceback.format_exc()
        traceback.print_exc()
    record["seconds"] = time.monotonic() - start
    result["parts"][name] = record
    if suite.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    print(f"{name:16s} {record['status']:8s} {record['seconds']:6.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _kernels_for(device: torch.device) -> Iterator[None]:
    """On a CPU the host build stands in for the kernels."""
    if device.type == "cuda":
        yield
        return
    from lfdm_export.ops.cuda.dispatch import standing_in
    from lfdm_export.ops.cuda.host import HostKernels, build
    from lfdm_export.ops.thresholded_step.kernels import STORAGES, noise_kernel, step_kernel
    from lfdm_export.ops.warp.kernels import warp_kernel

    kernels = [step_kernel(*storages) for storages in STORAGES] + [noise_kernel()]
    for storage in ("float32", "float16", "bfloat16"):
        for blend in (False, True):
            kernels += [warp_kernel(storage, "planar", blend=blend), warp_kernel(storage, "channels_last", blend=blend)]
    with tempfile.TemporaryDirectory(prefix="lfdm-kernels-") as folder:
        built = HostKernels(build(kernels, Path(folder) / "kernels.so"), kernels)
        with standing_in(built):
            yield


def _gpu(device: torch.device) -> Record:
    import torch

    if device.type != "cuda":
        return {"name": "none: a trial run on the CPU"}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = ""
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver, largest clock, power limit": driver,
    }


def _plot(result: Record, out: Path) -> None:
    try:
        from benchmarks.gpu_plots import plot

        plot(result, out.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

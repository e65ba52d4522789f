"""One part of the GPU suite, in its own process; `gpu_suite.py` starts it.

    python benchmarks/gpu_part.py NAME WORK_FOLDER

It imports its modules, waits for a line with its time limit in seconds, runs, and writes its record.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "models")]

from benchmarks.gpu_parts import PARTS, SHARED, Part  # noqa: E402
from benchmarks.gpu_records import Record, write_record  # noqa: E402
from benchmarks.gpu_timing import Budget, OutOfTimeError  # noqa: E402
from benchmarks.gpu_work import Bench, Settings, kernels_for, load_model  # noqa: E402

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def main(arguments: list[str]) -> int:
    """Run the part that the command line names."""
    name, work = arguments
    _end_with_the_suite()
    settings, part = Settings.load(Path(work)), SHARED if name == "shared" else PARTS[name]
    bench = Bench(settings, Budget(float("inf")), settings.record(name))
    if part.torch:
        import torch  # noqa: F401  (takes seconds, before the part's turn)
    if part.model:
        bench.model = load_model(settings)
    turn = sys.stdin.readline()
    if not turn:  # the suite ended before this part's turn
        return 1
    bench.budget = Budget(time.monotonic() + float(turn))
    record = run(part, bench)
    return 0 if record["status"] != "failed" else 1


def run(part: Part, bench: Bench) -> Record:
    """Run a part and write its record, also if the part fails."""
    record: Record
    try:
        if part.torch:
            _set_up_torch(bench.device.type)
        with kernels_for(bench.settings) if part.kernels else contextlib.nullcontext():
            bench.data |= part.run(bench)
        record = {"status": "ok", "data": bench.data}
    except OutOfTimeError as error:
        record = {"status": "ok" if bench.data else "skipped", "reason": str(error), "data": bench.data}
    except Exception as error:  # noqa: BLE001  (what was measured before must not be lost)
        record = {"status": "failed", "error": f"{type(error).__name__}: {error}", "data": bench.data}
        record["traceback"] = traceback.format_exc()
        traceback.print_exc()
    write_record(bench.record, record)
    return record


def _set_up_torch(device: str) -> None:
    import torch

    if device == "cpu":  # a trial: on a busy machine, threads that wait for each other are far slower than one
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    # Algorithms that cuDNN tries per new convolution: 10 by default, of some 30 ms each.
    torch.backends.cudnn.benchmark_limit = 4


def _end_with_the_suite() -> None:
    """Let Linux end this process when the suite's process ends, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

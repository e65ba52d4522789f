"""All GPU measurements in one run: kernels checked and timed, clips by PyTorch and by this project, batch 1 to 32.

    python benchmarks/gpu_suite.py [--golden FOLDER | --checkpoints LFAE DM] [--minutes 6.5] [--out FOLDER]

Needs torch with CUDA, numpy, pillow and einops; NVRTC comes with torch. This repository need not be installed. The most
important parts run first, each in its own process with its own time limit, and each result is written as soon as it is
available; see benchmarks/README.md.

    python benchmarks/gpu_suite.py --device cpu --tiny

is a trial of everything without a GPU, on a small model, with the host build of the kernels; its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "models")]

from benchmarks import machine  # noqa: E402
from benchmarks.gpu_parts import PARTS, SHARED, Part  # noqa: E402
from benchmarks.gpu_processes import Job, run_jobs  # noqa: E402
from benchmarks.gpu_records import Record, plain, write_record  # noqa: E402
from benchmarks.gpu_summary import write_summary  # noqa: E402
from benchmarks.gpu_verdicts import verdicts  # noqa: E402
from benchmarks.gpu_work import Settings  # noqa: E402
from lfdm_export.engines.cuda_driver import find_gpus  # noqa: E402

#: File of the whole result, for the summary and the plots.
_RESERVED_SECONDS = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns 0 if none failed, 1 if one did, 2 if there is no GPU."""
    begin = time.monotonic()
    options = _arguments(arguments)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:24s} at most {part.limit:3.0f} s  {part.what}")
        return 0
    gpus, why_not = find_gpus()
    if options.device == "cuda" and not gpus:
        print(f"gpu_suite: {why_not}; give --device cpu --tiny for a trial without one", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminate)
    options.out.mkdir(parents=True, exist_ok=True)
    result: Record = {
        **machine.describe(),
        "gpu": gpus[0].name if options.device == "cuda" else "none: a trial on the CPU",
        "nvidia-smi": _nvidia_smi() if options.device == "cuda" else "",
        "settings": {"device": options.device, "tiny": options.tiny, "minutes": options.minutes},
        "parts": {},
    }
    with tempfile.TemporaryDirectory(prefix="lfdm-gpu-suite-") as folder:
        pair = tuple(path.resolve() for path in options.checkpoints or ()) or None
        settings = Settings(
            options.device,
            options.tiny,
            Path(folder),
            options.out.resolve(),
            options.golden,
            pair,
        )
        settings.save()
        try:
            _run_parts(options.parts, settings, begin + 60 * options.minutes - _RESERVED_SECONDS, result)
        finally:
            _write(result, options.out)
            write_summary(plain(result), options.out)
    failed = [name for name, part in result["parts"].items() if part["status"] == "failed"]
    if failed:
        print(f"gpu_suite: failed: {', '.join(failed)}; see {options.out / 'gpu.md'}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time kernels and clips on a GPU.")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--golden", type=Path, metavar="FOLDER", help="folder with make_checkpoints.py and its specs")
    weights.add_argument("--checkpoints", nargs=2, type=Path, metavar=("LFAE", "DM"), help="a pair of published size")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial")
    parser.add_argument("--minutes", type=float, default=6.5, help="time limit of the whole run (6.5)")
    parser.add_argument(
        "--parts", type=_part_names, default=list(PARTS), metavar="A,B", help="only these parts; see --list"
    )
    parser.add_argument("--list", action="store_true", help="list the parts and exit")
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "gpu", metavar="FOLDER", help="results")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cpu" and not parsed.tiny:
        parser.error("the full size takes hours on a CPU; give --tiny")
    if not 0 < parsed.minutes < float("inf"):
        parser.error(f"--minutes is {parsed.minutes:g}, expected more than 0")
    if parsed.golden is not None and not (parsed.golden / "make_checkpoints.py").is_file():
        parser.error(f"--golden: {parsed.golden} has no make_checkpoints.py")
    if parsed.golden is not None:
        parsed.golden = parsed.golden.resolve()
    missing = [str(path) for path in parsed.checkpoints or () if not path.is_file()]
    if missing:
        parser.error(f"--checkpoints: no such file: {', '.join(missing)}")
    return parsed


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}; --list shows all")
    return [name for name in PARTS if name in names]


def _run_parts(names: Sequence[str], settings: Settings, end: float, result: Record) -> None:
    """Run the parts, and write the result whenever one has ended."""
    # Every part is in the result from the start, in order, so that parts that did not run are visible.
    result["parts"] |= {name: {"status": "not run"} for name in ("shared", *names)}

    def done(name: str, record: Record) -> None:
        result["parts"][name] = record
        _write(result, settings.out)
        text = (record.get("error") or record.get("reason") or "").partition("\n")[0]
        print(f"{name:24s} {record['status']:8s} {record['seconds']:6.1f} s  {text}", file=sys.stderr, flush=True)

    jobs = []
    for name in names:
        if PARTS[name].gpu and settings.device == "cpu":
            done(name, {"status": "skipped", "reason": "it has no trial on a CPU", "seconds": 0.0})
        else:
            jobs.append(_job(name, PARTS[name], settings))
    # On a CPU the part "shared" also makes the kernels' host build.
    needs = [job for job in jobs if job.after]
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(settings.work / "inductor"),
        "TRITON_CACHE_DIR": str(settings.work / "triton"),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
    background = [_job("shared", SHARED, settings)] if needs else []
    if not needs:
        del result["parts"]["shared"]
    run_jobs(jobs, background, end=end, environment=environment, done=done)


def _job(name: str, part: Part, settings: Settings) -> Job:
    needs = part.model or (part.kernels and settings.device == "cpu")
    return Job(
        name,
        (sys.executable, str(ROOT / "benchmarks" / "gpu_part.py"), name, str(settings.work)),
        settings.record(name),
        settings.out / "logs" / f"{name}.txt",
        part.need,
        part.limit,
        "shared" if needs else None,
    )


def _write(result: Record, out: Path) -> None:
    write_record(out / "gpu.json", {**result, "targets": verdicts(result)})


def _nvidia_smi() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.used"]
    try:
        found = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=20
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"not available: {error}"
    return found.stdout.strip()


def _terminate(_signal: int, _frame: object) -> NoReturn:
    """End as after Ctrl-C: processes are killed, and measured results are written."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

"""Processes of the GPU suite: one per part, one after the other, each with a time limit.

A part that hangs, crashes, or loses the GPU's context (after an illegal memory access) does not affect the others.
While a part runs, the next part's process already imports its modules and then waits for its turn on standard input,
so that starting processes costs no GPU time. This module imports neither torch nor CUDA.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_records import Record, read_record
from benchmarks.processes import descendants

#: Last lines of a failed part's output that its record keeps.
LAST_LINES = 25
#: Seconds between the end of a part's time and the moment when it is killed, so that it can end by itself.
_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Job:
    """One part to run.

    Attributes:
        name: name of the part.
        command: command of its process, which waits for a line with its time limit in seconds on standard input.
        record: file of its record.
        log: file for its output.
        need: minimum seconds to start it.
        limit: seconds after which it is killed.
        after: name of a background job that must succeed first.
    """

    name: str
    command: tuple[str, ...]
    record: Path
    log: Path
    need: float
    limit: float
    after: str | None = None


class Process:
    """A job's process and its descendants."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        """Start the process, which waits for `go`."""
        self.job = job
        self._ended = False
        job.record.unlink(missing_ok=True)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("wb") as log:
            self._process = subprocess.Popen(
                job.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    def go(self, seconds: float) -> None:
        """Let the job begin, and send its time limit."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `finish` reports how
            self._process.stdin.write(f"{max(seconds - _GRACE_SECONDS, 0.5 * seconds)}\n".encode())
            self._process.stdin.flush()

    def finish(self, seconds: float) -> Record:
        """Wait for the end, kill the process after `seconds`, and return its record with how it ended."""
        try:
            self._process.wait(seconds)
            how = ""
        except subprocess.TimeoutExpired:
            how = f"did not end within {seconds:.0f} s and was killed"
        self.kill()
        record = read_record(self.job.record) or {}
        if record.get("status") in ("ok", "skipped") and not how:
            return record
        if not how and record.get("status") != "failed":
            how = _ending(self._process.returncode)
        record |= {"status": "failed", "last_lines": last_lines(self.job.log)}
        if how:
            record["error"] = how
        return record

    def kill(self) -> None:
        """Kill the process and its descendants; a second call has no effect."""
        if self._ended:
            return
        self._ended = True
        for process in descendants(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


def run_jobs(
    jobs: Sequence[Job],
    background: Sequence[Job],
    *,
    end: float,
    environment: Mapping[str, str],
    done: Callable[[str, Record], None],
) -> None:
    """Run jobs one after the other, and some in the background from the start.

    Args:
        jobs: jobs in order.
        background: jobs started at once, which use only the host.
        end: `time.monotonic` seconds when all must have ended.
        environment: environment variables of the processes.
        done: called with a job's name and record when it has ended, for background jobs before those that need them.
    """
    running = {job.name: Process(job, environment) for job in background}
    started = {name: time.monotonic() for name in running}
    ended: dict[str, Record] = {}
    ready: Process | None = None

    def wait_for(name: str) -> Record:
        if name not in ended:
            process = running[name]
            left = min(started[name] + process.job.limit, end) - time.monotonic()
            ended[name] = _timed(lambda: process.finish(max(left, 0.0)), started[name])
            done(name, ended[name])
        return ended[name]

    try:
        for process in running.values():
            process.go(process.job.limit)
        for job, following in itertools.zip_longest(jobs, jobs[1:]):
            if job.after is not None and wait_for(job.after)["status"] != "ok":
                done(job.name, {"status": "skipped", "reason": f"the part {job.after!r} did not succeed", "seconds": 0})
                continue
            left = end - time.monotonic()
            if left < job.need:
                reason = f"it takes at least {job.need:.0f} s, and {max(left, 0):.0f} s were left"
                done(job.name, {"status": "skipped", "reason": reason, "seconds": 0})
                continue
            process, ready = (ready if ready is not None and ready.job is job else Process(job, environment)), None
            limit, begin = min(job.limit, left), time.monotonic()
            running[job.name] = process
            process.go(limit)
            if following is not None and (following.after is None or following.after in ended):
                ready = running[following.name] = Process(following, environment)
            done(job.name, _timed(lambda p=process, s=limit: p.finish(s), begin))  # type: ignore[misc]
        for job in background:
            wait_for(job.name)
    finally:
        for process in running.values():
            process.kill()


def last_lines(log: Path) -> list[str]:
    """The last lines of a part's output."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def _timed(finish: Callable[[], Record], begin: float) -> Record:
    record = finish()
    return {**record, "seconds": time.monotonic() - begin}


def _ending(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit status {code} and no result"

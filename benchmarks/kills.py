"""Kills of export, generation and training at random moments: what was there before stays, or the new is complete.

    python benchmarks/kills.py [--kills 100] [--jobs export generate train] [--seed 0] [--out FILE]

Each job runs once undisturbed, which takes so many seconds of CPU; then it is killed with SIGKILL `--kills` times, each
after a random share of these seconds and up to 0.3 s of waiting. After each kill of `export` and `generate`, the old
result or the new one must be there, complete; after the next undisturbed run, nothing else. A training run is continued
after each kill, from checkpoints of every step; it must never go back, and must end in the bits of a run that nothing
interrupted. The exit status is 1 if anything was violated.

Each run is a child process that is forked with all modules imported. The graphs of `export` are traced once, before:
a run writes them, the reference and all the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe, write_json
from lfdm_export.errors import LfdmExportError

#: Work of a child process; its result is an exit status, or nothing.
Work = Callable[[], object]
#: Seconds that a run waits at most after its share of CPU time, so that moments of waiting for the disk are met too.
_LINGER = 0.3
_LOOK = 0.002
_PICTURE = Path(__file__).resolve().parents[1] / "docs" / "character.png"


@dataclass
class Outcome:
    """What the kills of one job left.

    Attributes:
        counts: kills by what was found after them.
        wrong: what must not be found.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def run(work: Work) -> float:
    """Run work in a child process to its end; returns its seconds of CPU.

    Raises:
        RuntimeError: it failed.
    """
    _, status, used = os.wait4(_begin(work), 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"an undisturbed run ended with status {code}; its last lines are above")
    return used.ru_utime + used.ru_stime


def kill(work: Work, seconds: float, linger: float) -> bool:
    """Kill a child process after so many seconds of CPU and so many of waiting; False if it ended before.

    Raises:
        RuntimeError: it failed.
    """
    process = _begin(work)
    status = _wait_until(process, lambda: cpu_seconds(process) >= seconds)
    if status is None:
        late = time.monotonic() + linger
        status = _wait_until(process, lambda: time.monotonic() >= late)
    if status is None:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with status {code}; its last lines are above")
    return code != 0


def _begin(work: Work) -> int:
    """Fork a child process that does the work, in silence unless it fails; returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        found = work()
        status = found if isinstance(found, int) else 0
    except BaseException:  # noqa: BLE001 (nothing of this process may run the parent's code)
        traceback.print_exc()
    finally:
        os._exit(status)


def _wait_until(process: int, condition: Callable[[], bool]) -> int | None:
    """Wait for a condition; the process's status if it ends before."""
    while not condition():
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(_LOOK)
    return None


def cpu_seconds(process: int) -> float:
    """Seconds of CPU that a process has used, all threads together."""
    # Source: clock_getcpuclockid(3), whose result Linux computes so (linux/posix-timers_types.h, CPUCLOCK_SCHED).
    return time.clock_gettime(~process << 3 | 2)


def kill_writer(
    place: Path, make: Callable[[int], Work], digest: Callable[[Path], str], kills: int, rng: random.Random
) -> Outcome:
    """Kill a run that replaces what is at `place`.

    Args:
        place: a file or a folder, alone in its folder.
        make: returns the work that writes version 0 or 1 of it.
        digest: what tells the versions apart; raises if the content is not complete.
        kills: how many times.
        rng: draws the moments.
    """
    versions: list[str] = []
    found, seconds = Outcome(), 0.0
    for version in (1, 0):
        seconds = max(seconds, run(make(version)))
        versions.insert(0, digest(place))
    if versions[0] == versions[1]:
        found.wrong.append("both versions are equal: nothing can be told")
    there = 0
    for number in range(kills):
        following = 1 - there
        killed = kill(make(following), rng.uniform(0.0, seconds), rng.uniform(0.0, _LINGER))
        try:
            now = versions.index(digest(place))
        except (LfdmExportError, OSError, ValueError) as error:
            found.wrong.append(f"kill {number}: {error}")
            found.counts["neither"] += 1
            run(make(there))
            continue
        found.counts["not killed: it was faster" if not killed else "old" if now == there else "new"] += 1
        there = now
    run(make(1 - there))
    if left := sorted(one.name for one in place.parent.iterdir() if one != place):
        found.wrong.append(f"left after the next run: {left}")
    return found


def export_kills(folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills of an export into a folder where a bundle is."""
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.export import bundle_export
    from lfdm_export.stages import stage_specs
    from lfdm_models.demo import untrained_model

    place, model, frames, size = folder / "bundle", untrained_model(), 2, 32
    specs = stage_specs(bundle_export.geometry_of(model.config, frames, size), with_text=False, with_drive=True)
    graphs = bundle_export.trace_graphs(model, None, specs, frames)

    def make(version: int) -> Work:
        def work() -> None:
            labels = list(model.label_embeddings)[version:]  # what the two versions differ in
            with mock.patch.object(bundle_export, "trace_graphs", return_value=graphs):
                bundle_export.export_bundle(model, place, frames=frames, image_size=size, labels=labels)

        return work

    def digest(place: Path) -> str:
        return ",".join(Bundle.open(place).manifest.labels)  # checks all hashes

    return kill_writer(place, make, digest, kills, rng)


def generate_kills(folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills of `lfdm-generate` over a clip."""
    import lfdm_export.generate.pipeline  # noqa: F401 (imported before the fork)
    from lfdm_export.cli import generate_main

    clip = folder / "clip.gif"

    def make(version: int) -> Work:
        options = ["--image", str(_PICTURE), "--label", "nod", "--steps", "2", "--seed", str(version), "--threads", "1"]
        return lambda: generate_main(["characters", *options, "--out", str(clip), "-q"])

    return kill_writer(clip, make, _sha256, kills, rng)


def train_kills(folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills of one training run, which is continued after each."""
    import torch

    import lfdm_models.training.cli  # noqa: F401 (imported before the fork)
    from lfdm_export.cli import train_main
    from lfdm_models.training.loop import STATE

    lfae, killed, whole, found = folder / "lfae", folder / "killed", folder / "whole", Outcome()
    few = ["--batch-size", "1", "--frames", "2", "--pool", "2", "--threads", "1", "--checkpoint-every", "1", "-q"]
    run(lambda: train_main(["lfae", "--out", str(lfae), "--steps", "1", *few]))

    def work(out: Path, steps: int) -> Work:
        again = ["--resume"] if any(out.glob("*")) else []
        options = ["--lfae", str(lfae / "lfae.pth"), "--out", str(out), "--steps", str(steps), *few, *again]
        return lambda: train_main(["dm", *options])

    steps, state = 2 * kills, killed / STATE
    seconds = 2 * run(work(folder / "first", 2))
    reached = 0
    for number in range(kills):
        if not kill(work(killed, steps), rng.uniform(0.0, seconds), rng.uniform(0.0, _LINGER)):
            found.counts["not killed: it was faster"] += 1
        try:
            now = int(torch.load(state, weights_only=True)["step"]) if state.exists() else 0
        except Exception as error:  # noqa: BLE001 (what is looked for: any kind of damage)
            found.wrong.append(f"kill {number}: the state cannot be read: {error}")
            break
        if now < reached:
            found.wrong.append(f"kill {number}: the run went back from step {reached} to {now}")
        found.counts["no step more" if now == reached else "further"] += 1
        reached = now
    run(work(killed, steps))  # the schedule of rates depends on this number
    run(work(whole, steps))
    if _sha256(killed / "dm.pth") != _sha256(whole / "dm.pth"):
        found.wrong.append(f"after {steps} steps the weights are not those of a run without kills")
    if left := sorted({one.name for one in killed.iterdir()} - {one.name for one in whole.iterdir()}):
        found.wrong.append(f"left in the run's folder: {left}")
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


JOBS: dict[str, Callable[[Path, int, random.Random], Outcome]] = {
    "export": export_kills, "generate": generate_kills, "train": train_kills,
}  # fmt: skip


def main() -> int:
    """Kill, print what was found, write it; 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each job (100)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(1)  # a process with threads cannot be forked
    result: dict[str, object] = {"machine": describe(), "kills": args.kills, "seed": args.seed}
    violated = 0
    for job in args.jobs:
        with tempfile.TemporaryDirectory(prefix="lfdm-kills-") as name:
            found = JOBS[job](Path(name), args.kills, random.Random(f"{job}:{args.seed}"))
        print(f"{job}: {dict(found.counts)}", *(f"VIOLATION {line}" for line in found.wrong), sep="\n", flush=True)
        violated += len(found.wrong)
        result[job] = {"found": dict(found.counts), "violations": found.wrong}
        if args.out:
            write_json(args.out, result)
    return int(violated > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Kills of export, generation and training at random moments: what was there before stays, or the new is complete.

    python benchmarks/kills.py [--kills 100] [--jobs export generate train] [--seed 0]

Each job runs once undisturbed, which takes so many seconds; then it is killed with SIGKILL `--kills` times, each at a
random moment of such a run. After each kill of `export` and `generate`, the old result or the new one must be there,
complete; after the next undisturbed run, nothing else. A training run is continued after each kill, from checkpoints of
every step; it must never go back, and must end in the bits of a run that nothing interrupted. The exit status is 1 if
anything was violated.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lfdm_export.errors import LfdmExportError

_MAIN = "import sys; from lfdm_export import cli; sys.exit(cli.{}_main(sys.argv[1:]))"
#: Exports the small untrained model; the argument after the folder seeds its weights.
_EXPORT = """
import sys
from lfdm_export import export_bundle
from lfdm_models.demo import untrained_model
export_bundle(untrained_model(seed=int(sys.argv[2])), sys.argv[1], frames=2, image_size=32)
"""
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


def run(command: Sequence[str]) -> float:
    """Run a command to its end; returns its seconds.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-1]}: status {done.returncode}: {done.stderr[-1000:]}")
    return time.monotonic() - began


def kill(command: Sequence[str], seconds: float) -> bool:
    """Kill a command after so many seconds; False if it ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"status {process.returncode}: {errors[-1000:]}")
    return process.returncode != 0


def kill_writer(
    place: Path, make: Callable[[int], list[str]], digest: Callable[[Path], str], kills: int, rng: random.Random
) -> Outcome:
    """Kill a command that replaces what is at `place`.

    Args:
        place: a file or a folder, alone in its folder.
        make: the command that writes version 0 or 1 of it.
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
        killed = kill(make(following), rng.uniform(0.0, seconds))
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

    def digest(place: Path) -> str:
        Bundle.open(place)  # checks all hashes
        return _sha256(place / "onnx" / "decode.data")

    return kill_writer(
        folder / "bundle",
        lambda version: [sys.executable, "-c", _EXPORT, str(folder / "bundle"), str(version)],
        digest,
        kills,
        rng,
    )


def generate_kills(folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills of `lfdm-generate` over a clip."""
    clip = folder / "clip.gif"

    def make(version: int) -> list[str]:
        options = ["--image", str(_PICTURE), "--label", "nod", "--steps", "2", "--seed", str(version), "--threads", "1"]
        return [sys.executable, "-c", _MAIN.format("generate"), "characters", *options, "--out", str(clip)]

    return kill_writer(clip, make, _sha256, kills, rng)


def train_kills(folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills of one training run, which is continued after each."""
    import torch

    from lfdm_models.training.loop import STATE

    lfae, killed, whole, found = folder / "lfae", folder / "killed", folder / "whole", Outcome()
    few = ["--batch-size", "1", "--frames", "2", "--pool", "2", "--threads", "1", "--checkpoint-every", "1", "-q"]
    train = [sys.executable, "-c", _MAIN.format("train")]
    run([*train, "lfae", "--out", str(lfae), "--steps", "1", *few])

    def command(out: Path, steps: int) -> list[str]:
        again = ["--resume"] if any(out.glob("*")) else []
        return [*train, "dm", "--lfae", str(lfae / "lfae.pth"), "--out", str(out), "--steps", str(steps), *few, *again]

    steps, state = 2 * kills, killed / STATE
    seconds = run(command(folder / "first", 2)) + 2.0
    reached = 0
    for number in range(kills):
        if not kill(command(killed, steps), rng.uniform(0.0, seconds)):
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
    run(command(killed, steps))  # the schedule of rates depends on this number
    run(command(whole, steps))
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
    """Kill, print what was found; 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each job (100)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    violated = 0
    for job in args.jobs:
        with tempfile.TemporaryDirectory(prefix="lfdm-kills-") as name:
            found = JOBS[job](Path(name), args.kills, random.Random(f"{job}:{args.seed}"))
        print(f"{job}: {dict(found.counts)}", *(f"VIOLATION {line}" for line in found.wrong), sep="\n", flush=True)
        violated += len(found.wrong)
    return int(violated > 0)


if __name__ == "__main__":
    sys.exit(main())

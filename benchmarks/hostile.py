"""Attacks on a real server: hostile requests between valid clips, then a kill of each of its processes under load.

    python benchmarks/hostile.py [--bundle characters] [--requests 2000] [--rounds 2] [--out FILE]

Every 50th request of each sender is a valid clip, which must be equal to the first to the byte. After the requests the
server must be the same process, and its memory and shared memory within 5% of what they were. Then, under load, each
process of the server is killed `--rounds` times: a request in flight must end with its clip or an error, and the server
must serve again within 5 s. The exit status is 1 if anything was violated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from benchmarks.hostile_requests import KINDS, SHARES, TIMEOUT, Doors
from benchmarks.ledger import Ledger
from benchmarks.machine import describe
from benchmarks.served import GUARD, Served, print_logs, serve
from lfdm_export.bundle.reader import Bundle
from lfdm_export.client.wire import infer_request
from lfdm_export.protocol.contract import CLIP_INPUTS, CLIP_MODEL, STREAM_MODEL

#: Hostile requests per valid one, senders, and clients that load the server during kills.
_EVERY, _SENDERS, _CLIENTS = 50, 4, 3
#: Growth of memory that counts as none, and seconds until memory is looked at.
FLAT, _SETTLE = 0.05, 10.0
#: Seconds until a client whose request was refused sends it again.
_PAUSE = 0.1
#: The largest time to serve again, in seconds.
AGAIN = 5.0


class Clips:
    """Requests for one clip, whose answer is known."""

    def __init__(self, doors: Doors, label: str) -> None:
        """Make the clip once, alone."""
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        tensors = {
            "image": image,
            "label": np.array([label.encode()], np.object_),
            "seed": np.array([5], np.int64),
            "steps": np.array([4], np.int32),
        }
        self._request = infer_request(CLIP_MODEL, CLIP_INPUTS, tensors, outputs=("frames",))
        self._stub, self.alone = doors.stub, threading.Lock()
        self.expected = self.frames()

    def frames(self, timeout: float = TIMEOUT) -> bytes:
        """Bytes of the clip's frames.

        Raises:
            grpc.RpcError: the server does not answer with a clip.
        """
        frames: bytes = self._stub.ModelInfer(self._request, timeout=timeout).raw_output_contents[0]
        return frames

    def resembles(self, frames: bytes) -> bool:
        """Whether these are the clip's frames: batches of other sizes round differently, by one level at most."""
        levels = np.frombuffer(frames, np.uint8).astype(np.int16) - np.frombuffer(self.expected, np.uint8)
        return int(np.abs(levels).max()) <= 1


def send_all(doors: Doors, clips: Clips, count: int, record: Ledger) -> None:
    """Send hostile requests from several threads, each with a valid one every `_EVERY`."""

    def send(sender: int) -> None:
        for number in range(sender, count, _SENDERS):
            rng = random.Random(f"hostile:{number}")
            kind = rng.choices(KINDS, SHARES)[0]
            try:
                end = kind(rng, doors)
            except Exception as error:  # noqa: BLE001 (what is looked for)
                end = f"{type(error).__name__}: {error}"
            record.end(f"{kind.__name__} {end.partition(':')[0]}")
            if end not in ("refused", "answered"):
                record.violation(f"request {number}, {kind.__name__}: {end}")
            if (number // _SENDERS) % _EVERY == 0:
                _send_valid(clips, record, number)

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(_SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send_valid(clips: Clips, record: Ledger, number: int) -> None:
    try:
        with clips.alone:  # in a batch of one, as the expected clip
            equal = clips.frames() == clips.expected
    except grpc.RpcError as error:
        record.violation(f"the valid clip after request {number}: {error.code().name}: {error.details()}")
        return
    record.end("valid clip")
    if not equal:
        record.violation(f"the valid clip after request {number} has other bytes")


def measured_memory(served: Served) -> dict[str, Any]:
    """Bytes of the server's processes together, of its shared memory, and of each process, when it is idle."""
    time.sleep(_SETTLE)
    shared = sum(one.stat().st_blocks * 512 for one in Path("/dev/shm").glob(f"lfdm_serve_{served.pid}_*"))
    each = served.memory()
    return {"processes": sum(each.values()), "shared": shared, "each": each}


def attack(served: Served, doors: Doors, clips: Clips, count: int, record: Ledger) -> dict[str, Any]:
    """Send `count` hostile requests after a warm-up of a tenth, and compare memory and processes."""
    send_all(doors, clips, count // 10, Ledger())
    before, processes = measured_memory(served), set(served.processes())
    began = time.monotonic()
    send_all(doors, clips, count, record)
    seconds = time.monotonic() - began
    after = measured_memory(served)
    if set(served.processes()) != processes:
        record.violation(f"processes were replaced: {processes - set(served.processes())} have ended")
    for name in ("processes", "shared"):
        if after[name] > (1 + FLAT) * before[name]:
            record.violation(f"memory ({name}) went from {before[name] / 1e6:.0f} to {after[name] / 1e6:.0f} MB")
    return {"requests": count, "seconds": seconds, "ends": dict(record.ends), "before": before, "after": after}


class Load:
    """Clients that ask for the clip again and again, until the context ends."""

    def __init__(self, clips: Clips, what: str, record: Ledger) -> None:
        """Start them.

        Args:
            clips: what they ask for.
            what: what is done to the server meanwhile, for messages.
            record: for what must not happen.
        """
        self.ends: Counter[str] = Counter()
        self._clips, self._what, self._record, self._stop = clips, what, record, threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(_CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT)
            if thread.is_alive():
                self._record.violation(f"{self._what}: a client never got an answer")

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                right = self._clips.resembles(self._clips.frames())
            except grpc.RpcError as error:
                code = error.code().name
                self.ends[code] += 1
                if code != "UNAVAILABLE":
                    self._record.violation(f"{self._what}: a client got {code}: {error.details()}")
                time.sleep(_PAUSE)
                continue
            self.ends["clip"] += 1
            if not right:
                self._record.violation(f"{self._what}: a clip is wrong")


def kill_each(served: Served, doors: Doors, clips: Clips, rounds: int, record: Ledger) -> list[dict[str, Any]]:
    """Kill each process but `lfdm-serve` itself and its guard under load, and wait until clips come again."""
    names = sorted({name for pid, name in served.processes().items() if pid != served.pid and name != GUARD})
    return [_kill(served, doors, clips, name, record) for _ in range(rounds) for name in names]


def _kill(served: Served, doors: Doors, clips: Clips, name: str, record: Ledger) -> dict[str, Any]:
    what = f"{name} killed"
    with Load(clips, what, record) as load:
        time.sleep(1.0)
        (pid,) = (pid for pid, one in served.processes().items() if one == name)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        again = _until(lambda: _replaced(served, name, pid) and _serves(doors, clips), began)
    if again is None:
        record.violation(f"{what}: it did not serve again within {TIMEOUT:.0f} s")
    elif again > AGAIN:
        record.violation(f"{what}: it took {again:.1f} s until clips came again, expected at most {AGAIN:.0f} s")
    print(f"{what}: serves again after {again} s; clients: {dict(load.ends)}", flush=True)
    return {"killed": name, "seconds": again, "clients": dict(load.ends)}


def _until(condition: Callable[[], bool], began: float) -> float | None:
    """Seconds since `began` until a condition holds; None if it does not."""
    while not condition():
        if time.monotonic() > began + TIMEOUT:
            return None
        time.sleep(0.02)
    return time.monotonic() - began


def _replaced(served: Served, name: str, killed: int) -> bool:
    processes = served.processes()
    return killed not in processes and name in processes.values()


def _serves(doors: Doors, clips: Clips) -> bool:
    """Whether both models are ready, and a clip comes."""
    try:
        for model in (CLIP_MODEL, STREAM_MODEL):
            if not doors.stub.ModelReady(messages.ModelReadyRequest(name=model), timeout=10.0).ready:
                return False
        clips.frames(timeout=10.0)
    except grpc.RpcError:
        return False
    return True


def end_with_parent(served: Served, record: Ledger) -> float | None:
    """Kill `lfdm-serve` itself; returns seconds until none of its processes is left."""
    processes = set(served.processes()) - {served.pid}
    os.kill(served.pid, signal.SIGKILL)
    seconds = _until(lambda: not any(map(_alive, processes)), time.monotonic())
    if seconds is None:
        record.violation(f"lfdm-serve killed: {sum(map(_alive, processes))} processes are left")
    return seconds


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie has no arguments."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def main() -> int:
    """Attack, kill, write the result; 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="characters", help="folder or name of a bundle (characters)")
    parser.add_argument("--requests", type=int, default=2000, help="hostile requests (2000)")
    parser.add_argument("--rounds", type=int, default=2, help="kills of each process (2)")
    parser.add_argument("--threads", type=int, default=1, help="threads per engine (1)")
    parser.add_argument("--slots", type=int, default=4, help="samples that share a step (4)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    bundle, record = Bundle.open(args.bundle), Ledger()
    options = [f"--threads={args.threads}", f"--slots={args.slots}"]
    result: dict[str, Any] = {"machine": describe()}
    with tempfile.TemporaryDirectory(prefix="lfdm-hostile-") as name:
        with serve(bundle.path, Path(name) / "serve.log", options) as served:
            doors = Doors.at(served.http_address, served.address)
            clips = Clips(doors, bundle.manifest.labels[0])
            result["requests"] = attack(served, doors, clips, args.requests, record)
            print(json.dumps(result["requests"], indent=1), flush=True)
            result["kills"] = kill_each(served, doors, clips, args.rounds, record)
            result["seconds_after_kill_of_lfdm_serve"] = end_with_parent(served, record)
            print(f"lfdm-serve killed: no process is left after {result['seconds_after_kill_of_lfdm_serve']} s")
        if record.wrong:
            print_logs(Path(name))
    result["violations"] = record.wrong
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(record.wrong)} violations")
    return int(bool(record.wrong))


if __name__ == "__main__":
    sys.exit(main())

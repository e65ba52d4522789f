"""Fuzzing of untrusted inputs, each opened in a child process with limits.

    python benchmarks/fuzz.py [--minutes N] [--seed N] [--targets picture clip checkpoint bundle request json]
    python benchmarks/fuzz.py --only picture:123

A case depends only on its target and number, so that a failure can be repeated (`--only`). A case passes if it ends
with a result or with an error of this project (`LfdmExportError`). It fails with any other exception, a crash, more
than 10 s, or growth of a child by more than 300 MB; the exit status is then 1. The original inputs are made here.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lfdm_export.errors import LfdmExportError

#: Limits: seconds per case, bytes by which a child may grow, and bytes of its whole address space.
SECONDS, GROWTH, ADDRESSES = 10.0, 300 << 20, 8 << 30
#: Cases per child process.
_ROUND = 200
#: Seconds for a child to import its modules and make its first case.
_IMPORTS = 60.0
_NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**63 - 1)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    "",
    "\x00",
    "\x1b[2J",
    "../../x",
    "x" * 5000,
    [],
    {},
)

Run = Callable[[], object]
Target = Callable[[random.Random, Path], Run]


# --- Mutations ------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to eight changes: flipped, cut, doubled, moved, or numbers at the edge of their range."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        start = rng.randrange(len(found) + 1)
        end = min(len(found), start + rng.choice((1, 2, 4, 16, 256, 4096)))
        match rng.randrange(6):
            case 0 if found:
                found[min(start, len(found) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                number = rng.choice(_NUMBERS) % 2**64
                size, order = rng.choice((1, 2, 4, 8)), rng.choice("<>")
                found[start : start + size] = struct.pack(f"{order}Q", number)[-size if order == ">" else 0 :][:size]
            case 2:
                del found[start:end]
            case 3:
                found[start:start] = found[start:end] * rng.choice((1, 2, 100))
            case 4:
                found[start:end] = rng.randbytes(end - start)
            case _:
                del found[max(1, start) :]
    return bytes(found)


def rearranged(value: Any, rng: random.Random) -> Any:
    """A plain value with one node replaced, removed, or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: rearranged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [*value[:index], rearranged(value[index], rng), *value[index + 1 :]]
    if rng.random() < 0.2:
        deep = value
        for _ in range(rng.choice((1, 10, 250))):  # at most three times, so that JSON can still be written
            deep = [deep]
        return deep
    return rng.choice(_VALUES)


# --- Targets --------------------------------------------------------------------------------------


def picture(rng: random.Random, _folder: Path) -> Run:
    """Encoded pictures as sent by clients."""
    from PIL import Image

    from lfdm_export.pictures.preprocess import prepare_image, read_stream

    size = rng.choice(((8, 8), (64, 48), (1, 300), (300, 300)))
    made, stream = Image.effect_noise(size, 60).convert(rng.choice(("RGB", "L", "P", "1"))), io.BytesIO()
    kind: dict[str, Any] = rng.choice(
        (
            {"format": "JPEG"},
            {"format": "JPEG", "progressive": True},
            {"format": "PNG"},
            {"format": "GIF", "save_all": True, "append_images": [made] * 2},
            {"format": "WebP", "lossless": True},
            {"format": "BMP"},
            {"format": "TIFF", "compression": "tiff_lzw"},
        )
    )
    (made.convert("RGB") if kind["format"] in ("JPEG", "WebP") else made).save(stream, **kind)
    data = damaged(stream.getvalue(), rng)
    return lambda: prepare_image(read_stream(io.BytesIO(data), "picture", most_pixels=40_000_000), 64)


def clip(rng: random.Random, folder: Path) -> Run:
    """Clip files and array files."""
    import numpy as np
    from PIL import Image

    from lfdm_export.pictures.clips import load_clip

    frames = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, (3, 16, 16, 3), np.uint8)
    kind, stream = rng.choice(("gif", "png", "npy", "npz")), io.BytesIO()
    if kind == "npy":
        np.save(stream, frames)
    elif kind == "npz":
        np.savez(stream, frames=frames, fps=8.0)
    else:
        first, *others = map(Image.fromarray, frames)
        first.save(stream, kind.upper(), save_all=True, append_images=others)
    path = folder / f"clip.{kind}"
    path.write_bytes(damaged(stream.getvalue(), rng))
    return lambda: load_clip(path)


def checkpoint(rng: random.Random, folder: Path) -> Run:
    """Weight files of both formats."""
    import torch
    from safetensors.torch import save

    from lfdm_export.checkpoints.load import load_model

    tensors = {f"layer.{index}.weight": torch.arange(24.0).reshape(2, 3, 4) for index in range(3)}
    if rng.random() < 0.3:
        data, ending = save(tensors), "safetensors"
    else:
        stream = io.BytesIO()
        plain = {"generator": tensors, "diffusion": tensors, "epoch": 3, "names": ["a", ("b", 1.5)]}
        torch.save(plain, stream, _use_new_zipfile_serialization=rng.random() < 0.5)
        data, ending = stream.getvalue(), "pth"
    path = folder / f"weights.{ending}"
    path.write_bytes(damaged(data, rng))
    return lambda: load_model(path, path)


def bundle(rng: random.Random, folder: Path) -> Run:
    """The shipped bundle with a changed manifest, or one damaged file."""
    from lfdm_export.bundle.reader import Bundle

    source, target = Bundle.open("characters").path, folder / "bundle"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    path = target / "manifest.json"
    if rng.random() < 0.3:
        path = rng.choice(sorted(one for one in target.rglob("*") if one.is_file() and one.stat().st_size < 1 << 20))
    data = path.read_bytes()
    path.unlink()  # a hard link to the source's file
    if path.name == "manifest.json" and rng.random() < 0.8:
        path.write_text(json.dumps(rearranged(json.loads(data), rng)), encoding="utf-8")
    else:
        path.write_bytes(damaged(data, rng))
    return lambda: Bundle.open(target)


def request(rng: random.Random, _folder: Path) -> Run:
    """gRPC messages, read as by the server's front."""
    from tritonclient.grpc import service_pb2 as messages

    from lfdm_export.serving.front.checks import check_request
    from lfdm_export.serving.front.grpc_messages import parsed
    from lfdm_export.serving.front.inflate import inflated_message

    models, limits = _front()
    good = messages.ModelInferRequest(model_name=rng.choice(("lfdm", "lfdm_stream", "lfdm_sample")), id="mine")
    for name, datatype, shape, content in (
        ("image", "UINT8", [4, 4, 3], bytes(48)),
        ("label", "BYTES", [1], struct.pack("<I", 4) + b"fear"),
        ("steps", "INT32", [1], bytes(4)),
    ):
        sizes = [rng.choice(_NUMBERS) if rng.random() < 0.1 else size for size in shape]
        good.inputs.add(name=name, datatype=datatype, shape=[min(size, 2**63 - 1) for size in sizes])
        good.raw_input_contents.append(content)
    data = damaged(good.SerializeToString(), rng)
    return lambda: check_request(
        models, parsed(messages.ModelInferRequest, inflated_message(data, limits.message_bytes))
    )


def json_request(rng: random.Random, _folder: Path) -> Run:
    """JSON requests, read as by the server's front."""
    from lfdm_export.serving.front.checks import check_request
    from lfdm_export.serving.front.json_requests import read_request

    models, limits = _front()
    good = {
        "id": "mine",
        "parameters": {"timeout": 5, "lfdm_priority": 1, "binary_data_output": True},
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [1, 1, 3], "data": [[[1, 2, 3]]]},
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["fear"]},
            {"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
            {"name": "eta", "datatype": "FP32", "shape": [1], "data": [0.5]},
        ],
        "outputs": [{"name": "frames", "parameters": {"binary_data": True}}],
    }
    for _ in range(rng.randint(0, 3)):
        good = rearranged(good, rng)
    text = json.dumps(good).encode()
    text = damaged(text, rng) if rng.random() < 0.3 else text
    length = len(text) if rng.random() < 0.9 else rng.choice(_NUMBERS)
    return lambda: check_request(models, read_request(models, "lfdm", "", text + bytes(8), length, limits).message)


def _front() -> tuple[Any, Any]:
    """The models as a server reports them, and the limits."""
    from tritonclient.grpc import service_pb2 as messages

    from lfdm_export.protocol.contract import CLIP_INPUTS, CLIP_MODEL, CLIP_OUTPUTS, STREAM_INPUTS, STREAM_MODEL
    from lfdm_export.protocol.requests import Limits
    from lfdm_export.serving.front.checks import models_of
    from lfdm_export.serving.front.limits import FrontLimits

    described = []
    for name, inputs in ((CLIP_MODEL, CLIP_INPUTS), (STREAM_MODEL, STREAM_INPUTS)):
        described.append(messages.ModelMetadataResponse(name=name))
        for spec in inputs:
            shape = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
            described[-1].inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
        for spec in CLIP_OUTPUTS:
            described[-1].outputs.add(name=spec.name, datatype=spec.datatype)
    return models_of(described, Limits()), FrontLimits(Limits())


TARGETS: dict[str, Target] = {
    "picture": picture, "clip": clip, "checkpoint": checkpoint, "bundle": bundle, "request": request,
    "json": json_request,
}  # fmt: skip


# --- The child ------------------------------------------------------------------------------------


def child(target: str, first: int, count: int) -> None:
    """Run cases; print the beginning and the outcome of each."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base = 0
    with tempfile.TemporaryDirectory(prefix="lfdm-fuzz-") as name:
        for number in range(first, first + count):
            run = TARGETS[target](random.Random(f"{target}:{number}"), Path(name))
            base = base or _peak()
            print("begin", number, flush=True)
            print("end", _outcome(run), max(0, _peak() - base), flush=True)


def _outcome(run: Run) -> str:
    try:
        run()
    except LfdmExportError:
        return "refused"
    except Exception as error:  # noqa: BLE001 (what is looked for)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"foreign:{type(error).__name__}:{Path(place.filename).name}:{place.lineno}"
    return "taken"


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- The parent -----------------------------------------------------------------------------------


def cases(command: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Run cases in a child process; yields each number and outcome.

    Args:
        command: command of the child, which prints what `child` prints.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)
    assert process.stdout is not None
    number, patience = -1, _IMPORTS
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(patience):
                    yield number, "hang"
                    return
                word, *rest = process.stdout.readline().split() or [""]
                if word == "begin":
                    number, patience = int(rest[0]), SECONDS
                elif word == "end":
                    patience = _IMPORTS
                    yield number, "grown" if int(rest[1]) > GROWTH else rest[0]
                    if int(rest[1]) > GROWTH:
                        return
                else:
                    break
        if process.wait() != 0:
            yield number, f"crash:{process.returncode}"
    finally:
        process.kill()
        process.wait()


def main() -> int:
    """Run until the time is over; print failed cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="start at case 1000000 x N (0)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="one case, in this process, with its traceback")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]), int(args.child[2]))
        return 0
    if args.only:
        target, _, number = args.only.partition(":")
        with tempfile.TemporaryDirectory(prefix="lfdm-fuzz-") as name:
            print(TARGETS[target](random.Random(args.only), Path(name))())
        return 0
    end = time.monotonic() + 60 * args.minutes
    ends: dict[str, Counter[str]] = {target: Counter() for target in args.targets}
    bad: dict[str, str] = {}
    following = dict.fromkeys(args.targets, 1_000_000 * args.seed)
    while time.monotonic() < end:
        for target in args.targets:
            begun = time.monotonic()
            arguments = ("--child", target, str(following[target]), str(_ROUND))
            for number, outcome in cases((sys.executable, __file__, *arguments)):
                ends[target][outcome.partition(":")[0]] += 1
                following[target] = max(following[target], number) + 1
                if outcome not in ("taken", "refused"):
                    bad.setdefault(f"{target} {outcome}", f"{target}:{number}")
                if time.monotonic() > min(end, begun + 60 * args.minutes / len(args.targets)):
                    break
            if time.monotonic() > end:
                break
    for target, counted in ends.items():
        print(
            f"{target:<11}", ", ".join(f"{outcome} {count}" for outcome, count in sorted(counted.items())) or "not run"
        )
    for what, where in bad.items():
        print(f"BAD {what}: python benchmarks/fuzz.py --only {where}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

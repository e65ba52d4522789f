"""A checkpoint file to named tensors, whatever wrote it; nothing in the file is ever run.

Keys come out flat, as ``generator.first.conv.weight`` or ``diffusion.betas``, without ``module.``.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import safetensors
import torch
from torch import Tensor

from lfdm_export.errors import CheckpointError
from lfdm_export.files.digests import sha256_and_size

#: Top-level entries of checkpoints that hold networks, each a state dict.
PARTS = ("generator", "region_predictor", "bg_predictor", "diffusion")

Format = Literal["torch zip", "torch legacy", "safetensors"]

# The number with which files of torch.save began before they were zip archives, as it is pickled.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# The longest header that the safetensors library accepts.
_MAX_SAFETENSORS_HEADER = 100_000_000
_MEDIA = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a RIFF file (WebP or AVI)",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
}
_COPY_AGAIN = "fetch it again, it was not copied or downloaded whole"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's networks, on the CPU, as stored (any dtype, possibly mapped from the file).

    Args:
        path: a file of ``torch.save`` (zip or legacy) or safetensors; its content decides, not its name.

    Returns:
        Tensor by flat key. Entries at the top level that are neither a tensor nor one of `PARTS` are left out.

    Raises:
        CheckpointError: there is no such file, it is no checkpoint, it is damaged, or it holds objects
            that would have to be run.
    """
    top = _read(path)
    tensors = _flatten(top, path)
    _check_storage(tensors, path)
    return tensors


def read_top(path: Path) -> Mapping[object, object]:
    """The top level of a checkpoint, tensors and plain values as they were stored; nothing of it is checked.

    Args:
        path: see `read_tensors`.

    Returns:
        By key; nothing where the file holds no mapping.

    Raises:
        CheckpointError: see `read_tensors`.
    """
    top = _read(path)
    return top if isinstance(top, Mapping) else {}


def _read(path: Path) -> object:
    kind = _sniff(path)
    try:
        return _read_safetensors(path) if kind == "safetensors" else _read_torch(path, kind)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit in memory, or is damaged") from error
    # The readers raise anything that comes from misreading a damaged or hostile file.
    except Exception as error:
        raise CheckpointError(_reading_failed(path, error)) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return sha256_and_size(path)[0]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def shorten(names: Iterable[str], shown: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _sniff(path: Path) -> Format:
    try:
        if not path.exists():
            raise CheckpointError(f"there is no file {path}; give the path of a checkpoint")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, expected a checkpoint file (.pth or .safetensors)")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; give the path of a checkpoint")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a null character
        raise CheckpointError(f"{str(path)!r} is not a path: {error}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty; {_COPY_AGAIN}")
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]:
        return "torch legacy"
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return "safetensors"
    raise CheckpointError(f"{path} is not a checkpoint but {_guess(head)}")


def _guess(head: bytes) -> str:
    """What a file is that is no checkpoint, and what to do."""
    for magic, name in _MEDIA.items():
        if head.startswith(magic):
            return f"{name}; give a checkpoint file (.pth or .safetensors)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "a Python pickle that torch.save did not write; it could run code when loaded and was not opened; "
            "save the state dicts with torch.save or as safetensors"
        )
    try:
        text = head.decode("utf-8-sig").lstrip().lower()
    except UnicodeDecodeError:
        text = "" if b"\0" in head else head.decode("latin-1").lstrip().lower()
        if not text.startswith("<"):
            return "of an unknown kind; give a file that torch.save wrote, or safetensors"
    if text.startswith(("<!doctype html", "<html", "<head", "<?xml", "<!--")) or "<html" in text:
        return (
            "a web page (HTML): the download gave a page instead of the file; "
            "open the link in a browser, confirm the download and use the file that it gives"
        )
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with: git lfs pull"
    if all(character.isprintable() or character.isspace() for character in text[:-4]):
        return "a text file; give a file that torch.save wrote, or safetensors"
    return "of an unknown kind; give a file that torch.save wrote, or safetensors"


def _read_torch(path: Path, kind: Format) -> object:
    if kind == "torch zip":
        _check_zip(path)
    with (
        warnings.catch_warnings()
    ):  # about the pickle's protocol or old storage classes: nothing that a user can act on
        warnings.simplefilter("ignore")
        # Mapping leaves an optimizer's state, twice the weights, on the disk; only zip archives can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch zip")


def _check_zip(path: Path) -> None:
    """That a zip archive is whole, and laid out as torch.save does it.

    Torch maps the entries without looking at their compression, so a compressed one would give noise.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is truncated or damaged: its end is missing ({error}); {_COPY_AGAIN}") from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(f"{path} is a TorchScript program, expected state dicts saved with torch.save")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip archive without a checkpoint's data.pkl (it holds {shorten(names) or 'nothing'}); "
            "unpack it and give the checkpoint file inside"
        )
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path}: {shorten(packed)} is compressed, which torch.save never does; save the checkpoint again"
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its entries are larger than the file; {_COPY_AGAIN}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, its header alone needs more; {_COPY_AGAIN}"
            )
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes of {needed}; {_COPY_AGAIN}")
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys() if _clean(key)}  # noqa: SIM118 (no mapping)


def _reading_failed(path: Path, error: Exception) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):  # torch's own text is a page, and advises to trust the file
        if blamed := re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", text):
            return (
                f"{path} holds a Python object ({blamed[1]}) that could run code when loaded; it was refused and "
                "nothing was run; where the file was made, save state dicts only (torch.save of module.state_dict()) "
                "or safetensors"
            )
        return (
            f"{path} is truncated or damaged, or its pickle holds more than plain tensors, which is refused; "
            "fetch it again, or save state dicts only, with torch.save's own pickle protocol"
        )
    reason = text.strip().splitlines()[0].split(". ")[0] if text.strip() else type(error).__name__
    return f"{path} is truncated or damaged ({reason[:160]}); {_COPY_AGAIN}"


def _clean(key: str) -> str:
    """A key without the ``module`` that DataParallel puts in, at any depth."""
    return ".".join(part for part in key.split(".") if part != "module")


def _entries(top: Mapping[object, object], path: Path) -> Iterator[tuple[str, Tensor]]:
    for key, value in top.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Tensor):
            yield _clean(key), value.detach()
        elif _clean(key) in PARTS:
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, expected a state dict")
            for name, tensor in value.items():
                if not isinstance(name, str) or not isinstance(tensor, Tensor):
                    found = f"{name!r} is a {type(tensor).__name__}"
                    raise CheckpointError(f"{path}: {key} is no state dict: {found}, expected named tensors only")
                yield _clean(f"{key}.{name}"), tensor.detach()


def _flatten(top: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(top, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(top).__name__}, expected a dict with state dicts named "
            f"{', '.join(PARTS[:3])} (LFAE) or {PARTS[3]} (DM)"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in _entries(top, path):
        if key in tensors:
            raise CheckpointError(f"{path}: {key} is there twice, with and without 'module.'; keep one of them")
        tensors[key] = tensor
    return tensors


def _check_storage(tensors: Mapping[str, Tensor], path: Path) -> None:
    """That the tensors hold what they declare: a few bytes can claim to be a tensor of any size."""
    total = 0
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            found = f"{tensor.layout} on device {tensor.device}"
            raise CheckpointError(f"{path}: {key} is {found}, expected an ordinary dense tensor; save it as one")
        total += tensor.numel() * tensor.element_size()
    size = path.stat().st_size
    if total > 2 * size:  # not 1: a module that several others share is saved once
        raise CheckpointError(
            f"{path} declares {total:,} bytes of weights but holds {size:,}; it is damaged or not to be trusted"
        )

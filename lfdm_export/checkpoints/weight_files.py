"""Read a checkpoint file of any supported format as named tensors; nothing in the file is ever run.

Keys are flat, such as ``generator.first.conv.weight`` or ``diffusion.betas``, without ``module.`` and ``_orig_mod.``.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lfdm_export.errors import CheckpointError
from lfdm_export.files.digests import sha256_and_size
from lfdm_models.paths import LFS_POINTER
from lfdm_models.stored_files import LARGEST_SAFETENSORS_HEADER, LEGACY_MAGIC, ZIP_MAGIC, TorchFile, read_safetensors
from lfdm_models.stored_values import (
    DamagedFileError,
    ForeignObjectError,
    OddTensor,
    Opaque,
    StoredFileError,
    StoredTensor,
)
from lfdm_models.wording import first_line

logger = logging.getLogger(__name__)

#: Top-level entries of checkpoints that hold networks, each a state dict.
PARTS = ("generator", "region_predictor", "bg_predictor", "diffusion")

Format = Literal["torch zip", "torch legacy", "safetensors"]

# Wrappers of networks (DataParallel, torch.compile) add their own name to the keys.
_PREFIXES = ("module", "_orig_mod")
# Names that trainers give to the entry that holds the networks.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "checkpoint")
_MOST_WRAPPERS = 3
_TENSOR_KINDS = (Tensor, StoredTensor, OddTensor)
_MEDIA = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a RIFF file (WebP or AVI)",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"\x89HDF": "an HDF5 file (of Keras or h5py)",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"Rar!": "a RAR archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
}
_COPY_AGAIN = "fetch it again, it was not copied or downloaded whole"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file; its tensors are read when they are needed.

    Attributes:
        path: the file.
        top: its top level: plain values, and tensors as stored. Empty if the file holds no mapping.
        size: size of the file in bytes.
    """

    path: Path
    top: Mapping[Any, object]
    size: int
    _file: TorchFile | None = field(default=None, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the checkpoint's networks, on the CPU, as stored (any dtype, possibly mapped from the file).

        Returns:
            Tensor by flat key. Entries that are neither a tensor nor one of `PARTS` are left out.

        Raises:
            CheckpointError: an entry of the networks is not an ordinary tensor, or the file is damaged.
        """
        stored: dict[str, object] = {}
        for key, value in _entries(_networks(self.top, self.path), self.path):
            if key in stored:
                raise CheckpointError(
                    f"{self.path}: {key} is there twice, with and without 'module.' or '_orig_mod.'; keep one of them"
                )
            stored[key] = value
        # Check before reading: a few bytes can claim to be a tensor of any size.
        declared = sum(_declared(key, value, self.path) for key, value in stored.items())
        if declared > 2 * self.size:  # not 1: a shared module is saved once
            raise CheckpointError(
                f"{self.path} declares {declared:,} bytes of weights but holds {self.size:,}; "
                "it is damaged or not to be trusted"
            )
        return {key: self._tensor(value) for key, value in stored.items()}

    def table(self, value: object, name: str) -> Tensor | None:
        """An entry of the top level as a tensor; None if it is not a tensor.

        Raises:
            CheckpointError: it is not an ordinary tensor, or is larger than the file.
        """
        if not isinstance(value, _TENSOR_KINDS):
            return None
        if _declared(name, value, self.path) > 2 * self.size:
            raise CheckpointError(
                f"{self.path}: {name} declares more bytes than the file's {self.size:,}; "
                "it is damaged or not to be trusted"
            )
        return self._tensor(value)

    def _tensor(self, value: object) -> Tensor:
        if isinstance(value, Tensor):
            return value
        assert isinstance(value, StoredTensor), "checked by _declared"
        assert self._file is not None, "only a TorchFile holds stored tensors"
        with _blaming(self.path):
            return self._file.tensor(value)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the content of a checkpoint file; nothing in it is run.

    Args:
        path: a file of ``torch.save`` (zip or legacy) or safetensors; its content decides, not its name.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint, or it holds objects that could be loaded only
            by running code.
    """
    kind = _sniff(path)
    with _blaming(path):
        if kind == "safetensors":
            return Checkpoint(
                path,
                {key: tensor for key, tensor in read_safetensors(path).items() if _clean(key)},
                path.stat().st_size,
            )
        file = TorchFile(path)
    if not isinstance(file.top, Mapping):
        raise CheckpointError(
            f"{path} holds a {_kind(file.top)}, expected a dict with state dicts named "
            f"{', '.join(PARTS[:3])} (LFAE) or {PARTS[3]} (DM)"
        )
    return Checkpoint(path, file.top, file.size, file)


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn any exception of a reader into an error about this file."""
    try:
        yield
    except CheckpointError:
        raise
    except ForeignObjectError as error:
        raise CheckpointError(
            f"{path} holds a Python object ({error.name}) that could run code when loaded; it was refused and "
            "nothing was run; where the file was made, save state dicts only (torch.save of module.state_dict()) "
            "or safetensors"
        ) from error
    except DamagedFileError as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}; {_COPY_AGAIN}") from error
    except StoredFileError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit in memory, or is damaged") from error
    except (RuntimeError, ValueError, TypeError) as error:  # from torch, if it cannot view the bytes as this type
        raise CheckpointError(f"{path} is truncated or damaged ({first_line(error, 160)}); {_COPY_AGAIN}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return sha256_and_size(path)[0]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def shorten(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and the number of the others."""
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
    if head.startswith(ZIP_MAGIC):
        return "torch zip"
    if head[:1] == b"\x80" and LEGACY_MAGIC in head[:32]:
        return "torch legacy"
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LARGEST_SAFETENSORS_HEADER:
        return "safetensors"
    raise CheckpointError(f"{path} is not a checkpoint but {_guess(head)}")


def _guess(head: bytes) -> str:
    """The kind of a file that is not a checkpoint, and what to do."""
    for magic, name in _MEDIA.items():
        if head.startswith(magic):
            return f"{name}; give a checkpoint file (.pth or .safetensors)"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first (PyTorch 0.1 saved such files too: load it there and save it again)"
    if not head.strip(b"\0"):
        return f"of an unknown kind: it begins with zeros only; {_COPY_AGAIN}"
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
    if text.startswith(LFS_POINTER):
        return "a Git LFS pointer; fetch the file itself with: git lfs pull"
    if all(character.isprintable() or character.isspace() for character in text[:-4]):
        return "a text file; give a file that torch.save wrote, or safetensors"
    return "of an unknown kind; give a file that torch.save wrote, or safetensors"


def _clean(key: str) -> str:
    """A key without the ``module`` of DataParallel and the ``_orig_mod`` of torch.compile, at any depth."""
    return ".".join(part for part in key.split(".") if part not in _PREFIXES)


def _networks(top: Mapping[Any, object], path: Path) -> Mapping[Any, object]:
    """The level of a file that holds the networks: its top, or the entry in which a trainer wrapped them.

    The names of `_WRAPPERS` come first: averaged weights ("ema"), for example, are often stored beside them.
    """
    level = top
    for _ in range(_MOST_WRAPPERS):
        if _holds_networks(level):
            return level
        inner = {name: value for name, value in level.items() if isinstance(name, str) and isinstance(value, Mapping)}
        holding = [name for name, value in inner.items() if _holds_networks(value)]
        holding = [name for name in holding if name in _WRAPPERS] or holding
        if len(holding) > 1:
            raise CheckpointError(f"{path} holds networks under {' and under '.join(holding)}; keep one of them")
        name = next(iter([*holding, *(name for name in _WRAPPERS if name in inner)]), None)
        if name is None:
            return level
        logger.info("%s: taking the networks under %r", path, name)
        level = inner[name]
    return level


def _holds_networks(level: Mapping[Any, object]) -> bool:
    return any(isinstance(key, str) and _clean(key).partition(".")[0] in (*PARTS, "denoise_fn") for key in level)


def _entries(level: Mapping[Any, object], path: Path) -> Iterator[tuple[str, object]]:
    """Every tensor of a level as stored, by its flat key."""
    for key, value in level.items():
        if not isinstance(key, str):
            continue
        if _clean(key) in PARTS:
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{path}: {key} is a {_kind(value)}, expected a state dict")
            for name, tensor in value.items():
                if not isinstance(name, str) or not isinstance(tensor, _TENSOR_KINDS):
                    found = f"{str(name)[:80]!r} is a {_kind(tensor)}"
                    raise CheckpointError(f"{path}: {key} is not a state dict: {found}, expected named tensors only")
                yield _clean(f"{key}.{name}"), tensor
        elif isinstance(value, _TENSOR_KINDS):
            yield _clean(key), value


def _kind(value: object) -> str:
    if isinstance(value, Opaque):
        return value.kind
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__


def _declared(key: str, value: object, path: Path) -> int:
    """Bytes that a tensor claims to have.

    Raises:
        CheckpointError: it is not an ordinary dense tensor, or is empty.
    """
    if isinstance(value, StoredTensor):
        shape, itemsize = value.shape, getattr(torch, value.dtype).itemsize
    elif isinstance(value, Tensor):
        shape, itemsize = tuple(value.shape), value.element_size()
    else:
        raise CheckpointError(f"{path}: {key} is {_kind(value)}, expected an ordinary dense tensor; save it as one")
    if 0 in shape:
        raise CheckpointError(f"{path}: {key} is a tensor of shape {list(shape)}, which holds no number")
    return math.prod(shape) * int(itemsize)

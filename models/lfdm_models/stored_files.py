"""Files of weights from untrusted sources: those of `torch.save`, zip and legacy, and safetensors."""

from __future__ import annotations

import io
import json
import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from lfdm_models.plain_pickle import PlainUnpickler
from lfdm_models.stored_values import DamagedFileError, Storage, StoredFileError, StoredTensor
from lfdm_models.wording import first_line

#: First bytes of every zip archive, and the pickled magic number of older torch.save files.
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
#: A real pickle has some hundred kilobytes.
_LARGEST_PICKLE = 32 << 20
#: Maximum size of a zip archive's list of entries; one entry takes about 70 bytes.
_LARGEST_DIRECTORY = 8 << 20
_LOCAL_HEADER = 30
#: A checkpoint's header has some hundred kilobytes, and every entry becomes an object in memory.
LARGEST_SAFETENSORS_HEADER = 8 << 20


class TorchFile:
    """A file written by `torch.save`; its content is known, but its tensors are not read yet.

    Attributes:
        top: the saved value: plain values, `StoredTensor` and `Opaque`, as from `PlainUnpickler.load`.
        size: size of the file in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Read the file's structure; nothing in it is run, and its tensors stay on the disk.

        Raises:
            ForeignObjectError: it holds an object that is not a plain value.
            StoredFileError: it is damaged, or not a torch.save file.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            head = file.read(len(ZIP_MAGIC))
            file.seek(0)
            self.size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if self.size == 0:
                raise StoredFileError("it is empty")
            # Copy-on-write: callers may write to a tensor, and the file does not change.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.top, self._places = _read_zip(file) if head == ZIP_MAGIC else _read_legacy(file, self.size)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A stored tensor on the CPU, mapped from the file.

        Raises:
            StoredFileError: it extends beyond its storage, or beyond the file.
        """
        dtype: torch.dtype = getattr(torch, stored.dtype)
        start, size = self._places.get(stored.storage.key, (0, 0))
        count = size // dtype.itemsize
        filled = all(stored.shape)
        reach = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
        if filled and reach >= count:
            raise DamagedFileError("a tensor reaches beyond what is stored of it")
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
        return flat.as_strided(stored.shape, stored.strides, stored.offset if filled else 0)


class _BoundedReads(io.FileIO):
    """A file in which no single read exceeds `most` bytes: zipfile reads the list of entries at once."""

    most = _LARGEST_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        position = self.tell()
        left = self.seek(0, io.SEEK_END) - position
        self.seek(position)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self.most:
            raise StoredFileError("its list of entries is larger than any checkpoint's")
        return super().read(wanted)


def _read_zip(file: BinaryIO) -> tuple[object, Mapping[str, tuple[int, int]]]:
    """The saved value, and the position and size in bytes of each storage."""
    with _BoundedReads(file.fileno(), closefd=False) as raw:
        return _read_archive(raw)


def _read_archive(file: _BoundedReads) -> tuple[object, Mapping[str, tuple[int, int]]]:
    try:
        with zipfile.ZipFile(file) as archive:
            file.most = _LARGEST_PICKLE
            entries = {entry.filename: entry for entry in archive.infolist()}
            name = _pickle_name(entries, file.seek(0, io.SEEK_END))
            prefix = name.removesuffix("data.pkl")
            _check_byte_order(archive, entries.get(f"{prefix}byteorder"))
            reader = PlainUnpickler()
            top = reader.load(io.BytesIO(archive.read(name)))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, UnicodeError) as error:
        raise DamagedFileError(f"its end is missing or its list of entries is damaged ({error})") from error
    places = {}
    for key, storage in reader.storages.items():
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None or entry.file_size < _bytes(storage):
            raise DamagedFileError(f"the storage {key} is missing or too short")
        places[key] = (_content_start(file, entry), entry.file_size)
    return top, places


def _pickle_name(entries: Mapping[str, zipfile.ZipInfo], size: int) -> str:
    """Name of the entry with the saved value, in an archive with the layout of torch.save."""
    name = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
    if any(other.endswith("/constants.pkl") or "/code/" in other for other in entries):
        raise StoredFileError("it is a TorchScript program, expected state dicts saved with torch.save")
    if name is None:
        shown = ", ".join(list(entries)[:3]) or "nothing"
        raise StoredFileError(
            f"it is a zip archive without a checkpoint's data.pkl (it holds {shown}); "
            "unpack it and give the checkpoint file inside"
        )
    for other, entry in entries.items():
        # Its bytes are mapped without decompression.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise StoredFileError(
                f"{other} is compressed, which torch.save never does, or encrypted; save the checkpoint again"
            )
    if sum(entry.file_size for entry in entries.values()) > size:
        raise DamagedFileError("its entries are larger than the file")
    if entries[name].file_size > _LARGEST_PICKLE:
        raise StoredFileError(f"its data.pkl has {entries[name].file_size} bytes, more than any checkpoint's")
    return name


def _check_byte_order(archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None) -> None:
    if entry is not None and (entry.file_size > 16 or archive.read(entry) != b"little"):
        raise StoredFileError("its numbers are big-endian; save it again on a little-endian machine (x86, ARM)")


def _content_start(file: io.FileIO, entry: zipfile.ZipInfo) -> int:
    """Position of an entry's bytes: after its local header, whose padding differs from that in the list."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(ZIP_MAGIC):
        raise DamagedFileError(f"{entry.filename} is not where the list of entries says")
    start = entry.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    if start + entry.file_size > file.seek(0, io.SEEK_END):
        raise DamagedFileError(f"{entry.filename} reaches beyond the end of the file")
    return start


def _read_legacy(file: BinaryIO, size: int) -> tuple[object, Mapping[str, tuple[int, int]]]:
    """Like `_read_zip`: five pickles, then each storage after its number of elements."""
    pickles = io.BytesIO(file.read(_LARGEST_PICKLE))
    reader = PlainUnpickler()
    for _ in ("magic number", "version"):
        PlainUnpickler().load(pickles)
    system = PlainUnpickler().load(pickles)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise StoredFileError("its numbers are big-endian; save it again on a little-endian machine (x86, ARM)")
    top, keys = reader.load(pickles), PlainUnpickler().load(pickles)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise DamagedFileError("its list of storages is damaged")
    places, position = {}, pickles.tell()
    for key in keys:
        storage = reader.storages.get(key)
        file.seek(position)
        count = int.from_bytes(file.read(8), "little", signed=True)
        if storage is None or count != storage.count or position + 8 + _bytes(storage) > size:
            raise DamagedFileError(f"the storage {key} is missing or too short")
        places[key] = (position + 8, _bytes(storage))
        position += 8 + _bytes(storage)
    missing = next((key for key in reader.storages if key not in places), None)
    if missing is not None:
        raise DamagedFileError(f"the storage {missing} is missing")
    return top, places


def _bytes(storage: Storage) -> int:
    # For a type that no tensor here has (such as quantized numbers), the tensors are not read either.
    dtype = getattr(torch, storage.dtype, None)
    return storage.count * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped, by name.

    Raises:
        StoredFileError: it is truncated, or its header is invalid.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise DamagedFileError(f"it has {size} bytes, its header alone needs more")
        if length > LARGEST_SAFETENSORS_HEADER:
            raise StoredFileError(f"its header has {length} bytes, more than any checkpoint's")
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
        if size < needed:
            raise DamagedFileError(f"it has {size} bytes of {needed}")
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (StoredFileError, OSError):
        raise
    except Exception as error:  # from json, from a header of another type, and from the library
        reason = first_line(error, 160).split(". ")[0]
        raise DamagedFileError(f"its header is damaged ({reason})") from error

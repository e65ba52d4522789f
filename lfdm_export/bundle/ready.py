"""The shipped model's bundle, included in the package so that clips can be made without PyTorch and ONNX.

It is an archive of 1.3 MB beside the model's weights. The archive contains the graphs, and those bytes of the graphs'
weights (9 MB) that the model's own files lack: most tensors of a graph are byte ranges of these files. The bundle is
assembled in the user's cache folder on first use; `Bundle.open` checks the SHA-256 of every file.

To rebuild the archive after the shipped model or its graphs have changed:
``lfdm-export --without-drive --no-verify --out fresh && python -m lfdm_export.bundle.ready fresh``.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import lfdm_models
from lfdm_export.errors import BundleError
from lfdm_export.files.atomic import temporary_folder
from lfdm_export.files.folders import publish
from lfdm_export.machine import CACHE_NAME, user_cache

#: Its name for commands and `Pipeline`.
NAME = "characters"
#: The shipped model's folder, and the archive inside it.
MODEL = Path(lfdm_models.__file__).parent / "weights" / "characters64"
ARCHIVE = MODEL / "bundle.zip"
#: The model's files from which byte ranges are copied.
SOURCES = ("dm.safetensors", "lfae.safetensors")

# Suffixes of a weight file's two entries in the archive: its list of ranges, and the bytes found in no source.
_RECIPE, _REST = ".recipe.json", ".rest"
_LITERAL = ""
# Ranges are found by their first _BLOCK bytes, at multiples of _BLOCK in a source.
_BLOCK = 64


def unpack(*, rebuild: bool = False) -> Path:
    """The bundle's folder in the user's cache, assembled if missing.

    Args:
        rebuild: assemble it even if it exists, because it is damaged.

    Raises:
        BundleError: the cache folder cannot be written, or the package's files are damaged.
    """
    content = _read(ARCHIVE)
    target = _cache() / f"{NAME}-{hashlib.sha256(content).hexdigest()[:16]}"
    if target.is_dir() and not rebuild:
        return target
    try:
        with temporary_folder(target) as part:
            for name, data in files_of(content, {source: _read(MODEL / source) for source in SOURCES}).items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(data)
            publish(part, target, replace=rebuild)  # else a folder that another process made first stays
    except OSError as error:
        raise BundleError(
            f"the shipped bundle {NAME!r} cannot be put together in {target.parent}: {error.strerror or error}; "
            "let XDG_CACHE_HOME name a folder that can be written"
        ) from error
    return target


def files_of(content: bytes, sources: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files of the bundle by name, assembled from the archive and the model's files.

    Raises:
        BundleError: the archive is damaged, or for another model.
    """
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                if name.endswith(_RECIPE):
                    whole = name.removesuffix(_RECIPE)
                    every = {**sources, _LITERAL: archive.read(whole + _REST)}
                    ranges = json.loads(archive.read(name))
                    files[whole] = b"".join(every[source][at : at + size] for source, at, size in ranges)
                elif not name.endswith(_REST):
                    files[name] = archive.read(name)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{ARCHIVE} is damaged ({error}); install lfdm-export again") from error
    return files


def pack(bundle: Path, sources: Mapping[str, bytes]) -> bytes:
    """The archive for a bundle of the shipped model; equal bundles give equal bytes."""
    listed = json.loads((bundle / "manifest.json").read_bytes())["files"]
    known = _blocks(sources)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:

        def add(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)

        for name in ("manifest.json", *sorted(listed)):
            data = (bundle / name).read_bytes()
            if not name.endswith(".data"):
                add(name, data)
                continue
            ranges, rest = _ranges(data, sources, known)
            add(name + _RECIPE, json.dumps(ranges, separators=(",", ":")).encode())
            add(name + _REST, rest)
    return packed.getvalue()


def _blocks(sources: Mapping[str, bytes]) -> dict[bytes, tuple[str, int]]:
    """Source and offset of each block of the sources."""
    return {
        data[at : at + _BLOCK]: (source, at)
        for source, data in sources.items()
        for at in range(0, len(data) - _BLOCK + 1, _BLOCK)
    }


def _ranges(
    data: bytes, sources: Mapping[str, bytes], known: Mapping[bytes, tuple[str, int]]
) -> tuple[list[tuple[str, int, int]], bytes]:
    """A file as ranges (source, offset, size) of the sources and of the rest, and that rest."""
    found: list[tuple[str, int, int]] = []
    rest = bytearray()
    at = begin = 0  # bytes from `begin` to `at` are in no source
    while at < len(data):
        source, there = known.get(data[at : at + _BLOCK], (_LITERAL, 0))
        if source == _LITERAL:
            at += 4  # a weight has 4 bytes
            continue
        content = sources[source]
        while at > begin and there > 0 and data[at - 1] == content[there - 1]:
            at, there = at - 1, there - 1
        size = _BLOCK
        while data[at + size : at + 2 * size] == content[there + size : there + 2 * size] and at + size < len(data):
            size = min(2 * size, len(data) - at)
        while at + size < len(data) and data[at + size : at + size + 1] == content[there + size : there + size + 1]:
            size += 1
        if at > begin:
            found.append((_LITERAL, len(rest), at - begin))
            rest += data[begin:at]
        found.append((source, there, size))
        at = begin = at + size
    if len(data) > begin:
        found.append((_LITERAL, len(rest), len(data) - begin))
        rest += data[begin:]
    return found, bytes(rest)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); install lfdm-export again") from error


def _cache() -> Path:
    cache = user_cache()
    if cache is None:
        raise BundleError(
            f"there is no home to put the shipped bundle {NAME!r} together in; let XDG_CACHE_HOME name a folder that "
            "can be written"
        )
    return cache / CACHE_NAME / "bundles"


if __name__ == "__main__":
    ARCHIVE.write_bytes(pack(Path(sys.argv[1]), {source: _read(MODEL / source) for source in SOURCES}))

"""Writes a bundle atomically, and never replaces anything but a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import (
    EMBEDDINGS,
    LABEL_ROWS,
    MANIFEST,
    NULL_ROW,
    ONNX_FOLDER,
    PARITY_FOLDER,
    PLANS_FOLDER,
    REFERENCE,
    Bundle,
    fingerprint,
    read_manifest,
)
from lfdm_export.errors import BundleError, InputError
from lfdm_export.files.atomic import locked, temporary_folder, write_file
from lfdm_export.files.folders import publish, settle
from lfdm_export.files.names import require_utf8
from lfdm_export.files.places import destination
from lfdm_export.sampling.tuned import TunedSampler

if TYPE_CHECKING:
    from lfdm_export.reference.stored import Reference

_log = logging.getLogger(__name__)

# Folders that may be written into a bundle later and are not part of it.
_LATER = (f"{PARITY_FOLDER}/", f"{PLANS_FOLDER}/")
# Kept when a bundle is replaced.
_CARRIED = (PLANS_FOLDER,)


class BundleWriter:
    """Builds a bundle in a temporary folder beside the target, and moves it to the target when complete.

    Leftovers of killed exports beside the target are removed. Leaving the context without `finish` (an exception,
    Ctrl-C, a full disk) leaves no trace, and an existing bundle at the target unchanged. A target that contains
    anything but a bundle is refused.

    Examples:
        >>> with BundleWriter("mug") as writer:
        ...     export_graphs(writer.folder / "onnx")
        ...     writer.write_embeddings(embeddings, null)
        ...     bundle = writer.finish(manifest)
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        """Set the bundle's folder; nothing is written yet.

        Raises:
            BundleError: the path cannot be resolved.
            InputError: the path is not UTF-8.
        """
        try:
            # Links are resolved, so that a link to a folder stays and its target is replaced.
            self.target = destination(target).path
        except OSError as error:
            raise BundleError(f"cannot write to {target}: {error.strerror or error}") from error
        if not self.target.name:
            raise BundleError(f"{target} is the root of the file system; choose another place for the bundle")
        require_utf8(self.target, "ONNX Runtime")
        self._context = contextlib.ExitStack()

    def __enter__(self) -> BundleWriter:
        """Create the temporary folder.

        Raises:
            BundleError: the target is not a bundle, or its parent is not writable.
        """
        try:
            with locked(self.target.parent):
                settle(self.target, carry=_CARRIED)
                _require_replaceable(self.target)
            self.folder = self._context.enter_context(temporary_folder(self.target))
            (self.folder / ONNX_FOLDER).mkdir()
        except OSError as error:
            self._context.close()
            raise BundleError(f"cannot write to {self.target.parent}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary folder, including the bundle that `finish` replaced."""
        self._context.__exit__(kind, error, trace)
        if self.folder.exists():
            _log.warning("the replaced bundle could not be deleted completely; remove %s", self.folder)

    def write_embeddings(self, embeddings: ArrayLike, null: ArrayLike) -> None:
        """Write the table of label embeddings.

        Args:
            embeddings: (labels, text_width), in the order of the manifest's labels.
            null: (text_width,), the null embedding.

        Raises:
            InputError: a shape is wrong, or a value is not finite.
        """
        rows = {LABEL_ROWS: np.asarray(embeddings, np.float32), NULL_ROW: np.asarray(null, np.float32)}
        if rows[LABEL_ROWS].ndim != 2 or rows[LABEL_ROWS].shape[1:] != rows[NULL_ROW].shape:
            shapes = " and ".join(str(array.shape) for array in rows.values())
            raise InputError(f"label and null embeddings have shapes {shapes}, expected (N, width) and (width,)")
        if not all(np.isfinite(array).all() for array in rows.values()):
            raise InputError("the label embeddings hold values that are not finite; make them again")
        with (self.folder / EMBEDDINGS).open("wb") as file:
            np.savez(file, **rows)  # type: ignore[arg-type]  # numpy's stub takes the arrays for `allow_pickle`

    def write_reference(self, reference: Reference) -> None:
        """Write PyTorch's outputs, so that the bundle can be verified without PyTorch and the checkpoints."""
        reference.save(self.folder / REFERENCE)

    def finish(self, manifest: Manifest) -> Bundle:
        """Hash all files, write the manifest last, and move the folder to the target in one step.

        The plans of a replaced bundle move into the new one: each records its graph, and is used only if it matches.

        Args:
            manifest: the manifest; its ``files`` are filled in here.

        Raises:
            BundleError: a file that the manifest requires was not written, the disk is full, or the target is no
                longer a bundle.
        """
        try:
            files = {name: fingerprint(self.folder / name) for name in _list_files(self.folder)}
            whole = dataclasses.replace(manifest, files=dict(sorted(files.items())))
            with (self.folder / MANIFEST).open("x", encoding="utf-8", newline="\n") as file:
                file.write(whole.to_json())
            Bundle.open(self.folder, check_hashes=False)
            check = functools.partial(_require_replaceable, self.target)
            publish(self.folder, self.target, carry=_CARRIED, check=check)
            return Bundle.open(self.target, check_hashes=False)
        except OSError as error:
            raise BundleError(f"cannot write the bundle {self.target}: {error.strerror or error}") from error


def store_tuned(bundle: Bundle, tuned: TunedSampler) -> Bundle:
    """Write a tuned sampler into a bundle's manifest, atomically; stored tables for other numbers of steps stay.

    Returns:
        The bundle, reopened.

    Raises:
        BundleError: the sampler was learned for other weights, or the manifest cannot be written.
    """
    try:
        with locked(bundle.path):
            manifest = read_manifest(bundle.path)
            kept = manifest.tuned
            if kept is not None and kept.guidance_scale == tuned.guidance_scale:
                tuned = dataclasses.replace(tuned, tables=kept.with_tables(tuned.tables))
            whole = dataclasses.replace(manifest, tuned=tuned)
            write_file(bundle.path / MANIFEST, whole.to_json().encode())
    except ValueError as error:
        raise BundleError(str(error)) from error
    except OSError as error:
        raise BundleError(f"cannot write to {bundle.path}: {error.strerror or error}") from error
    return Bundle.open(bundle.path, check_hashes=False)


def _list_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files but the manifest, the parity report and the plans."""
    names = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()
    )
    return sorted(name for name in names if name != MANIFEST and not name.startswith(_LATER))


def _require_replaceable(target: Path) -> None:
    """Refuse a target whose replacement would delete a file that no export wrote.

    Raises:
        BundleError: the target is a file, a folder that is not a bundle, or a bundle with other files in it.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file; choose another place for the bundle")
    if not any(target.iterdir()):
        return
    advice = "choose another place for the bundle, or remove it yourself"
    try:
        manifest = read_manifest(target)
    except BundleError as error:
        raise BundleError(f"{target} exists and is not a bundle that could be replaced ({error}); {advice}") from error
    foreign = [name for name in _list_files(target) if name not in manifest.files]
    if foreign:
        raise BundleError(f"{target} holds files that are not part of the bundle, such as {foreign[0]}; {advice}")

"""Reads and checks the exported folder; `lfdm_export.bundle.writer` writes it.

Layout::

    BUNDLE/manifest.json       see `lfdm_export.bundle.manifest`
    BUNDLE/onnx/STAGE.onnx     graphs, with external data beside them (*.data)
    BUNDLE/embeddings.npz      the label embeddings and the null embedding
    BUNDLE/reference.npz       PyTorch's outputs, for verification; optional
    BUNDLE/tokenizer/          only with a text encoder
    BUNDLE/torch/              weights for PyTorch; only if exported for the target torch
    BUNDLE/parity/             the verification report; may be written later, not hashed
    BUNDLE/plans/              TensorRT's plans; may be written later, not hashed
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle import ready as ready_bundle
from lfdm_export.bundle.hub import CARD_CLIP, HubName, fetch, publish
from lfdm_export.bundle.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from lfdm_export.bundle.model_card import model_card
from lfdm_export.errors import BundleError, EngineError, InputError
from lfdm_export.files.arrays import read_arrays
from lfdm_export.files.digests import is_lfs_pointer, sha256_and_size
from lfdm_export.files.folders import give_back
from lfdm_export.files.names import user_path
from lfdm_export.graphs.file import check_external, read_graph
from lfdm_export.pictures.clip import Clip
from lfdm_export.stages import DRIVE_STAGE, StageSpec

MANIFEST = "manifest.json"
EMBEDDINGS = "embeddings.npz"
REFERENCE = "reference.npz"
ONNX_FOLDER = "onnx"
TOKENIZER_FOLDER = "tokenizer"
TORCH_WEIGHTS = "torch/weights.safetensors"
PARITY_FOLDER = "parity"
PLANS_FOLDER = "plans"
# Arrays of EMBEDDINGS.
LABEL_ROWS, NULL_ROW = "embeddings", "null"

logger = logging.getLogger(__name__)

# In huggingface_hub's cache, models--…/snapshots/REVISION contains links to models--…/blobs.
_HUB_SNAPSHOTS, _HUB_BLOBS = "snapshots", "blobs"
Float32 = NDArray[np.float32]


def onnx_path(stage: str) -> str:
    """Path of a stage's graph inside a bundle."""
    return f"{ONNX_FOLDER}/{stage}.onnx"


@dataclass(frozen=True, eq=False, repr=False)
class Bundle:
    """A bundle on disk whose manifest and files have been checked.

    Attributes:
        path: its folder.
        manifest: its manifest.
        embeddings: (labels, text_width) float32, in the order of ``manifest.labels``.
        null_embedding: (text_width,) float32, the embedding for "no label".
    """

    path: Path
    manifest: Manifest
    embeddings: Float32
    null_embedding: Float32
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check_hashes: bool = True) -> Bundle:
        """Open a bundle; a bundle that a killed export had renamed is restored first.

        Args:
            path: its folder; or, if there is no such folder, "characters" for the shipped model's bundle, or
                ``org/name`` or ``org/name@revision`` for a bundle on the Hugging Face hub (see `from_pretrained`).
            check_hashes: read every file and compare its SHA-256; else only presence and size are checked.

        Raises:
            BundleError: there is no bundle, or it is incomplete, altered, or has another format version.
        """
        try:
            if os.fspath(path) == ready_bundle.NAME:
                if not Path(path).exists():
                    return cls._open_ready(check_hashes=check_hashes)
                logger.warning("%s is the folder here, not the shipped bundle of that name", path)
            name = HubName.find(path)
            if name is not None:
                return cls._fetched(name, check_hashes=check_hashes)
            return cls._open(user_path(path), check_hashes=check_hashes)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0][:200]
            raise BundleError(f"the bundle {str(path)[:200]!a} cannot be opened: {reason}") from error

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None) -> Bundle:
        """Open a bundle on the Hugging Face hub; files in this machine's cache are not downloaded again.

        Every file is compared with the manifest. Without a connection, or with HF_HUB_OFFLINE=1, the copy in the hub's
        cache is used. A private repository needs a token (`hf auth login`, or HF_TOKEN).

        Args:
            name: ``org/name``.
            revision: a branch, a tag or a commit; None for the newest of the main branch.

        Raises:
            InputError: the name or the revision is not a valid name on the hub.
            BundleError: there is no such bundle, no access to it, no connection and no copy, or it is incomplete.
            MissingDependencyError: huggingface_hub is not installed.
        """
        return cls._fetched(HubName(name, revision), check_hashes=True)

    def push_to_hub(
        self,
        name: str,
        *,
        revision: str | None = None,
        clip: Clip | None = None,
        private: bool = False,
        message: str | None = None,
    ) -> str:
        """Publish the bundle in a repository of the Hugging Face hub, with a generated model card.

        Its files are compared with the manifest first. Everything is one commit, which also deletes the files of an
        earlier bundle. Plans are not published: they are for one machine.

        Args:
            name: ``org/name``; the repository is created if missing.
            revision: a branch, created if missing; None for the main branch.
            clip: a clip of the model, whose first sample the card shows.
            private: make a new repository private.
            message: commit message; None for one that names the bundle.

        Returns:
            The URL of the commit.

        Raises:
            InputError: the name or the revision is not a valid name on the hub.
            BundleError: the bundle is no longer intact, or the hub refuses the commit.
            MissingDependencyError: huggingface_hub is not installed.
        """
        target = HubName(name, revision)
        whole = Bundle._open(self.path, check_hashes=True)
        words = "" if clip is None or clip.labels is None else clip.labels[0]
        card = model_card(whole.manifest, whole.path, name, clip=None if clip is None else CARD_CLIP, clip_words=words)
        text = message or f"Bundle {whole.manifest.bundle_id[:12]} ({whole.manifest.summary()})"
        return publish(
            whole.path, (MANIFEST, *whole.manifest.files), target, card=card, clip=clip, private=private, message=text
        )

    @classmethod
    def _fetched(cls, name: HubName, *, check_hashes: bool) -> Bundle:
        folder = fetch(name, MANIFEST, lambda folder: read_manifest(folder).files)
        try:
            return cls._open(folder, check_hashes=check_hashes)
        except BundleError as error:
            raise BundleError(
                f"{name} from the hub: {str(error).removesuffix('; export again')}; if only this machine's "
                f"copy is damaged, remove {folder.parent.parent} and fetch it again"
            ) from error

    @classmethod
    def _open_ready(cls, *, check_hashes: bool) -> Bundle:
        try:
            return cls._open(ready_bundle.unpack(), check_hashes=check_hashes)
        except BundleError as error:
            logger.info("assembled again: %s", error)
            return cls._open(ready_bundle.unpack(rebuild=True), check_hashes=check_hashes)

    @classmethod
    def _open(cls, folder: Path, *, check_hashes: bool) -> Bundle:
        if not folder.exists() and not give_back(folder.resolve()):
            raise BundleError(f"there is no bundle at {folder}: no such folder; make one with lfdm-export")
        if not folder.is_dir():
            raise BundleError(f"{folder} is a file, expected the folder that lfdm-export wrote")
        manifest = read_manifest(folder)
        for name in _required_files(manifest):
            if name not in manifest.files:
                raise BundleError(f"{folder}: the manifest does not list {name}, which it must; export again")
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry, check_hash=check_hashes)
        if check_hashes:  # else checked when a stage is first used
            for spec in manifest.stages:
                _check_graph(folder, spec.name, manifest)
        embeddings, null = _read_embeddings(folder / EMBEDDINGS, len(manifest.labels), manifest.geometry.text_width)
        checked = {spec.name for spec in manifest.stages} if check_hashes else set()
        return cls(folder, manifest, embeddings, null, checked)

    def __repr__(self) -> str:
        return f"<Bundle {str(self.path)!r}: {self.manifest.summary()}>"

    @property
    def name(self) -> str:
        """Name of its folder, or ``org/name`` if it is in the cache of the Hugging Face hub."""
        folder = self.path.resolve()
        blobs = _hub_blobs(folder)
        return folder.name if blobs is None else blobs.parent.name.removeprefix("models--").replace("--", "/")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that have an embedding."""
        return self.manifest.labels

    @property
    def stages(self) -> dict[str, StageSpec]:
        """All stages by name, in the order in which a clip passes through them."""
        return {spec.name: spec for spec in self.manifest.stages}

    def stage_path(self, stage: str) -> Path:
        """Path of a stage's graph.

        Raises:
            BundleError: the bundle has no such stage, or its graph reads a file that the manifest does not list.
        """
        if stage not in self.stages:
            raise BundleError(f"{self.path} has no stage {stage!r}; it has {', '.join(self.stages)}")
        if stage not in self._checked:
            _check_graph(self.path, stage, self.manifest)
            self._checked.add(stage)
        return self.path / onnx_path(stage)

    def require_drive(self, purpose: str) -> None:
        """Check that the bundle has the stage `estimate_motion`.

        Args:
            purpose: what needs the stage, for the message.

        Raises:
            InputError: the bundle was exported without it.
        """
        if not self.manifest.has_drive:
            raise InputError(
                f"{self.path} was exported without the stage {DRIVE_STAGE!r}, which {purpose} needs; give a bundle "
                "that lfdm-export wrote without --without-drive"
            )

    @property
    def reference_path(self) -> Path | None:
        """File of PyTorch's outputs at export (`lfdm_export.reference.stored.Reference`); None if there is none."""
        return self.path / REFERENCE if REFERENCE in self.manifest.files else None

    def label_index(self, label: str) -> int:
        """Row of a label; case and surrounding spaces are ignored.

        Raises:
            InputError: the label is unknown.
        """
        folded = {known.strip().casefold(): index for index, known in enumerate(self.labels)}
        index = folded.get(label.strip().casefold())
        if index is not None:
            return index
        if not self.labels:
            raise InputError(
                f"unknown label {label!r}: this bundle was exported without labels; export it again with labels and "
                "its model's text encoder (--dataset, or --labels and --text-encoder), or give a text embedding"
            )
        near = difflib.get_close_matches(label.strip().casefold(), folded, n=1)
        hint = f"did you mean {self.labels[folded[near[0]]]!r}? " if near else ""
        raise InputError(f"unknown label {label!r}: {hint}known are {', '.join(self.labels)}")

    def embedding(self, label: str) -> Float32:
        """Text embedding (text_width,) float32 of a label; case and surrounding spaces are ignored.

        Raises:
            InputError: the label is unknown.
        """
        row: Float32 = self.embeddings[self.label_index(label)]
        return row


def _required_files(manifest: Manifest) -> list[str]:
    return [EMBEDDINGS, *(onnx_path(spec.name) for spec in manifest.stages)]


def fingerprint(path: Path) -> FileEntry:
    """SHA-256 and size of a file."""
    return FileEntry(*sha256_and_size(path))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, without a check of the files.

    Raises:
        BundleError: there is no manifest, or it is invalid.
    """
    path = folder / MANIFEST
    _require_inside(folder, MANIFEST)
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with lfdm-export")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than any manifest; it is not one of a bundle")
    if is_lfs_pointer(path):
        raise BundleError(f"{path} is a Git LFS pointer; fetch the files themselves with: git lfs pull")
    try:
        return Manifest.from_json(text)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_graph(folder: Path, stage: str, manifest: Manifest) -> None:
    """Check that the manifest lists every file that a stage's graph reads."""
    prefix = f"{ONNX_FOLDER}/"
    inside = {name: entry.bytes for name, entry in manifest.files.items() if name.startswith(prefix)}
    path = folder / onnx_path(stage)
    try:
        check_external(read_graph(path), path, {name.removeprefix(prefix): size for name, size in inside.items()})
    except EngineError as error:
        raise BundleError(str(error)) from error


def _hub_blobs(folder: Path) -> Path | None:
    """If the folder is a snapshot in the Hugging Face hub's cache, the folder that its links point to."""
    for parent in folder.parents:
        if parent.name == _HUB_SNAPSHOTS:
            return parent.parent / _HUB_BLOBS
    return None


def _require_inside(folder: Path, name: str) -> None:
    real, home = (folder / name).resolve(), folder.resolve()
    blobs = _hub_blobs(home)
    if not real.is_relative_to(home) and not (blobs is not None and real.parent == blobs):
        raise BundleError(f"{folder}: {name} is a link that leads out of the bundle, to {real}; export again")


def _check_file(folder: Path, name: str, entry: FileEntry, *, check_hash: bool) -> None:
    path = folder / name
    _require_inside(folder, name)
    if not path.is_file():
        raise BundleError(f"{folder}: the file {name} is missing; export again")
    try:
        found = fingerprint(path) if check_hash else FileEntry(entry.sha256, path.stat().st_size)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
    if found.bytes != entry.bytes and is_lfs_pointer(path):
        raise BundleError(f"{folder}: {name} is a Git LFS pointer; fetch the files themselves with: git lfs pull")
    if found.bytes != entry.bytes:
        raise BundleError(
            f"{folder}: {name} was altered: found {found.bytes} bytes, expected {entry.bytes}; export again"
        )
    if found.sha256 != entry.sha256:
        raise BundleError(
            f"{folder}: {name} was altered: found SHA-256 {found.sha256}, expected {entry.sha256}; export again"
        )


def _read_embeddings(path: Path, labels: int, width: int) -> tuple[Float32, Float32]:
    expected = {LABEL_ROWS: ("float32", (labels, width)), NULL_ROW: ("float32", (width,))}
    arrays = read_arrays(path, expected, "table of label embeddings")
    for name, found in arrays.items():
        if not np.isfinite(found).all():
            raise BundleError(f"{path}: {name} holds values that are not finite; export again")
        found.setflags(write=False)
    return arrays[LABEL_ROWS], arrays[NULL_ROW]

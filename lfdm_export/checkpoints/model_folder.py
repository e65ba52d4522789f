"""A model as a folder: the weights of both networks, and what weights do not show.

Layout::

    MODEL/model.json            options, labels, provenance, and the other files' SHA-256
    MODEL/lfae.safetensors      generator.…, region_predictor.…, bg_predictor.…
    MODEL/dm.safetensors        diffusion.…
    MODEL/labels.safetensors    `embeddings` (labels, text_width); only if the model has its own
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from lfdm_export.checkpoints.load import load_networks
from lfdm_export.checkpoints.weight_files import read_checkpoint, sha256
from lfdm_export.errors import CheckpointError, InputError
from lfdm_export.files.atomic import temporary_folder
from lfdm_export.files.folders import give_back, publish
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.files.names import user_path
from lfdm_export.files.places import destination
from lfdm_models.model import LfdmModel

CARD, LFAE, DM, LABELS = "model.json", "lfae.safetensors", "dm.safetensors", "labels.safetensors"

_EMBEDDINGS = "embeddings"
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelCard:
    """The content of ``model.json``.

    Attributes:
        format, version: format of the folder.
        residual_flow: flow is an offset from the identity grid, as in `LfdmConfig`.
        region_pad, region_temperature: as in `LfaeConfig`.
        labels: in the order of the rows of the label embeddings.
        provenance: as in `LfdmModel`.
        files: SHA-256 of each other file in the folder.
    """

    format: Literal["lfdm-model"]
    version: Literal[1]
    residual_flow: bool
    region_pad: int
    region_temperature: float
    labels: tuple[str, ...]
    provenance: Mapping[str, object]
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is out of range, a label appears twice, or the files do not match the layout.
        """
        if self.region_pad < 0 or not 0 < self.region_temperature < float("inf"):
            raise ValueError(
                f"region_pad {self.region_pad} or region_temperature {self.region_temperature} out of range"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label appears twice")
        expected = {LFAE, DM} | ({LABELS} if self.labels else set())
        if set(self.files) != expected:
            raise ValueError(f"files are {', '.join(sorted(self.files))}, expected {', '.join(sorted(expected))}")


def save_model(model: LfdmModel, folder: str | os.PathLike[str]) -> Path:
    """Write a model as a folder, completely or not at all.

    Args:
        model: the model; weights are stored as float32.
        folder: its path. An existing model folder is replaced.

    Returns:
        The folder.

    Raises:
        InputError: the path holds something else or cannot be written, or the model's labels or provenance cannot be
            stored.
    """
    embeddings = _stack_labels(model)
    try:
        target = destination(folder).path
        _require_free(target)
        with temporary_folder(target) as temporary:
            _fill(temporary, model, embeddings)
            publish(temporary, target, check=lambda: _require_free(target))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write the model to {os.fspath(folder)}: {reason}; choose another folder") from error
    return target


def _fill(folder: Path, model: LfdmModel, embeddings: NDArray[np.float32] | None) -> None:
    """Write the model's files."""
    safetensors.torch.save_file(_weights(model.lfae, ""), folder / LFAE)
    safetensors.torch.save_file(_weights(model.diffusion, "diffusion."), folder / DM)
    if embeddings is not None:
        safetensors.torch.save_file({_EMBEDDINGS: torch.from_numpy(embeddings)}, folder / LABELS)
    card = ModelCard(
        format="lfdm-model",
        version=1,
        residual_flow=model.config.residual_flow,
        region_pad=model.config.lfae.region_pad,
        region_temperature=model.config.lfae.region_temperature,
        labels=tuple(model.label_embeddings),
        provenance=model.provenance,
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
    )
    (folder / CARD).write_text(_to_json(card), encoding="utf-8")


def load_model_folder(folder: str | os.PathLike[str]) -> LfdmModel:
    """Load a folder that `save_model` wrote.

    Args:
        folder: its path.

    Returns:
        The model, with its provenance as saved (the folder's own files where none was saved).

    Raises:
        CheckpointError: the folder is missing, incomplete, altered or of another version, or its weights are not valid
            for `load_model`.
    """
    path = user_path(folder)
    give_back(path.resolve())
    card = _read_card(path)
    for name, expected in card.files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing; fetch or save the model again")
        found = sha256(path / name)
        if found != expected:
            raise CheckpointError(
                f"{path / name} was altered or is not whole: SHA-256 {found}, expected {expected}; "
                "fetch or save the model again"
            )
    model = load_networks(
        read_checkpoint(path / LFAE),
        read_checkpoint(path / DM),
        residual_flow=card.residual_flow,
        region_pad=card.region_pad,
        region_temperature=card.region_temperature,
    )
    model.provenance = {
        "lfae": {"file": LFAE, "sha256": card.files[LFAE]},
        "dm": {"file": DM, "sha256": card.files[DM]},
        "trained": None,
        **card.provenance,
    }
    if card.labels:
        table = _read_labels(path / LABELS, len(card.labels), model.config.dm.text_width)
        model.label_embeddings = dict(zip(card.labels, table, strict=True))
    return model


def _require_free(target: Path) -> None:
    """Check that only an older model would be replaced."""
    if not target.name:
        raise InputError(f"{target} is not a place for a model; give the path of a new folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file, expected a new folder; choose another path")
    names = {path.name for path in target.iterdir()}
    if names and (CARD not in names or not names <= {CARD, LFAE, DM, LABELS}):
        raise InputError(f"{target} is there already and holds other files; choose a new folder")


def _weights(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A state dict for safetensors: contiguous tensors that share no memory."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in network.state_dict().items():
        tensor = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        weights[prefix + key] = tensor
    return weights


def _stack_labels(model: LfdmModel) -> NDArray[np.float32] | None:
    if not model.label_embeddings:
        return None
    width = model.config.dm.text_width
    for label, embedding in model.label_embeddings.items():
        if embedding.shape != (width,) or not np.isfinite(embedding).all():
            raise InputError(
                f"the embedding of label {label!r} has shape {embedding.shape}, expected {width} finite numbers"
            )
    return np.stack(list(model.label_embeddings.values())).astype(np.float32)


def _to_json(card: ModelCard) -> str:
    try:
        return json.dumps(to_plain(card), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"the model's provenance cannot be stored as JSON: {error}; use plain values") from error


def _read_card(folder: Path) -> ModelCard:
    if not folder.exists():
        raise CheckpointError(f"there is no model folder {folder}; give the path of a folder with {CARD}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a model folder; give a pair of checkpoints as two files")
    path = folder / CARD
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CARD}")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CARD_BYTES + 1)
        if len(text) > _MAX_CARD_BYTES:
            raise ValueError(f"more than {_MAX_CARD_BYTES} bytes")
        return from_plain(ModelCard, json.loads(text), CARD)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or of another version: {error}; fetch or save the model again"
        ) from error


def _read_labels(path: Path, labels: int, width: int) -> NDArray[np.float32]:
    table = read_checkpoint(path).tensors().get(_EMBEDDINGS)
    if table is None or table.shape != (labels, width) or table.dtype != torch.float32:
        found = "missing" if table is None else f"{table.dtype} {list(table.shape)}"
        raise CheckpointError(f"{path}: {_EMBEDDINGS} is {found}, expected torch.float32 {[labels, width]}")
    array: NDArray[np.float32] = table.numpy().copy()
    if not np.isfinite(array).all():
        raise CheckpointError(f"{path}: {_EMBEDDINGS} holds values that are NaN or infinite; save the model again")
    return array

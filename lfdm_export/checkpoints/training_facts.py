"""What checkpoints of `lfdm-train` store beside their weights; released checkpoints store no such facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.checkpoints.weight_files import Checkpoint
from lfdm_export.errors import CheckpointError
from lfdm_export.files.json_codec import from_plain
from lfdm_export.sampling.tuned import FEW_STEPS, TunedSteps

#: Upper limit; no clip is longer or larger.
_LARGEST_SIZE = 1 << 16
_TRAINING, _LABELS, _EMBEDDINGS = "training", "labels", "label_embeddings"


@dataclass(frozen=True)
class TrainingFacts:
    """Facts that weights do not show; None or empty where a checkpoint does not store them.

    Attributes:
        residual_flow: flow is an offset from the identity grid, as in `LfdmConfig`.
        region_pad: as in `LfaeConfig`.
        trained: True for a trained model.
        geometry: "frames" and "image_size" of the clips that the DM was trained with.
        data: name of the DM's training data, as in ``lfdm-train --data``.
        label_embeddings: (text_width,) float32 for each label that the DM was trained with.
        few_steps: the steps that the DM was distilled for.
    """

    residual_flow: bool | None = None
    region_pad: int | None = None
    trained: bool | None = None
    geometry: dict[str, int] = field(default_factory=dict)
    data: str | None = None
    label_embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    few_steps: TunedSteps | None = None


def training_facts(lfae: Checkpoint, dm: Checkpoint) -> TrainingFacts:
    """Read the facts from a pair of checkpoints.

    Raises:
        CheckpointError: a stored fact has an invalid value.
    """
    training = _get(dm.top, _TRAINING)
    residual_flow = training.get("residual_flow")
    examples = _get(training, "examples")
    geometry = {"frames": examples.get("frames"), "image_size": examples.get("image size")}
    data = examples.get("data")
    region_pad = _get(_get(lfae.top, _TRAINING), "config").get("region_pad")
    if not isinstance(residual_flow, bool | None):
        raise CheckpointError(
            f"{dm.path}: residual_flow is a {type(residual_flow).__name__}, expected true or false; save it again"
        )
    if region_pad is not None and (type(region_pad) is not int or region_pad < 0):
        raise CheckpointError(f"{lfae.path}: region_pad is not an integer of 0 or more; save it again")
    return TrainingFacts(
        residual_flow,
        region_pad,
        True if training else None,
        {name: value for name, value in geometry.items() if type(value) is int and 0 < value <= _LARGEST_SIZE},
        data if isinstance(data, str) else None,
        _label_embeddings(dm),
        _few_steps(dm.path, training),
    )


def _get(content: Mapping[Any, object], key: str) -> Mapping[Any, object]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _few_steps(path: Path, training: Mapping[Any, object]) -> TunedSteps | None:
    if FEW_STEPS not in training:
        return None
    try:
        return from_plain(TunedSteps, training[FEW_STEPS], FEW_STEPS)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the steps that it was distilled for are wrong: {error}; save it again"
        ) from error


def _label_embeddings(dm: Checkpoint) -> dict[str, NDArray[np.float32]]:
    labels, stored = dm.top.get(_LABELS), dm.top.get(_EMBEDDINGS)
    if labels is None or stored is None:
        return {}
    table = dm.table(stored, _EMBEDDINGS)
    named = isinstance(labels, list) and all(isinstance(label, str) and label for label in labels)
    if not named or table is None or table.ndim != 2 or not table.is_floating_point():
        raise CheckpointError(f"{dm.path}: {_LABELS} and {_EMBEDDINGS} are not names with a row of numbers each")
    assert isinstance(labels, list)
    if len(table) != len(labels) or len(set(labels)) != len(labels) or not table.isfinite().all():
        raise CheckpointError(
            f"{dm.path}: {len(labels)} labels and {len(table)} embeddings, expected as many, all different and finite"
        )
    rows: NDArray[np.float32] = table.detach().float().numpy().copy()
    return dict(zip(labels, rows, strict=True))

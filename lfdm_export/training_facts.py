"""What checkpoints of `lfdm-train` say of themselves beside their weights; released ones say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lfdm_export.errors import CheckpointError
from lfdm_export.weight_files import read_top

_TRAINING, _LABELS, _EMBEDDINGS = "training", "labels", "label_embeddings"


@dataclass(frozen=True)
class TrainingFacts:
    """Facts that weights do not show; None or nothing where a checkpoint does not tell.

    Attributes:
        residual_flow: see `LfdmConfig`.
        region_pad: see `LfaeConfig`.
        trained: that they were.
        geometry: "frames" and "image_size" of the clips that the DM was trained with.
        data: name of the data set that the DM was trained on, as of ``lfdm-train --data``.
        label_embeddings: (text_width,) float32 of each label that the DM was trained with.
    """

    residual_flow: bool | None = None
    region_pad: int | None = None
    trained: bool | None = None
    geometry: dict[str, int] = field(default_factory=dict)
    data: str | None = None
    label_embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def training_facts(lfae: Path, dm: Path) -> TrainingFacts:
    """What a pair of checkpoints tells.

    Raises:
        CheckpointError: a file cannot be read, or tells something that cannot be.
    """
    told_by_lfae, told_by_dm = read_top(lfae), read_top(dm)
    training = _get(told_by_dm, _TRAINING)
    residual_flow = training.get("residual_flow")
    examples = _get(training, "examples")
    geometry = {"frames": examples.get("frames"), "image_size": examples.get("image size")}
    data = examples.get("data")
    region_pad = _get(_get(told_by_lfae, _TRAINING), "config").get("region_pad")
    if not isinstance(residual_flow, bool | None):
        raise CheckpointError(f"{dm}: residual_flow is {residual_flow!r}, expected true or false; save it again")
    if not isinstance(region_pad, int | None) or (region_pad is not None and region_pad < 0):
        raise CheckpointError(f"{lfae}: region_pad is {region_pad!r}, expected 0 or more; save it again")
    return TrainingFacts(
        residual_flow,
        region_pad,
        True if training else None,
        {name: value for name, value in geometry.items() if isinstance(value, int)},
        data if isinstance(data, str) else None,
        _label_embeddings(told_by_dm, dm),
    )


def _get(content: Mapping[object, object], key: str) -> Mapping[object, object]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _label_embeddings(content: Mapping[object, object], where: Path) -> dict[str, NDArray[np.float32]]:
    labels, table = content.get(_LABELS), content.get(_EMBEDDINGS)
    if labels is None or table is None:
        return {}
    named = isinstance(labels, list) and all(isinstance(label, str) and label for label in labels)
    if not named or not isinstance(table, Tensor) or table.ndim != 2 or not table.is_floating_point():
        raise CheckpointError(f"{where}: {_LABELS} and {_EMBEDDINGS} are no names with a row of numbers each")
    assert isinstance(labels, list)
    rows: NDArray[np.float32] = table.float().numpy().copy()
    if len(rows) != len(labels) or len(set(labels)) != len(labels) or not np.isfinite(rows).all():
        raise CheckpointError(
            f"{where}: {len(labels)} labels and {len(rows)} embeddings, expected as many, all different and finite"
        )
    return dict(zip(labels, rows, strict=True))

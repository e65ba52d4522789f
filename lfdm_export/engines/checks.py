"""Checks of tensors against a `StageSpec`, which every backend makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import EngineError
from lfdm_export.stages import StageSpec, TensorSpec

Array = NDArray[np.generic]


def check_feeds(spec: StageSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """Compare the inputs of a run with the stage.

    Returns:
        The size of each dynamic axis, by name.

    Raises:
        EngineError: an input is missing, unexpected, has another dtype or shape, or differs from the others
            in a dynamic axis.
    """
    return check_tensors(spec, spec.inputs, feeds, "input")


def check_tensors(
    spec: StageSpec, tensors: Sequence[TensorSpec], found: Mapping[str, Array], word: str
) -> dict[str, int]:
    """`check_feeds` for inputs or outputs; `word` names them in messages.

    Raises:
        EngineError: a tensor is missing, unexpected, has another dtype or shape, or differs from the others
            in a dynamic axis.
    """
    names = [tensor.name for tensor in tensors]
    for problem, those in (
        ("lacks the", [name for name in names if name not in found]),
        ("has the unexpected", [name for name in found if name not in names]),
    ):
        if those:
            raise EngineError(f"stage {spec.name!r} {problem} {word} {', '.join(those)}; expected {', '.join(names)}")
    axes: dict[str, int] = {}
    for tensor in tensors:
        _check_tensor(spec, tensor, found[tensor.name], word, axes)
    return axes


def check_outputs(spec: StageSpec, outputs: Mapping[str, Array], axes: Mapping[str, int]) -> None:
    """Check that a run returned the outputs of the stage, for the batch of its inputs.

    Args:
        spec: the stage.
        outputs: outputs of the run, by name.
        axes: dynamic axes of the inputs, from `check_feeds`.

    Raises:
        EngineError: an output is missing, unexpected, or has another dtype or shape than the inputs imply.
    """
    found = check_tensors(spec, spec.outputs, outputs, "output")
    if any(axes.get(axis, size) != size for axis, size in found.items()):
        raise EngineError(f"stage {spec.name!r} gave outputs for {found}, its inputs were {axes}")


def _check_tensor(spec: StageSpec, tensor: TensorSpec, array: Array, word: str, axes: dict[str, int]) -> None:
    where = f"stage {spec.name!r}: {word} {tensor.name}"
    if not isinstance(array, np.ndarray):
        raise EngineError(f"{where} is a {type(array).__name__}, expected a numpy array")
    if array.dtype != tensor.dtype:
        raise EngineError(f"{where} has dtype {array.dtype}, expected {tensor.dtype}")
    expected = ", ".join(str(axis) for axis in tensor.shape)
    if array.ndim != len(tensor.shape):
        raise EngineError(f"{where} has shape {array.shape}, expected ({expected})")
    for size, axis in zip(array.shape, tensor.shape, strict=True):
        fits = size == axis if isinstance(axis, int) else size >= 1 and axes.setdefault(axis, size) == size
        if not fits:
            already = "".join(f", {name} = {value}" for name, value in axes.items())
            raise EngineError(f"{where} has shape {array.shape}, expected ({expected}){already}")

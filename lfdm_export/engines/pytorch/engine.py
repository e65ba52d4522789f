"""Runs a stage compiled by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array, check_feeds, check_outputs
from lfdm_export.engines.interface import Engine
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.pytorch.compiled import Program
from lfdm_export.engines.pytorch.interfaces import FloatDecode
from lfdm_export.engines.pytorch.loop import TorchLoop
from lfdm_export.engines.pytorch.session import TorchSession, torch_session
from lfdm_export.engines.target_spec import Target
from lfdm_export.errors import EngineError
from lfdm_export.rewrite.lfae import Decode
from lfdm_export.stages import StageSpec
from lfdm_export.wording import one_line

#: Stages that use the module of another stage, and which of its outputs are theirs.
_PART_OF = {"denoise": ("step", slice(0, 1)), "denoise_guided": ("step_guided", slice(0, 1))}
_OUTPUTS = {"step": slice(1, 3), "step_guided": slice(1, 3)}


class TorchEngine:
    """One stage. Its program takes one sample and runs once per sample, so the bits of a sample depend on no other.

    Any thread may run it, and waits while another uses an engine of the same session.
    """

    def __init__(self, session: TorchSession, spec: StageSpec, whole: StageSpec) -> None:
        """Use a session; the first run compiles the stage.

        Args:
            session: session of the bundle.
            spec: the stage.
            whole: the stage whose module it is a part of; for most, the stage itself.
        """
        self.spec, self._session, self._whole = spec, session, whole
        self._outputs = _PART_OF[spec.name][1] if spec.name in _PART_OF else _OUTPUTS.get(spec.name, slice(None))
        self._program: Program | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage once; see `lfdm_export.engines.interface.Engine`."""
        axes = check_feeds(self.spec, feeds)
        batch = len(next(iter(feeds.values())))
        try:
            with self._session.owned():
                rows = [self._run_one({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(batch)]
        except RuntimeError as error:  # the exceptions of torch, out of memory too, derive from it
            raise EngineError(f"stage {self.spec.name!r} failed in PyTorch: {one_line(error, 300)}") from error
        outputs = {
            tensor.name: np.concatenate([row[index] for row in rows]) for index, tensor in enumerate(self.spec.outputs)
        }
        check_outputs(self.spec, outputs, axes)
        return outputs

    def _run_one(self, feeds: Mapping[str, Array]) -> list[Array]:
        inputs = []
        for tensor in self._whole.inputs:
            # A part lacks some inputs of the whole, which change none of its outputs.
            array = feeds.get(tensor.name, np.zeros(tensor.concrete(batch=1), tensor.dtype))
            inputs.append(torch.from_numpy(np.ascontiguousarray(array)).to(self._session.device))
        if self._program is None:
            self._program = self._session.program(self._whole.name, self._module(), inputs)
        results = self._program(*inputs)[self._outputs]
        return [_array(result) for result in results]

    def _module(self) -> nn.Module:
        """The module of the stage, as its callers see it."""
        module = self._session.module(self._whole.name)
        return FloatDecode(module) if isinstance(module, Decode) else module


class TorchSampler(TorchEngine):
    """A sampling stage on a GPU, where the state of its chains remains."""

    def denoise_loop(self, batch: int) -> TorchLoop:
        """Make a loop for a batch size.

        Raises:
            EngineError: the stage cannot be compiled, or there is not enough memory.
        """
        return TorchLoop(self._session, self.spec, batch)


def open_engine(
    bundle: Bundle, stage: str, _target: Target, threads: int | None = None, _device: str = "cpu"
) -> Engine:
    """The engine of a stage; the text encoder, which runs once per clip, uses ONNX Runtime.

    Raises:
        EngineError: the bundle has no weights for PyTorch, or the stage cannot be loaded.
        MissingDependencyError: a package is not installed.
    """
    spec = bundle.stages[stage]
    if "input_ids" in {tensor.name for tensor in spec.inputs}:
        return OnnxRuntimeEngine(bundle.stage_path(stage), spec, threads=threads)
    session = torch_session(bundle, threads=threads)
    whole = bundle.stages[_PART_OF[stage][0]] if stage in _PART_OF else spec
    if session.on_gpu and stage in _OUTPUTS:
        return TorchSampler(session, spec, whole)
    return TorchEngine(session, spec, whole)


def _array(tensor: Tensor) -> Any:
    """Convert a result for callers: the encoder returns the dtype of the weights."""
    wide = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    return wide.contiguous().cpu().numpy()

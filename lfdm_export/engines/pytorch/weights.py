"""The weights of the deployable modules in a bundle: plain tensors, from which the modules are built again.

A bundle carries no code of the modules, and nothing that was compiled: both are this program's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lfdm_export.bundle.reader import TORCH_WEIGHTS, Bundle
from lfdm_export.engines.held import why_not_held
from lfdm_export.errors import EngineError, InputError
from lfdm_export.rewrite.precision import in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_export.stages import DRIVE_STAGE
from lfdm_models.config import LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.model import LfdmModel

#: Of weights and activations, by a bundle's precision.
DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
#: Modules whose weights are stored, by stage; the other stages of the UNet share those of `step`.
_STORED = ("encode", "step", "decode", DRIVE_STAGE)
_SHARED = {"step_guided": "step"}
# Says which tensor a name means that is not stored under its own.
_SAME = "same"


def write_weights(model: LfdmModel, frames: int, precision: str, path: Path, *, drive: bool = True) -> None:
    """Store the weights of a model's deployable modules in a precision; equal tensors are stored once.

    Args:
        model: both networks, float32.
        frames: T of the bundle.
        precision: one of `DTYPES`.
        path: the .safetensors file to write; its folder is made.
        drive: include those that motion transfer alone needs.

    Raises:
        InputError: the target torch has no such precision.
    """
    from safetensors.torch import save_file

    if precision not in DTYPES:
        raise InputError(f"the target 'torch' has no {precision}; expected {', '.join(DTYPES)}")
    modules = in_precision(_stored_modules(model, frames, drive=drive), DTYPES[precision])
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for stage, module in modules.items():
        for name, tensor in module.state_dict().items():
            full, dense = f"{stage}.{name}", tensor.detach().contiguous()
            data = dense.flatten().view(torch.uint8).numpy() if dense.ndim else dense.numpy().reshape(1)
            key = (tuple(dense.shape), dense.dtype, hashlib.sha256(data.tobytes()).digest())
            if key in names:
                same[full] = names[key]
            else:
                names[key], tensors[full] = full, dense.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={_SAME: json.dumps(same, sort_keys=True)})


def load_modules(bundle: Bundle, device: torch.device) -> dict[str, nn.Module]:
    """The deployable modules of a bundle by stage, in its precision, in eval mode.

    Args:
        bundle: exported for the target torch.
        device: where they shall be.

    Raises:
        EngineError: the bundle has no weights for PyTorch, or they are not those of its modules.
    """
    from safetensors import SafetensorError, safe_open

    lacking = why_not_held(bundle, "torch")
    if lacking:
        raise EngineError(f"{bundle.path} does not run with the target 'torch': {lacking}")
    manifest = bundle.manifest
    path = bundle.path / TORCH_WEIGHTS
    modules = _empty_modules(manifest.config, manifest.geometry.frames, drive=manifest.has_drive)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            same = json.loads((file.metadata() or {}).get(_SAME, "{}"))
            stored = set(file.keys())
            taken: dict[str, Tensor] = {}
            for stage, module in modules.items():
                prefix = _SHARED.get(stage, stage)
                state = {}
                for name in module.state_dict():
                    full = f"{prefix}.{name}"
                    source = full if full in stored else same.get(full)
                    if source not in stored:
                        raise EngineError(f"{path} lacks the weights {full}; export again with --target torch")
                    if source not in taken:
                        taken[source] = file.get_tensor(source)
                    state[name] = taken[source]
                module.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise EngineError(f"{path} does not hold the weights of this bundle's modules: {reason}") from error
    return {name: module.eval().requires_grad_(False) for name, module in modules.items()}


def _stored_modules(model: LfdmModel, frames: int, *, drive: bool) -> dict[str, nn.Module]:
    modules = stage_modules(model, frames)
    return {name: modules[name] for name in _STORED if drive or name != DRIVE_STAGE}


def _empty_modules(config: LfdmConfig, frames: int, *, drive: bool) -> dict[str, nn.Module]:
    """The modules without memory for their weights."""
    with torch.device("meta"):
        model = LfdmModel(config, Lfae(config.lfae).eval(), Diffusion(config.dm).eval())
        modules = stage_modules(model, frames)
    wanted = (*_STORED, *_SHARED)
    return {name: modules[name] for name in wanted if drive or name != DRIVE_STAGE}

"""The weights of the networks in a bundle: plain tensors, from which the deployable modules are made again.

They are the original weights of the networks, float32, so a bundle remains valid when the rewriting of modules changes.
A bundle carries no code and nothing compiled: both come from this program.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lfdm_export.bundle.reader import TORCH_WEIGHTS, Bundle
from lfdm_export.engines.held import why_not_held
from lfdm_export.engines.pytorch.target import PYTORCH
from lfdm_export.errors import EngineError, InputError
from lfdm_export.rewrite.precision import in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_export.stages import DRIVE_STAGE
from lfdm_export.wording import one_line
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.model import LfdmModel

_NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: Dtype of weights and activations, by the precision of a bundle.
DTYPES: Mapping[str, torch.dtype] = {name: _NARROW.get(name, torch.float32) for name in PYTORCH.precisions}
#: Stages that have their own module; `denoise` and `denoise_guided` are parts of two of them.
_STAGES = ("encode", "step", "step_guided", "decode", DRIVE_STAGE)


def write_weights(model: LfdmModel, path: Path) -> None:
    """Write the network weights of a model.

    Args:
        model: both networks, float32.
        path: the .safetensors file to write; its folder is created.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    networks = {"lfae": model.lfae, "diffusion": model.diffusion}
    # Cloned, because safetensors stores no tensor twice, and networks share some.
    save_file(
        {f"{name}.{key}": t.detach().clone() for name, one in networks.items() for key, t in one.state_dict().items()},
        path,
    )


def check_torch_precision(precision: str) -> None:
    """Reject a precision that the target torch does not have.

    Raises:
        InputError: the target torch does not have it.
    """
    if precision not in DTYPES:
        raise InputError(f"the target 'torch' has no {precision}; expected {', '.join(DTYPES)}")


def load_modules(bundle: Bundle, device: torch.device) -> dict[str, nn.Module]:
    """Load the deployable modules of a bundle by stage, in its precision, in eval mode.

    Args:
        bundle: a bundle exported for the target torch.
        device: device of the modules.

    Raises:
        EngineError: the bundle has no weights for PyTorch, or they do not match its networks.
        InputError: the target torch does not have the precision.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lacking = why_not_held(bundle, PYTORCH.name)
    if lacking:
        raise EngineError(f"{bundle.path} does not run with the target 'torch': {lacking}")
    manifest = bundle.manifest
    check_torch_precision(manifest.precision)
    path = bundle.path / TORCH_WEIGHTS
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced immediately
        lfae, diffusion = Lfae(manifest.config.lfae), Diffusion(manifest.config.dm)
    try:
        stored = load_file(path)
        for name, network in (("lfae", lfae), ("diffusion", diffusion)):
            prefix = f"{name}."
            state = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            network.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise EngineError(f"{path} does not hold the weights of this bundle's networks: {reason}") from error
    model = LfdmModel(manifest.config, lfae.eval(), diffusion.eval())
    modules = stage_modules(model, manifest.geometry.frames)
    wanted = {name: modules[name] for name in _STAGES if manifest.has_drive or name != DRIVE_STAGE}
    lowered = in_precision(wanted, DTYPES[manifest.precision])
    return {name: module.to(device).eval().requires_grad_(False) for name, module in lowered.items()}

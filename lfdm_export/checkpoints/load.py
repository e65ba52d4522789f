"""Load a pair of LFAE and DM checkpoints as networks, with strict checks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lfdm_export.checkpoints.architecture import recognize_dm, recognize_lfae
from lfdm_export.checkpoints.datasets import dataset_facts
from lfdm_export.checkpoints.training_facts import training_facts
from lfdm_export.checkpoints.weight_files import PARTS, Checkpoint, read_checkpoint, sha256, shorten
from lfdm_export.errors import CheckpointError, InputError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.files.names import user_path
from lfdm_export.sampling.tuned import FEW_STEPS
from lfdm_models.config import DmConfig, LfaeConfig, LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.model import LfdmModel
from lfdm_models.schedule import Schedule, cosine_schedule
from lfdm_models.wording import first_line

N = TypeVar("N", bound=nn.Module)
T = TypeVar("T")
logger = logging.getLogger(__name__)

_LFAE_PARTS, _DM_PART = PARTS[:3], PARTS[3]
_BUFFERS = tuple(Schedule.__dataclass_fields__)
_LEARNED_NULL = f"{_DM_PART}.denoise_fn.null_cond_emb"


def load_model(
    lfae: str | os.PathLike[str],
    dm: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    residual_flow: bool | None = None,
    region_pad: int | None = None,
) -> LfdmModel:
    """Load a pair of checkpoints with strict checks; keys and shapes determine their architecture.

    Checkpoints of `lfdm-train` also store what weights do not show, including the embeddings of their labels.

    Args:
        lfae: file with the state dicts ``generator``, ``region_predictor`` and ``bg_predictor``, from
            ``torch.save`` (loaded without running any code in it) or safetensors.
        dm: file with the state dict ``diffusion``.
        dataset: data set of the training, "mug", "mhad" or "natops"; sets `region_pad`. Give it to `export_bundle`
            too.
        residual_flow: the DM was trained on flow as an offset from the identity grid. Default: as stored in the
            checkpoint, else False.
        region_pad: padding of the region predictor's last conv, which weights do not show: 3 for MUG, 0 for MHAD and
            NATOPS. Default: as stored in the checkpoint, else 0 if the DM has a learned null embedding (NATOPS), else
            3 (MUG).

    Returns:
        Both networks on the CPU in eval mode, float32, with their own memory (the files may change).

    Raises:
        CheckpointError: a file is missing, damaged or no such checkpoint, its tensors do not match the network, or the
            two checkpoints do not fit each other.
        InputError: `region_pad` is out of range, the data set is unknown, or an option contradicts the checkpoint's
            training.
    """
    if residual_flow is not None and not isinstance(residual_flow, bool):
        raise InputError(f"residual_flow is {residual_flow!r}, expected True, False or None")
    if region_pad is not None and (not isinstance(region_pad, int) or isinstance(region_pad, bool) or region_pad < 0):
        raise InputError(f"region_pad is {region_pad!r}, expected 3 (MUG), 0 (MHAD, NATOPS) or None")
    if region_pad is None and dataset is not None:
        region_pad = dataset_facts(dataset).region_pad
    lfae_path, dm_path = user_path(lfae), user_path(dm)
    lfae_file, dm_file = read_checkpoint(lfae_path), read_checkpoint(dm_path)
    facts = training_facts(lfae_file, dm_file)
    residual_flow = _agreed("residual_flow", residual_flow, facts.residual_flow)
    region_pad = _agreed("region_pad", region_pad, facts.region_pad)
    model = load_networks(lfae_file, dm_file, residual_flow=bool(residual_flow), region_pad=region_pad)
    width = model.config.dm.text_width
    if any(row.shape != (width,) for row in facts.label_embeddings.values()):
        raise CheckpointError(f"{dm_path}: its labels' embeddings do not have the network's width {width}")
    model.label_embeddings = facts.label_embeddings
    model.provenance = {
        "lfae": {"file": lfae_path.name, "sha256": sha256(lfae_path)},
        "dm": {"file": dm_path.name, "sha256": sha256(dm_path)},
        "trained": facts.trained,
        **facts.geometry,
        **({} if facts.data is None else {"data": facts.data}),
        **({} if facts.few_steps is None else {FEW_STEPS: to_plain(facts.few_steps)}),
    }
    return model


def _agreed(name: str, given: T | None, stored: T | None) -> T | None:
    if given is not None and stored is not None and given != stored:
        raise InputError(f"{name} is {given}, but the checkpoint was trained with {stored}; leave it out")
    return stored if given is None else given


def load_networks(
    lfae: Checkpoint,
    dm: Checkpoint,
    *,
    residual_flow: bool,
    region_pad: int | None,
    region_temperature: float = LfaeConfig.region_temperature,
) -> LfdmModel:
    """Load networks like `load_model`, but without provenance; the region predictor's softmax temperature is an option.

    Raises:
        CheckpointError: a file is no such checkpoint, its tensors do not match the network, or the two checkpoints do
            not fit each other.
    """
    # Check both before anything is built; their tensors are mapped, not read.
    lfae_tensors, dm_tensors = _lfae_tensors(lfae), _dm_tensors(dm)
    if region_pad is None:
        region_pad = _default_region_pad(dm_tensors)
    lfae_config = recognize_lfae(_shapes(lfae_tensors), str(lfae.path), region_pad=region_pad)
    lfae_config = replace(lfae_config, region_temperature=region_temperature)
    dm_config = recognize_dm(_shapes(dm_tensors), str(dm.path))
    # Whether the two fit each other is checked last: an error in a single tensor explains more.
    lfae_network = build_lfae(lfae_config, lfae_tensors, str(lfae.path))
    del lfae_tensors  # its pages are in memory by now
    diffusion = build_diffusion(dm_config, dm_tensors, str(dm.path))
    config = _join(lfae_config, dm_config, residual_flow=residual_flow, where=f"{lfae.path} and {dm.path}")
    logger.info("recognized %s and %s", lfae_config, dm_config)
    return LfdmModel(config, lfae_network, diffusion)


def build_lfae(config: LfaeConfig, tensors: Mapping[str, Tensor], where: str) -> Lfae:
    """An LFAE that holds copies of `tensors`, in eval mode.

    Args:
        config: its architecture.
        tensors: tensors by released key, any floating dtype.
        where: name of the checkpoint, for messages.

    Raises:
        CheckpointError: the tensors do not exactly match the network, or are not finite.
    """
    network = _without_memory(lambda: Lfae(config), where)
    _fill(network, tensors, "", where)
    return network


def build_diffusion(config: DmConfig, tensors: Mapping[str, Tensor], where: str) -> Diffusion:
    """A diffusion model that holds copies of `tensors` (keys begin with ``diffusion.``), in eval mode.

    The schedule is the checkpoint's own.

    Args:
        config: its architecture.
        tensors: tensors by released key, any floating dtype.
        where: name of the checkpoint, for messages.

    Raises:
        CheckpointError: the tensors do not exactly match the network, or are not finite, or the schedule is invalid.
    """
    network = _without_memory(lambda: Diffusion(config), where)
    _fill(network, _with_exact_schedule(tensors, config.training_steps, where), f"{_DM_PART}.", where)
    if not config.learned_null:
        # Not in the state dict, so it has no memory yet.
        network.denoise_fn.register_buffer("null_cond_emb", torch.zeros(1, config.text_width), persistent=False)
    _check_schedule(network.schedule(), where)
    return network


def _lfae_tensors(file: Checkpoint) -> dict[str, Tensor]:
    path, tensors = file.path, file.tensors()
    parts = {part: {k: v for k, v in tensors.items() if k.startswith(f"{part}.")} for part in _LFAE_PARTS}
    absent = [part for part, found in parts.items() if not found]
    if not absent:
        return {key: tensor for found in parts.values() for key, tensor in found.items()}
    if len(absent) == len(parts) and _is_dm(tensors):
        raise CheckpointError(f"{path} is a DM checkpoint, expected an LFAE; were the two files swapped?")
    raise CheckpointError(f"{path} is not an LFAE checkpoint: it lacks {' and '.join(absent)}; {_holds(tensors)}")


def _dm_tensors(file: Checkpoint) -> dict[str, Tensor]:
    path, tensors = file.path, file.tensors()
    wrapped = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{_DM_PART}.")}
    bare = {key: tensor for key, tensor in tensors.items() if key.startswith("denoise_fn.") or key in _BUFFERS}
    if wrapped and any(key.startswith("denoise_fn.") for key in bare):
        raise CheckpointError(
            f"{path} holds two diffusion models, one under {_DM_PART!r} and one at the top; keep one of them"
        )
    if wrapped or bare:
        return wrapped or {f"{_DM_PART}.{key}": tensor for key, tensor in bare.items()}
    if any(key.partition(".")[0] in _LFAE_PARTS for key in tensors):
        raise CheckpointError(f"{path} is an LFAE checkpoint, expected a DM; were the two files swapped?")
    raise CheckpointError(f"{path} is not a DM checkpoint: it lacks {_DM_PART}; {_holds(tensors)}")


def _is_dm(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.partition(".")[0] in (_DM_PART, "denoise_fn") for key in tensors)


def _holds(tensors: Mapping[str, Tensor]) -> str:
    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    if not names:
        return "it holds no weights"
    parts = (*PARTS, "denoise_fn")
    for key in tensors:
        before = next((key[: key.index(f".{part}.") + 1] for part in parts if f".{part}." in key), None)
        if before is not None:
            return f"its keys begin with {before!r}, an unknown wrapper; save them without that prefix"
    return f"it holds {shorten(names)}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _default_region_pad(dm_tensors: Mapping[str, Tensor]) -> int:
    pad = 0 if _LEARNED_NULL in dm_tensors else 3
    logger.info(
        "weights do not show the region predictor's padding; taking %d because the null embedding is %s; "
        "for MHAD give region_pad=0",
        pad,
        "learned, as in NATOPS" if pad == 0 else "zeros, as in MUG",
    )
    return pad


def _join(lfae: LfaeConfig, dm: DmConfig, *, residual_flow: bool, where: str) -> LfdmConfig:
    try:
        return LfdmConfig(lfae, dm, residual_flow)
    except ValueError as error:
        raise CheckpointError(
            f"{where} do not fit each other: {error}; give an LFAE and a DM that were trained together"
        ) from error


def _without_memory(build: Callable[[], N], where: str) -> N:
    """Build a network whose tensors take no memory, whatever their sizes, until all shapes are compared."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, ValueError, OverflowError) as error:  # for sizes beyond 64 bits
        reason = first_line(error, 160)
        raise CheckpointError(
            f"{where}: no network of these shapes can be built ({reason}); the file is damaged"
        ) from error


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
    """Fill a network without memory with copies of `tensors`, after a check of their keys and shapes."""
    expected = {prefix + key: tensor for key, tensor in network.state_dict().items()}
    _check_keys(tensors, expected, where)
    wrong = [key for key, tensor in expected.items() if tensors[key].shape != tensor.shape]
    if wrong:
        shown = shorten(f"{k} is {list(tensors[k].shape)}, expected {list(expected[k].shape)}" for k in wrong)
        raise CheckpointError(
            f"{where}: {len(wrong)} of {len(expected)} tensors have a wrong shape: {shown}; "
            "the file is damaged or of another model"
        )
    state = {key[len(prefix) :]: _own(tensors[key], expected[key].dtype, key, where) for key in expected}
    network.load_state_dict(state, strict=True, assign=True)
    network.eval().requires_grad_(False)


def _check_keys(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} keys are missing: {shorten(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} of {len(found)} keys are unexpected: {shorten(unexpected)}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}; the file is incomplete or of another model")


def _own(tensor: Tensor, dtype: torch.dtype, key: str, where: str) -> Tensor:
    """A contiguous copy in the network's dtype, with its own memory."""
    numeric = tensor.is_floating_point() if dtype.is_floating_point else not tensor.is_complex()
    if not numeric:
        expected = "a floating-point type" if dtype.is_floating_point else "an integer type"
        raise CheckpointError(f"{where}: {key} has dtype {tensor.dtype}, expected {expected}; save it as {dtype}")
    try:
        copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    except RuntimeError as error:  # out of memory, or a type that has no conversion
        raise CheckpointError(f"{where}: {key} of {tensor.dtype} cannot be read as {dtype}: {error}") from error
    bad = int((~torch.isfinite(copy)).sum())
    if bad:
        raise CheckpointError(
            f"{where}: {key} holds {bad} values of {copy.numel()} that are NaN or infinite; "
            "the training diverged or the file is damaged; use another checkpoint"
        )
    return copy


def _with_exact_schedule(tensors: Mapping[str, Tensor], steps: int, where: str) -> Mapping[str, Tensor]:
    """Replace a schedule in half precision by float32 values, if it is the cosine schedule.

    Half precision cannot represent the last steps' alphas_cumprod (2e-10).
    """
    coarse = {
        name: tensors[f"{_DM_PART}.{name}"]
        for name in _BUFFERS
        if f"{_DM_PART}.{name}" in tensors and tensors[f"{_DM_PART}.{name}"].dtype in (torch.float16, torch.bfloat16)
    }
    if not coarse:
        return tensors
    exact = {name: torch.from_numpy(values) for name, values in cosine_schedule(steps).buffers().items()}
    for name, found in coarse.items():
        rounded = exact[name].to(found.dtype).float()
        tolerance = torch.finfo(found.dtype).eps
        if found.shape == rounded.shape and not torch.isclose(found.float(), rounded, rtol=tolerance, atol=1e-7).all():
            raise CheckpointError(
                f"{where}: {_DM_PART}.{name} has dtype {found.dtype}, too coarse for a noise schedule, and is not the "
                "cosine schedule that could replace it; save the schedule as float32"
            )
    logger.info("%s: the noise schedule is the cosine one in half precision; taking its float32 values", where)
    same_shape = {name: exact[name] for name, found in coarse.items() if found.shape == exact[name].shape}
    return {**tensors, **{f"{_DM_PART}.{name}": values for name, values in same_shape.items()}}


def _check_schedule(schedule: Schedule, where: str) -> None:
    a, p = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    problem = None
    if not (a > 0).all() or not (a < 1).all():
        problem = f"{_DM_PART}.alphas_cumprod reaches from {a.min():.3g} to {a.max():.3g}, expected between 0 and 1"
    elif not (np.diff(a) < 0).all():
        problem = f"{_DM_PART}.alphas_cumprod rises at step {int(np.argmax(np.diff(a) >= 0)) + 1}, expected to fall"
    elif not np.allclose(p, np.concatenate([[1.0], a[:-1]]), rtol=1e-4, atol=0):
        problem = f"{_DM_PART}.alphas_cumprod_prev is not alphas_cumprod of the step before"
    if problem:
        raise CheckpointError(f"{where}: {problem}; the noise schedule is damaged, use another checkpoint")

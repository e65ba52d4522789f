"""Settings of a training run, as frozen dataclasses that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig

Precision = Literal["auto", "fp32", "tf32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
DataName = Literal["procedural", "mug", "mhad", "natops", "plain"]
Size = Literal["small", "published"]
#: Trained parts of an LFAE: regions from landmarks; also the flow, by the warped source; what decodes; all of it.
Learn = Literal["regions", "motion", "decoder", "all"]
#: Trained parts of a distilled DM: its last level, on features that are kept; all of it.
DistillLearn = Literal["last", "all"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICES: tuple[Device, ...] = get_args(Device)
DATA: tuple[DataName, ...] = get_args(DataName)
LEARN: tuple[Learn, ...] = get_args(Learn)
DISTILL_LEARN: tuple[DistillLearn, ...] = get_args(DistillLearn)
SIZES: tuple[Size, ...] = get_args(Size)

#: For clips of 16 frames and 64x64 pixels.
SMALL = LfdmConfig(
    LfaeConfig(
        regions=11,
        width=16,
        max_width=64,
        bottleneck_blocks=2,
        flow_predictor=HourglassConfig(32, max_width=128, blocks=3),
        region_predictor=HourglassConfig(16, max_width=96, blocks=3),
        bg_predictor=HourglassConfig(8, max_width=64, blocks=4),
    ),
    DmConfig(
        width=16,
        multipliers=(1, 4, 8),
        heads=2,
        head_width=8,
        rotary_width=8,
        feature_channels=64,
        text_width=64,
    ),
    # An offset is 0 where nothing moves, so the mean of the flow, which the DM has to learn, is near 0.
    residual_flow=True,
)
#: By number of steps: the times of the chain, as shares of the schedule; chosen by experiments with the shipped model.
DEFAULT_TIMES: dict[int, tuple[float, ...]] = {1: (0.7,), 2: (0.875, 0.475), 4: (0.9, 0.7, 0.5, 0.25)}

#: Final step size along a cosine, as a share of the initial one.
COSINE_END = 0.02


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam, and the schedule of its step size.

    Attributes:
        learning_rate: initial step size.
        betas: Adam's betas.
        milestones: shares of the run after each of which the step size is multiplied by `factor`.
        factor: factor of the step size at each milestone.
        warm_up: steps in which the step size rises from 0.
        cosine: reduce the step size along half a cosine, to `COSINE_END` of its initial value.
        clip_norm: maximum norm of the gradients; 0 for no limit.
    """

    learning_rate: float
    betas: tuple[float, float]
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    warm_up: int = 0
    clip_norm: float = 0.0
    cosine: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a value is out of range.
        """
        _require(self.learning_rate > 0, f"learning_rate must be above 0, not {self.learning_rate}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), not {self.betas}")
        _require(all(0 < share <= 1 for share in self.milestones), f"milestones are shares, not {self.milestones}")
        _require(self.factor > 0 and self.warm_up >= 0 and self.clip_norm >= 0, f"values out of range: {self}")

    def rate(self, step: int, steps: int) -> float:
        """Step size of step `step` (from 0) out of `steps`."""
        passed = sum(step >= share * steps for share in self.milestones)
        ramp = min((step + 1) / self.warm_up, 1.0) if self.warm_up else 1.0
        if self.cosine:
            ramp *= COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2
        return self.learning_rate * self.factor**passed * ramp


#: Spec: the published settings; its milestones are epochs 60 and 90 of 100.
LFAE_OPTIMIZER = OptimizerSettings(2e-4, (0.5, 0.999), milestones=(0.6, 0.9))
DM_OPTIMIZER = OptimizerSettings(1e-4, (0.9, 0.99))
#: Of the last level alone, by experiments with the shipped model; with an EMA of `LAST_EMA`.
LAST_OPTIMIZER = OptimizerSettings(1.5e-3, (0.9, 0.95), warm_up=20, clip_norm=2.0, cosine=True)
LAST_EMA, LAST_UPDATES, LAST_BATCH = 0.98, 800, 8


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run.

    Attributes:
        steps: steps of the optimizer.
        batch_size: examples per forward pass.
        accumulate: forward passes per step.
        seed: seed of the run.
        ema: decay of the averaged weights, which become the checkpoint; 0 for the weights themselves.
        checkpoint_every, preview_every, log_every: steps between them; 0: only at the end (previews, logs: never).
        workers: processes that make examples.
        device: "auto" uses a GPU if one is available.
        precision: "auto" is the stage's default on a GPU, and fp32 on a CPU.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    ema: float = 0.999
    checkpoint_every: int = 500
    preview_every: int = 0
    log_every: int = 50
    workers: int = 0
    device: Device = "auto"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a value is out of range.
        """
        _require(
            min(self.steps, self.batch_size, self.accumulate) >= 1,
            f"steps, batch_size and accumulate must be 1 or more: {self}",
        )
        _require(0 <= self.seed < 2**63, f"seed must be 0 to 2^63 - 1, not {self.seed}")
        _require(0 <= self.ema < 1, f"ema must be in [0, 1), not {self.ema}")
        intervals = (self.checkpoint_every, self.preview_every, self.log_every, self.workers)
        _require(min(intervals) >= 0, f"intervals and workers must be 0 or more: {self}")

"""The recipe of the shipped model, chosen from what helped in the runs that its model card lists.

Changes from those runs: large pools, a still background and the first frame as source from the start; the motion has
its own phase, which skips the decoder; one long phase for everything, with light weights of the losses that only guide
the motion; one DM, trained on the final LFAE. Neither steps nor weights were searched for.
"""

from __future__ import annotations

from lfdm_export.recipe.parts import (
    BundlePart,
    DistillPart,
    DmPart,
    EvaluationPart,
    LfaePart,
    ModelPart,
    Recipe,
    SchedulePart,
    Training,
)
from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.training.settings import (
    LAST_BATCH,
    LAST_EMA,
    LAST_OPTIMIZER,
    LAST_UPDATES,
    SMALL,
    OptimizerSettings,
    Precision,
    RunSettings,
)

_POOL = 4096
#: Steps between checkpoints: some minutes on one core of a CPU.
_CHECKPOINT_EVERY = 100


def _lfae(rate: float, steps: int, *, batch: int, ema: float, seed: int, precision: Precision = "bf16") -> Training:
    optimizer = OptimizerSettings(rate, (0.9, 0.999), warm_up=50, clip_norm=10.0, cosine=True)
    return Training(optimizer, _run(steps, batch, ema, seed, precision), _POOL)


def _dm(steps: int, *, batch: int, ema: float, seed: int) -> Training:
    optimizer = OptimizerSettings(1e-3, (0.9, 0.99), warm_up=50, clip_norm=1.0, cosine=True)
    return Training(optimizer, _run(steps, batch, ema, seed, "fp32"), pool=2400)


def _last(*, seed: int) -> Training:
    return Training(LAST_OPTIMIZER, _run(LAST_UPDATES, LAST_BATCH, LAST_EMA, seed, "fp32"), pool=0)


def _run(steps: int, batch: int, ema: float, seed: int, precision: Precision) -> RunSettings:
    return RunSettings(
        steps, batch, seed=seed, ema=ema, checkpoint_every=_CHECKPOINT_EVERY, precision=precision, log_every=50
    )


CHARACTERS64 = Recipe(
    name="characters64",
    version=1,
    config=SMALL,
    image_size=64,
    frames=16,
    parts=(
        LfaePart(
            "regions",
            _lfae(2e-3, 6000, batch=16, ema=0.995, seed=0, precision="fp32"),
            learn="regions",
            equivariance=1.0,
            landmarks=6.0,
            camera_still=True,
        ),
        LfaePart(
            "motion",
            _lfae(1e-3, 4000, batch=16, ema=0.995, seed=1),
            start="regions",
            learn="motion",
            equivariance=1.0,
            landmarks=6.0,
            mixture=2.0,
            from_first=True,
            camera_still=True,
        ),
        LfaePart(
            "all",
            _lfae(8e-4, 30000, batch=8, ema=0.998, seed=2),
            start="motion",
            equivariance=0.2,
            landmarks=0.5,
            mixture=0.3,
            from_first=True,
            camera_still=True,
        ),
        DmPart("dm", _dm(10000, batch=8, ema=0.998, seed=3), lfae="all", signal_std=0.05),
        BundlePart("untuned-bundle", lfae="all", dm="dm"),
        SchedulePart(
            "tuned",
            bundle="untuned-bundle",
            steps=(4, 5, 6),
            conditions=32,
            clips=16,
            generations=4,
            candidates=9,
            seed=0,
        ),
        DistillPart("distilled", _last(seed=4), lfae="all", dm="dm", steps=1),
        ModelPart("model", lfae="all", dm="dm", tuned="tuned", distilled="distilled"),
        BundlePart("bundle", lfae="all", dm="dm", tuned="tuned"),
        BundlePart("distilled-bundle", lfae="all", dm="distilled", distilled=True),
        EvaluationPart(
            "evaluation",
            bundle="bundle",
            settings=(
                *(SamplingOptions("ddim", steps) for steps in (10, 25, 50)),
                *(SamplingOptions("tuned", steps) for steps in (4, 5, 6)),
                *(SamplingOptions("sde-dpm++2m", steps) for steps in (5, 10)),
            ),
            clips=8,
        ),
        EvaluationPart(
            "distilled-evaluation", bundle="distilled-bundle", settings=(SamplingOptions("tuned", 1),), clips=8
        ),
    ),
)

#: Recipes by name.
RECIPES: dict[str, Recipe] = {CHARACTERS64.name: CHARACTERS64}

"""What a bundle holds for single targets: TensorRT's plans, PyTorch's weights."""

from __future__ import annotations

from lfdm_export.bundle.reader import TORCH_WEIGHTS, Bundle
from lfdm_export.engines.targets import PLAN_TARGETS, Target
from lfdm_export.engines.tensorrt.plans import remake, targets_with_plans


def held_targets(bundle: Bundle) -> tuple[Target, ...]:
    """The targets that the bundle holds all for that they need, fit or not, beside its graphs."""
    weights: tuple[Target, ...] = ("torch",) if TORCH_WEIGHTS in bundle.manifest.files else ()
    return (*targets_with_plans(bundle), *weights)


def why_not_held(bundle: Bundle, target: Target) -> str:
    """What the bundle lacks for a target, with the remedy, in a clause; "" for nothing."""
    if target in PLAN_TARGETS and target not in targets_with_plans(bundle):
        return f"the bundle has no plans for it: {remake(bundle.path, target)}"
    if target == "torch" and TORCH_WEIGHTS not in bundle.manifest.files:
        return "the bundle holds no weights for PyTorch: export it again from its checkpoints with --target torch"
    return ""

"""What a bundle holds for single targets: plans for TensorRT, weights for PyTorch."""

from __future__ import annotations

from lfdm_export.bundle.reader import TORCH_WEIGHTS, Bundle
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import spec_of, target_names
from lfdm_export.engines.tensorrt.plans import PlanFolder, remake


def held_targets(bundle: Bundle) -> tuple[Target, ...]:
    """The targets that need more than graphs and for which the bundle holds all of it, whether it matches or not."""
    return tuple(name for name in target_names("plans", "weights") if not why_not_held(bundle, name))


def why_not_held(bundle: Bundle, target: Target) -> str:
    """What the bundle lacks for a target, with the remedy, as a clause; "" if nothing."""
    spec = spec_of(target)
    if spec.takes == "plans" and not set(bundle.stages) <= set(PlanFolder(bundle.path, target).stages()):
        return f"the bundle has no plans for it: {remake(bundle.path, target)}"
    if spec.takes == "weights" and TORCH_WEIGHTS not in bundle.manifest.files:
        return (
            f"the bundle holds no weights for {spec.title}: export it again from its checkpoints with --target {target}"
        )
    return ""

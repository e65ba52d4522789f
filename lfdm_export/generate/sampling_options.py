"""How a clip is to be sampled, as a caller says it, and what that means for a bundle."""

from __future__ import annotations

from dataclasses import dataclass

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.errors import InputError
from lfdm_export.generate.arguments import finite_number
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tables import SAMPLERS, sampler_table
from lfdm_export.sampling.tuned import TUNED
from lfdm_models.schedule import Schedule, cosine_schedule


@dataclass(frozen=True)
class SamplingOptions:
    """None stands for the bundle's default, which counts for its own default sampler alone.

    Attributes:
        sampler: a name of `lfdm_export.sampling.tables.SAMPLERS`, or "tuned".
        steps: sampling steps.
        eta: share of fresh noise, 0 … 1, of samplers that have one.
        guidance_scale: 1 for the conditional prediction, 0 for the unconditional one, above 1 for more of the label.
    """

    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None

    def table(self, manifest: Manifest) -> SamplerTable:
        """The sampler that is meant.

        Raises:
            InputError: it is unknown, or cannot do with these steps or this eta.
        """
        defaults, sampler, steps, eta = manifest.sampler, self.sampler, self.steps, self.eta
        if sampler is None or sampler == defaults.sampler:
            sampler = defaults.sampler
            steps = defaults.steps if steps is None else steps
            eta = defaults.eta if eta is None else eta
        schedule = cosine_schedule(manifest.config.dm.training_steps)
        if sampler == TUNED:
            return _tuned_table(manifest, schedule, steps, eta)
        return sampler_table(sampler, schedule, steps, None if eta is None else finite_number(eta, "eta"))

    def scale(self, manifest: Manifest) -> float:
        """The guidance scale that is meant.

        Raises:
            InputError: it is not finite.
        """
        if self.guidance_scale is None:
            return manifest.sampler.guidance_scale
        return finite_number(self.guidance_scale, "guidance_scale")

    def settings(self, manifest: Manifest) -> dict[str, object]:
        """What a clip's metadata say of its sampling.

        Raises:
            InputError: see `table` and `scale`.
        """
        table = self.table(manifest)
        return {
            "sampler": table.name,
            "steps": table.steps,
            "eta": manifest.sampler.eta_of(table.name, self.eta),
            "guidance_scale": self.scale(manifest),
        }


def _tuned_table(manifest: Manifest, schedule: Schedule, steps: int | None, eta: float | None) -> SamplerTable:
    if manifest.tuned is None:
        raise InputError(
            f"sampler: found {TUNED!r}, but this bundle has no tuned sampler; choose one of {', '.join(SAMPLERS)}, "
            "or tune one: lfdm-train schedule"
        )
    if eta is not None:
        raise InputError(f"eta: found {eta}, but sampler {TUNED!r} has its own noise; leave it out")
    return manifest.tuned.table(schedule, steps)

"""The target that runs a bundle: the fastest available one that returns what PyTorch returned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.self_check import VARIABLE, Finding, Runner, SelfCheck
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import Choice, spec_of, target_names
from lfdm_export.errors import BundleError, EngineError, MissingDependencyError
from lfdm_export.machine import processor_name
from lfdm_export.stages import CHAIN_TOLERANCES

logger = logging.getLogger(__name__)

#: A later target replaces an earlier one if it needs less than this share of its time.
_FASTER = 0.9
#: Precisions in which targets are known to differ.
_DELICATE = ("bf16", "int8", "fp8")


def choose_checked(
    bundle: Bundle,
    able: Sequence[Choice],
    make: Callable[[Target], Runner],
    *,
    named: bool,
    threads: int | None = None,
    device: str = "cpu",
) -> tuple[Choice, Runner | None]:
    """Check targets that have no finding on this machine, and choose one.

    Targets for which the bundle holds plans or weights come first, in their order; of the targets that run graphs on
    the CPU, the fastest is used. A bundle without a reference cannot be checked: then ONNX Runtime comes first, which
    computes in float32 where it has no kernel.

    Args:
        bundle: the bundle to run.
        able: targets that can run it, in order of preference; only one if it was requested by name.
        make: makes what runs the stages of the bundle with a target.
        named: whether the target was requested by name.
        threads: threads per engine; None uses all cores.
        device: device of the target, if it has this option.

    Returns:
        The choice, and its runner if the check loaded the engines.

    Raises:
        EngineError: no target passes; the message has the figures.
    """
    if bundle.manifest.precision not in CHAIN_TOLERANCES:
        why_not = f"this program knows no tolerances of {bundle.manifest.precision}"
    elif bundle.reference_path is None:
        why_not = "the bundle holds no reference to compare with"
    else:
        try:
            check = SelfCheck(bundle, threads=threads, device=device)
            return _Choosing(bundle, able, make, check, named=named).choose()
        except BundleError as error:  # from the reference
            why_not = str(error)
    return _unchecked(bundle, able, why_not, named=named), None


def _unchecked(bundle: Bundle, able: Sequence[Choice], why: str, *, named: bool) -> Choice:
    precision = bundle.manifest.precision
    choice = able[0]
    if not named and spec_of(_target(choice)).takes == "graphs":
        choice = min(able, key=lambda one: target_names().index(_target(one)))
    if precision in _DELICATE:
        logger.warning(
            "%s in %s is not checked on this machine: %s; compare it with the model: lfdm-verify %s",
            spec_of(_target(choice)).title, precision, why, bundle.path,
        )  # fmt: skip
    return Choice(choice.target, f"{choice.reason}; not checked on this machine: {why}")


def _target(choice: Choice) -> Target:
    assert choice.target is not None, "only plans can be made by nothing"
    return choice.target


class _Choosing:
    """The work of `choose_checked`."""

    def __init__(
        self,
        bundle: Bundle,
        able: Sequence[Choice],
        make: Callable[[Target], Runner],
        check: SelfCheck,
        *,
        named: bool,
    ) -> None:
        self._bundle, self._able, self._make, self._check, self._named = bundle, able, make, check, named
        self._runners: dict[Target, Runner] = {}
        self._against: dict[Target, str] = {}

    def choose(self) -> tuple[Choice, Runner | None]:
        reasons = {_target(choice): choice.reason for choice in self._able}
        graphs = [target for target in reasons if spec_of(target).takes == "graphs"]
        for group in (*([target] for target in reasons if target not in graphs), graphs):
            for target, seconds in self._by_speed(group):
                if self._find(target, whole=True) is not None:
                    reason = reasons[target] + self._why(target, seconds)
                    return Choice(target, reason), self._runners.get(target)
        raise EngineError(self._message())

    def _by_speed(self, group: Sequence[Target]) -> list[tuple[Target, dict[Target, float]]]:
        """The targets of a group that pass so far, the first choice first, each with the seconds of all."""
        found = {target: self._find(target, whole=False) for target in group}
        seconds = {target: finding.seconds for target, finding in found.items() if finding is not None}
        order: list[Target] = []
        left = list(seconds)
        while left:
            best = left[0]
            for target in left[1:]:
                if seconds[target] < _FASTER * seconds[best]:
                    best = target
            order.append(best)
            left.remove(best)
        return [(target, seconds) for target in order]

    def _find(self, target: Target, *, whole: bool) -> Finding | None:
        """The finding of a target; None if it does not pass, with the reason stored."""
        try:
            if target not in self._runners:
                self._runners[target] = self._make(target)
            finding = self._check.check(target, self._runners[target], whole=whole)
        except (EngineError, MissingDependencyError) as error:
            if len(self._able) == 1:
                raise
            self._against[target] = str(error)
            return None
        if finding.wrong:
            self._against[target] = "; ".join(finding.wrong)
            if not self._named:
                title = spec_of(target).title
                logger.warning("%s is wrong on this machine and not used: %s", title, self._against[target])
            return None
        return finding

    def _why(self, target: Target, seconds: dict[Target, float]) -> str:
        others = [
            f"{spec_of(other).title} takes {needed:.2g} s"
            for other, needed in seconds.items()
            if other != target and other not in self._against
        ]
        wrong = [f"not {spec_of(other).title}, which is wrong here: {why}" for other, why in self._against.items()]
        passed = f"passed the self-check on this machine, {seconds[target]:.2g} s for its clip"
        return "; ".join(["", passed, *others, *wrong])

    def _message(self) -> str:
        precision = self._bundle.manifest.precision
        listed = " | ".join(f"{spec_of(target).title}: {why}" for target, why in self._against.items())
        remedy = "export another precision" if not self._named else "use another --target, or export another precision"
        device = self._check.device
        place = f"processor ({processor_name()})" if device == "cpu" else f"machine's device {device!r}"
        return (
            f"{self._bundle.path} in {precision} comes out wrong on this {place}: {listed}; "
            f"{remedy}, or take it as it is with {VARIABLE}=0 (self_check=False)"
        )

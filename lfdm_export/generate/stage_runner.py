"""The stages of one bundle as functions of arrays; each loads its engine on first use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.device import DeviceMemoryError
from lfdm_export.engines.device_chain import DeviceChain
from lfdm_export.engines.held import held_targets
from lfdm_export.engines.interface import ClipMaker, Engine, KeepsInputs, KeepsState, StateLoop
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.engines.self_check import is_enabled
from lfdm_export.engines.self_check_choice import choose_checked
from lfdm_export.engines.target_spec import ClipMakerLoader, DeviceChainLoader, Loader, Target
from lfdm_export.engines.targets import AUTO, TARGETS, Choice, check_target_name, device_target, find_targets, spec_of
from lfdm_export.errors import EngineError
from lfdm_export.machine import available_cores, engine_threads, package_versions, processor_facts
from lfdm_export.sampling.loop import sample as run_loop
from lfdm_export.sampling.noise import START, NoiseSource
from lfdm_export.sampling.rows import SamplerTable

logger = logging.getLogger(__name__)

Float32: TypeAlias = NDArray[np.float32]
#: Called after each step with its index and the latent, or None if the latent is neither requested nor on the host.
OnStep: TypeAlias = Callable[[int, Float32 | None], None]
#: Called after each step with its index and the estimate of the latent without noise, (B, 3, T, h, w).
OnEstimate: TypeAlias = Callable[[int, Float32], None]


class StageRunner:
    """Runs stages and keeps loaded engines. Use it from one thread at a time."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        device: Device = "cpu",
        target: str = AUTO,
        self_check: bool = True,
    ) -> None:
        """Use a bundle; nothing is loaded yet.

        Args:
            bundle: the bundle.
            threads: threads per engine on a CPU; None uses all cores.
            device: device for ONNX Runtime; see `OnnxRuntimeEngine`.
            target: a name in `lfdm_export.engines.targets`; "auto" selects the fastest target that is available.
            self_check: use a target only after a comparison on this machine, as `lfdm_export.engines.self_check`
                describes. The environment variable LFDM_SELF_CHECK=0 also turns it off.

        Raises:
            InputError: the target is unknown.
        """
        check_target_name(target, AUTO)
        self.bundle = bundle
        self._specs = bundle.stages
        engine_threads(threads)  # else an error of each engine, later
        self._threads, self._device, self._asked = threads, device, target
        self._self_check = self_check
        self._engines: dict[str, Engine] = {}
        self._loops: dict[tuple[str, int, int], StateLoop] = {}
        self._makers: dict[tuple[str, int], ClipMaker | None] = {}
        self._most_rows: dict[tuple[str, int], int] = {}

    @functools.cached_property
    def choice(self) -> Choice:
        """The target that runs the stages, and the reason. The first access may run the self-check (seconds).

        Raises:
            EngineError: the requested target is not available or gives wrong results here, or no target runs
                the bundle.
        """
        able, named = self._able(), self._asked != AUTO or self._device != "cpu"
        choice = able[0]
        if self._self_check and is_enabled():
            choice, runner = choose_checked(
                self.bundle, able, self._unchecked, named=named, threads=self._threads, device=self._device
            )
            if isinstance(runner, StageRunner):  # keep the engines that the check loaded
                self._engines, self._loops, self._makers = runner._engines, runner._loops, runner._makers
        logger.info("target %s: %s", choice.target, choice.reason)
        return choice

    def _able(self) -> tuple[Choice, ...]:
        """The targets that can run the bundle, the preferred one first."""
        if self._device != "cpu":
            spec = device_target(self._device)
            if self._asked in (AUTO, spec.name):  # even if it lacks the precision on a CPU
                return (Choice(spec.name, f"the device {self._device!r} is {spec.title}'s"),)
        return find_targets(self._asked, "run", self.bundle.manifest.precision, plans=held_targets(self.bundle))

    def _unchecked(self, target: Target) -> StageRunner:
        """A runner of the same bundle with one target, without the check."""
        return StageRunner(self.bundle, threads=self._threads, device=self._device, target=target, self_check=False)

    @property
    def target(self) -> Target:
        """The name of the target in `choice`."""
        target = self.choice.target
        assert target is not None, "only plans can be made by nothing"
        return target

    def engine_facts(self) -> dict[str, object]:
        """What runs the stages, as plain JSON values: equal facts mean equal bits.

        Raises:
            EngineError: the requested target is not available or gives wrong results here, or no target runs
                the bundle.
        """
        return {
            "target": self.target,
            "device": self._device,
            "threads": self._threads or available_cores(),
            "versions": package_versions(spec_of(self.target).distributions),
            "processor": processor_facts(),
        }

    def run(self, stage: str, *tensors: NDArray[np.generic]) -> tuple[Float32, ...]:
        """Run one stage.

        Args:
            stage: its name.
            tensors: its inputs, in the order of its `StageSpec`; a batch above the maximum of the stage is
                split into parts.

        Returns:
            Its outputs, in the order of its `StageSpec`.

        Raises:
            EngineError: the engine cannot be loaded, the inputs do not match, or the run fails.
        """
        engine = self.engine(stage)
        spec = engine.spec
        if len(tensors) != len(spec.inputs):
            raise EngineError(f"stage {stage!r} takes {len(spec.inputs)} inputs, found {len(tensors)}")
        parts = []
        for part in _parts(max(map(len, tensors)), spec.batch[2]):
            feeds = {spec.name: array[part] for spec, array in zip(spec.inputs, tensors, strict=True)}
            outputs = engine.run(feeds)
            parts.append([outputs[tensor.name] for tensor in spec.outputs])
        joined = (some[0] if len(some) == 1 else np.concatenate(some) for some in zip(*parts, strict=True))
        return cast(tuple[Float32, ...], tuple(joined))

    def run_each(
        self, stage: str, fixed: Sequence[NDArray[np.float32]], parts: Sequence[NDArray[np.float32]]
    ) -> Iterator[tuple[Float32, ...]]:
        """Run one stage once per part, with other inputs that stay the same.

        An engine that can keep inputs gets those once, and runs several parts as rows of one batch, as many as its
        memory allows.

        Args:
            stage: its name.
            fixed: its inputs but the last, in the order of its `StageSpec`, (batch, …) each.
            parts: its last input of each run, (batch, …).

        Yields:
            Its outputs for each part.

        Raises:
            EngineError: the engine cannot be loaded, the inputs do not match, or a run fails.
        """
        engine, batch = self.engine(stage), len(fixed[0])
        most = engine.spec.batch[2] // batch
        if not isinstance(engine, KeepsInputs) or len(parts) == 1 or not most:
            for part in parts:
                yield self.run(stage, *fixed, part)
            return
        *names, last = (tensor.name for tensor in engine.spec.inputs)
        given, done = dict(zip(names, fixed, strict=True)), 0
        most = min(most, self._most_rows.get((stage, batch), most))
        while done < len(parts):
            left = parts[done:]
            rows = -(-len(left) // -(-len(left) // most))  # equal groups
            try:
                kept = engine.keep(given, rows)
                for first in range(0, len(left), rows):
                    some = left[first : first + rows]
                    stacked = np.stack([*some, *[some[-1]] * (rows - len(some))], axis=1)
                    outputs = kept.run({last: stacked.reshape(batch * rows, *stacked.shape[2:])})
                    split = [cast(Float32, outputs[tensor.name]) for tensor in engine.spec.outputs]
                    apart = [array.reshape(batch, rows, *array.shape[1:]) for array in split]
                    for row in range(len(some)):
                        yield tuple(array[:, row] for array in apart)
                    done += len(some)
            except DeviceMemoryError as error:
                if rows == 1:
                    raise
                logger.info("%s does not fit with %d rows per sample: %s", stage, rows, error)
                most = self._most_rows[stage, batch] = max(1, rows // 2)

    def sample(
        self,
        stage: str | Sequence[str],
        fixed: Mapping[str, Float32],
        table: SamplerTable,
        source: NoiseSource,
        *,
        on_step: OnStep | None = None,
        every_latent: bool = False,
        on_estimate: OnEstimate | None = None,
    ) -> Float32:
        """Run a whole chain. Its state stays on the device if one engine runs all of it and can keep it there.

        Args:
            stage: "step" or "step_guided", for all steps or one per step.
            fixed: the inputs that no step changes, by name.
            table: the sampler.
            source: source of the noise for the start and for the steps that draw noise.
            on_step: called for each step that was done or, by an engine that keeps the state, queued.
            every_latent: pass the latent of every step to `on_step`; such an engine then has to copy it to the host.
            on_estimate: called with the estimate of each step; the state then leaves the engine at every step.

        Returns:
            The last latent, (B, 3, T, h, w) float32.

        Raises:
            EngineError: the engine cannot be loaded or fails.
        """
        stages = [stage] * table.steps if isinstance(stage, str) else list(stage)
        engine = self.engine(stages[0])
        start = source(START)
        if isinstance(engine, KeepsState) and len(set(stages)) == 1 and on_estimate is None:
            return self._sample_there(engine, stages[0], fixed, table, start, source, on_step, every_latent)
        names = {name: [tensor.name for tensor in self.engine(name).spec.inputs] for name in set(stages)}
        following = iter(stages)

        def step(
            noisy_latent: Float32, timestep: NDArray[np.int64], history: Float32, noise: Float32, coefficients: Float32
        ) -> tuple[Float32, Float32]:
            state: dict[str, NDArray[np.generic]] = {
                "noisy_latent": noisy_latent,
                "timestep": timestep,
                "history": history,
                "noise": noise,
                "coefficients": coefficients,
            }
            state.update(fixed)
            current = next(following)
            next_latent, next_history = self.run(current, *(state[name] for name in names[current]))
            return next_latent, next_history

        def told(index: int, latent: Float32, history: Float32) -> None:
            if on_step is not None:
                on_step(index, latent)
            if on_estimate is not None:
                on_estimate(index, history[:, 1])

        return run_loop(step, table, start, source, on_step=told)

    def _sample_there(
        self,
        engine: KeepsState,
        stage: str,
        fixed: Mapping[str, Float32],
        table: SamplerTable,
        start: Float32,
        source: NoiseSource,
        on_step: OnStep | None,
        every_latent: bool,
    ) -> Float32:
        """`sample` with loops of the engine itself, one per part of the batch."""
        parts = _parts(len(start), self._specs[stage].batch[2])
        loops = []
        for number, part in enumerate(parts):
            key = stage, number, len(start[part])
            if key not in self._loops:
                self._loops[key] = engine.denoise_loop(len(start[part]))
            loops.append(self._loops[key])
            loops[-1].begin(start[part], {name: values[part] for name, values in fixed.items()}, table)
        for index in range(table.steps):
            noise = source(index) if table.draws_noise[index] else None
            for loop, part in zip(loops, parts, strict=True):
                loop.step(index, None if noise is None else noise[part])
            if on_step is not None:
                on_step(index, np.concatenate([loop.latent() for loop in loops]) if every_latent else None)
        return np.concatenate([loop.finish() for loop in loops])

    def clip_maker(self, stage: str, batch: int) -> ClipMaker | None:
        """What makes whole clips of a batch size on the device; None if only single stages run there.

        Args:
            stage: the sampling stage, "step" or "step_guided".
            batch: number of samples made together.

        Raises:
            EngineError: an engine cannot be loaded.
        """
        entry = spec_of(self.target).clip_maker
        if not entry or batch > self._specs[stage].batch[2]:
            return None
        key = stage, batch
        if key not in self._makers:
            load: ClipMakerLoader = resolve_name(entry)
            self._makers[key] = load(self.bundle, stage, batch, self._threads)
        return self._makers[key]

    @functools.cached_property
    def device_chain(self) -> DeviceChain[Any]:
        """Encode, sampling steps and decode on the device of the target, where clips stay.

        Raises:
            EngineError: the target keeps no clips on a device, or a stage cannot be prepared there.
        """
        entry = spec_of(self.target).device_chain
        if not entry:
            able = [spec.name for spec in TARGETS if spec.device_chain]
            raise EngineError(
                f"the target {self.target!r} keeps no clips on a device; take one of {', '.join(able)}, or turn "
                "on_device off"
            )
        load: DeviceChainLoader = resolve_name(entry)
        return load(self.bundle, self.target, self._threads)

    @property
    def prefers_device(self) -> bool:
        """Whether clips are better kept on the device: there is a GPU, and the target can."""
        return bool(spec_of(self.target).device_chain and find_gpus()[0])

    def state(self) -> str:
        """The target and the loaded stages, in one line; this loads and decides nothing."""
        target = self.__dict__["choice"].target if "choice" in self.__dict__ else self._asked
        return f"target {target}, loaded: {', '.join(self.loaded) or 'nothing yet'}"

    @property
    def loaded(self) -> tuple[str, ...]:
        """The stages whose engines are loaded."""
        return tuple(self._engines)

    def engine(self, stage: str) -> Engine:
        """The stage's engine.

        Raises:
            BundleError: the bundle has no such stage.
            EngineError: the engine cannot be loaded.
        """
        if stage not in self._engines:
            self._engines[stage] = load_engine(
                self.bundle, stage, self.target, threads=self._threads, device=self._device
            )
        return self._engines[stage]


def load_engine(
    bundle: Bundle, stage: str, target: Target, *, threads: int | None = None, device: Device = "cpu"
) -> Engine:
    """Load one stage for a target.

    Args:
        bundle: the bundle.
        stage: its name.
        target: what runs it.
        threads: threads on a CPU; None uses all cores.
        device: device for ONNX Runtime.

    Raises:
        BundleError: the bundle has no such stage.
        EngineError: the engine cannot be loaded.
        MissingDependencyError: the target's package is not installed.
    """
    bundle.stage_path(stage)
    load: Loader = resolve_name(spec_of(target).load)
    return load(bundle, stage, target, threads, device)


def _parts(batch: int, largest: int) -> list[slice]:
    """Split a batch into parts of at most `largest` samples."""
    return [slice(start, start + largest) for start in range(0, batch, largest)]

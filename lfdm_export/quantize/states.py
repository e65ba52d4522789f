"""States of the stages along real sampling trajectories, for calibrating and comparing activations.

The float32 graphs run with ONNX Runtime and sample whole chains of every sampler, with and without a label and with
guidance. The last chain is held out: only comparisons use it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.engines.checks import Array
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.graphs import trace
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.progress import Progress, report
from lfdm_export.quantize.layers import find_layers
from lfdm_export.quantize.ranges import Observed
from lfdm_export.reference.inputs import draw_pictures
from lfdm_export.sampling.loop import sample, step_from_denoiser
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import Geometry, StageSpec, TensorSpec, stage_specs
from lfdm_models.schedule import Schedule

Float32: TypeAlias = NDArray[np.float32]
Feeds: TypeAlias = dict[str, Array]

#: The stages that are calibrated; the UNet's other graphs have the same layers as `denoise`.
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Calibration:
    """The samples for calibration.

    Attributes:
        chains: sampled in turn with labels and pictures, with fewer steps if the schedule is shorter. They differ in
            their numbers of steps, and so in timesteps.
        label_chain: an additional chain for each label beyond the number of `chains`.
        held_out: the chain for comparisons only.
        values: values of each activation kept per state.
        chunks: decoded chunks of frames per chain.
        kept_states: states of the held-out chain per stage.
        shift_states: states per stage for the correction of biases, spread over all chains; more change no clip of the
            shipped model by more than 1 dB.
        seed: seed of pictures, noise and the choice of values.
    """

    chains: tuple[SamplingOptions, ...] = (
        SamplingOptions("ddim", 10, 1.0),
        SamplingOptions("dpm++2m", 8),
        SamplingOptions("unipc", 7),
        SamplingOptions("ddim", 6, 0.0, guidance_scale=0.0),
        SamplingOptions("ddim", 5, 1.0, guidance_scale=2.5),
    )
    label_chain: SamplingOptions = SamplingOptions("ddim", 4, 1.0)
    held_out: SamplingOptions = SamplingOptions("ddim", 9, 1.0)
    values: int = 4096
    chunks: int = 2
    kept_states: int = 2
    shift_states: int = 20
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Sources:
    """The data for sampling states.

    Attributes:
        graphs: float32 graphs of every stage, by name; they are not changed.
        geometry: sizes of the stages.
        schedule: noise schedule of the DM.
        embeddings: text embeddings (text_width,) to draw from; if empty, random ones are used.
        null_embedding: (text_width,), for "no label".
    """

    graphs: Mapping[str, ir.Model]
    geometry: Geometry
    schedule: Schedule
    embeddings: tuple[Float32, ...]
    null_embedding: Float32


@dataclass(eq=False)
class Calibrated:
    """The result of `calibrate`.

    Attributes:
        observed: values of each layer's activation, by stage and by the layer's name.
        held_out: feeds of each stage, from the held-out chain.
        states: feeds of each stage from the other chains, for the correction of biases.
        evaluations: evaluations of the UNet, those of the held-out chain included.
        timesteps: timesteps of the calibration.
        labels: number of the known labels in the calibration.
    """

    observed: dict[str, dict[str, Observed]] = field(default_factory=lambda: {stage: {} for stage in STAGES})
    held_out: dict[str, list[Feeds]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    states: dict[str, list[Feeds]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    evaluations: int = 0
    timesteps: set[int] = field(default_factory=set)
    labels: int = 0


def calibrate(
    sources: Sources,
    calibration: Calibration | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Sample the chains and observe every layer's activation.

    Args:
        sources: graphs and conditions.
        calibration: what to sample; default: `Calibration()`.
        threads: threads of ONNX Runtime; None for all cores.
        progress: called as ``progress("calibrate", done, total)``, in evaluations of the UNet.

    Raises:
        EngineError: a graph cannot be run.
        InputError: a sampler or its arguments cannot be used.
    """
    settings = calibration or Calibration()
    with tempfile.TemporaryDirectory(prefix="lfdm-calibrate-") as folder:
        return _Calibrator(sources, settings, Path(folder), threads, progress).run()


class _Stage:
    """A stage's float32 graph with its layers' activations as additional outputs."""

    def __init__(self, graph: ir.Model, spec: StageSpec, folder: Path, threads: int | None) -> None:
        self.spec = spec
        observing = graph.clone()
        # Layers by their activation; those that share it share its scale.
        self.layers: dict[str, list[str]] = {}
        extra = {}
        own = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        for layer in find_layers(observing):
            value = layer.activation
            assert value.name is not None
            self.layers.setdefault(value.name, []).append(layer.name)
            if value.name not in own and value.name not in extra:
                extra[value.name] = value
        observing.graph.outputs.extend(extra.values())
        trace.save({spec.name: observing}, folder, f"{spec.name}.data")
        outputs = (*spec.outputs, *(_tensor_spec(value) for value in extra.values()))
        wide = dataclasses.replace(spec, outputs=outputs)
        self._engine = OnnxRuntimeEngine(folder / f"{spec.name}.onnx", wide, threads=threads)

    def run(
        self, feeds: Feeds, note: dict[str, Observed] | None, values: int, rng: np.random.Generator
    ) -> dict[str, Array]:
        """Run the stage, and observe the activations."""
        found = self._engine.run(feeds)
        if note is not None:
            tensors = {**feeds, **found}
            for name, layers in self.layers.items():
                observed = note.setdefault(layers[0], Observed())
                observed.add(np.asarray(tensors[name], np.float32), values, rng)
                note.update(dict.fromkeys(layers, observed))
        return {tensor.name: found[tensor.name] for tensor in self.spec.outputs}


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None, f"{value.name} has no shape"
    return TensorSpec(value.name, "float32", tuple(d if isinstance(d, int) else str(d) for d in value.shape))


class _Calibrator:
    """The sampling of `calibrate`."""

    def __init__(
        self,
        sources: Sources,
        settings: Calibration,
        folder: Path,
        threads: int | None,
        progress: Progress | None,
    ) -> None:
        self.sources, self.settings, self.progress = sources, settings, progress
        specs = stage_specs(sources.geometry)
        self.stages = {name: _Stage(sources.graphs[name], specs[name], folder, threads) for name in STAGES}
        self.rng = np.random.default_rng(settings.seed)
        self.result = Calibrated()
        self.fed: dict[str, list[Feeds]] = {stage: [] for stage in STAGES}
        self.chains = _with_every_label(settings, len(sources.embeddings))
        self.tables = [self._table(chain) for chain in self.chains]
        self.total = sum(
            table.steps * len(_branches(chain)) for chain, table in zip(self.chains, self.tables, strict=True)
        )
        self.labeled = 0

    def run(self) -> Calibrated:
        """Sample and decode every chain."""
        pictures = calibration_pictures(self.rng, len(self.chains), self.sources.geometry.image_size)
        for number, (chain, table) in enumerate(zip(self.chains, self.tables, strict=True)):
            held_out = number == len(self.chains) - 1
            image = to_float(pictures[number : number + 1])
            encoded = self._run("encode", {"image": image}, held_out)
            latent = self._sample(chain, table, number, encoded["context"], held_out)
            skips = {name: array for name, array in encoded.items() if name != "context"}
            for part in self._parts(latent):
                self._run("decode", {"image": image, **skips, "latent": part}, held_out)
        self.result.states = {stage: _spread(fed, self.settings.shift_states) for stage, fed in self.fed.items()}
        return self.result

    def _table(self, chain: SamplingOptions) -> SamplerTable:
        most = dataclasses.replace(chain, steps=None).table(self.sources.schedule)
        return most if chain.steps is None or chain.steps >= most.steps else chain.table(self.sources.schedule)

    def _run(self, stage: str, feeds: Feeds, held_out: bool) -> dict[str, Array]:
        note = None if held_out else self.result.observed[stage]
        if not held_out:
            self.fed[stage].append(feeds)
        elif stage != "denoise":
            self._keep(stage, feeds)
        return self.stages[stage].run(feeds, note, self.settings.values, self.rng)

    def _keep(self, stage: str, feeds: Feeds) -> None:
        if len(self.result.held_out[stage]) < self.settings.kept_states:
            self.result.held_out[stage].append(feeds)

    def _sample(
        self, chain: SamplingOptions, table: SamplerTable, number: int, context: Array, held_out: bool
    ) -> Float32:
        g = self.sources.geometry
        embedding = self._embedding(chain, held_out)
        if not held_out:
            self.result.timesteps.update(map(int, table.timesteps))
        # States of the held-out chain: early, late, and evenly between.
        wanted = (
            np.linspace(table.steps - 1, 0, self.settings.kept_states + 1)[:-1].round().astype(int) if held_out else ()
        )
        kept_timesteps = [table.timesteps[index] for index in wanted]

        def denoise(noisy_latent: Float32, timestep: NDArray[np.int64]) -> Float32:
            predicted = np.zeros_like(noisy_latent)
            for weight, labeled in _branches(chain):
                text = embedding if labeled else self.sources.null_embedding
                feeds: Feeds = {
                    "noisy_latent": noisy_latent,
                    "context": context,
                    "text_embedding": text[None],
                    "timestep": timestep,
                }
                if timestep[0] in kept_timesteps:
                    self._keep("denoise", feeds)
                found = self._run("denoise", feeds, held_out)["predicted_noise"]
                predicted += np.float32(weight) * found.astype(np.float32)
                self.result.evaluations += 1
                report(self.progress, "calibrate", self.result.evaluations, self.total)
            return predicted

        source = seeded_noise([self.settings.seed + number], (3, g.frames, g.latent_size, g.latent_size))
        return sample(step_from_denoiser(denoise), table, source(START), source)

    def _embedding(self, chain: SamplingOptions, held_out: bool) -> Float32:
        """The embedding of the next label, if the chain uses a label and there are any."""
        known = self.sources.embeddings
        if not known:
            return self.rng.standard_normal(self.sources.geometry.text_width, np.float32)
        embedding = np.asarray(known[self.labeled % len(known)], np.float32)
        if chain.scale != 0:
            self.labeled += 1
            if not held_out:
                self.result.labels = min(self.labeled, len(known))
        return embedding

    def _parts(self, latent: Float32) -> Iterator[Float32]:
        """Some chunks of a latent's frames, including the first and the last."""
        chunk = self.sources.geometry.chunk_frames
        last = latent.shape[2] - chunk
        for start in sorted({round(last * share) for share in np.linspace(0, 1, self.settings.chunks)}):
            yield np.ascontiguousarray(latent[:, :, start : start + chunk])


def _spread(states: list[Feeds], count: int) -> list[Feeds]:
    """At most `count` of the states, evenly."""
    chosen = np.linspace(0, len(states) - 1, min(count, len(states))).round().astype(int)
    return [states[index] for index in chosen]


def _with_every_label(settings: Calibration, labels: int) -> tuple[SamplingOptions, ...]:
    """The chains, additional ones for the remaining labels, and last the held-out chain."""
    left = max(0, labels - sum(chain.scale != 0 for chain in settings.chains))
    return (*settings.chains, *(settings.label_chain for _ in range(left)), settings.held_out)


def _branches(chain: SamplingOptions) -> list[tuple[float, bool]]:
    """The evaluations of a step: the weight of each, and whether it uses the label."""
    scale = chain.scale
    return [(weight, labeled) for weight, labeled in ((scale, True), (1 - scale, False)) if weight]


def calibration_pictures(rng: np.random.Generator, count: int, size: int) -> NDArray[np.uint8]:
    """Pictures (count, size, size, 3) of all contrasts: smooth ones, blocks with hard edges, noise, in turn."""
    smooth = draw_pictures(rng, count, size)
    cells = max(2, size // 16)
    blocks = rng.integers(0, 256, (count, cells, cells, 3), np.uint8)
    hard = blocks.repeat(-(-size // cells), axis=1).repeat(-(-size // cells), axis=2)[:, :size, :size]
    noise = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    kinds = (smooth, hard, noise)
    return np.stack([kinds[number % len(kinds)][number] for number in range(count)])

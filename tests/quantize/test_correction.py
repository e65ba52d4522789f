"""Bias correction: what it adds in closed form, which layers it leaves alone, and what it does to a chain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.graphs import trace
from lfdm_export.quantize.correction import measure_errors, measure_shifts
from lfdm_export.quantize.qdq import insert_qdq
from lfdm_export.quantize.ranges import activation_scale
from lfdm_export.quantize.report import JSON_NAME, Correction, SensitivityReport
from lfdm_export.quantize.states import STAGES, Calibrated, Calibration, Feeds, Sources, calibrate
from lfdm_export.sampling.loop import sample, step_from_denoiser
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.stages import BATCH, StageSpec, TensorSpec, stage_specs
from lfdm_models.schedule import cosine_schedule

Float32 = NDArray[np.float32]
FEW = Calibration(
    chains=(SamplingOptions("ddim", 4, 1.0),), held_out=SamplingOptions("ddim", 2, 1.0), values=256, chunks=1
)
#: The largest weight of each output makes its scale 1, so that it is rounded to integers.
WEIGHT = np.array([[127, 5.4, -3.7], [-127, 2.4, 8.4]], np.float32)
LOST = np.array([[0, 0.4, 0.3], [0, 0.4, 0.4]])
BIAS = np.array([0.25, -1.5], np.float32)
ONE = np.float32(1)


@dataclass(frozen=True)
class Kind:
    """A layer of 3 inputs and 2 outputs on images of 4 by 4, or on 4 tokens."""

    text: str
    weight: Float32
    axis: int
    shape: tuple[int, ...]


IMAGES = (3, 4, 4)
KINDS = {
    "convolution": Kind("y = Conv (x, w, b)", WEIGHT[..., None, None], 1, IMAGES),
    "convolution without bias": Kind("y = Conv (x, w)", WEIGHT[..., None, None], 1, IMAGES),
    "transposed convolution": Kind("y = ConvTranspose (x, w, b)", WEIGHT.T[..., None, None], 1, IMAGES),
    "product": Kind("y = MatMul (x, w)", WEIGHT.T, 2, (4, 3)),
}


def built(
    text: str, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...], axis: int
) -> tuple[ir.Model, StageSpec]:
    """A graph from x of a sample's shape to y, and its specification; a node's module is the name of its output."""
    out = tuple(2 if index == axis else size for index, size in enumerate(shape, start=1))
    x, y = ("float[" + ",".join(map(str, (BATCH, *sizes))) + "]" for sizes in (shape, out))
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> t ({x} x) => ({y} y) {{ {text} }}')
    used = {name for node in proto.graph.node for name in node.input}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name in used}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.outputs[0].name}"
    return model, StageSpec(
        "tiny",
        (TensorSpec("x", "float32", (BATCH, *shape)),),
        (TensorSpec("y", "float32", (BATCH, *out)),),
        (1, 1, 4),
        {},
    )


def run(model: ir.Model, spec: StageSpec, folder: Path, x: NDArray[Any]) -> Float32:
    """The output y, as outputs by values."""
    trace.save({spec.name: model.clone()}, folder, "tiny.data")
    path = folder / f"{spec.name}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    return OnnxRuntimeEngine(path, spec, threads=1).run({"x": x})["y"].astype(np.float32)


def by_channel(values: NDArray[Any], axis: int) -> NDArray[Any]:
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_biased_rounding_is_corrected_in_closed_form(kind: Kind, tmp_path: Path):
    model, spec = built(kind.text, {"w": kind.weight, "b": BIAS}, kind.shape, kind.axis)
    rng = np.random.default_rng(1)
    states: list[Feeds] = [{"x": rng.integers(-9, 30, (1, *kind.shape)).astype(np.float32)} for _ in range(3)]
    means = np.mean([by_channel(state["x"], kind.axis).mean(axis=1) for state in states], axis=0)

    shifts = measure_shifts(model, spec, {"y": ONE}, "int8", states, threads=1)
    np.testing.assert_allclose(shifts["y"], LOST @ means, rtol=1e-5)
    assert np.abs(shifts["y"]).min() > 3

    plain, corrected = (insert_qdq(model, {"y": ONE}, "int8", given) for given in (None, shifts))
    found = [
        np.concatenate([by_channel(run(graph, spec, tmp_path, state["x"]), kind.axis) for state in states], axis=1)
        for graph in (model, plain, corrected)
    ]
    exact, before, after = (values.mean(axis=1) for values in found)
    np.testing.assert_allclose(exact - before, shifts["y"], rtol=1e-3)
    np.testing.assert_allclose(after, exact, atol=1e-3)


def test_a_later_layer_is_corrected_for_corrected_inputs(tmp_path: Path):
    """Otherwise the second layer would take back the shift of the first a second time."""
    second = np.array([[2, 1.4], [1.2, -2]], np.float32)
    model, spec = built(
        "h = Conv (x, w, b)\n y = Conv (h, v)",
        {"w": WEIGHT[..., None, None], "b": BIAS, "v": second[..., None, None]},
        IMAGES,
        1,
    )
    scales = {"h": ONE, "y": np.float32(3)}
    rng = np.random.default_rng(2)
    states: list[Feeds] = [{"x": rng.integers(-9, 30, (1, 3, 4, 4)).astype(np.float32)} for _ in range(8)]
    for state in states:
        state["x"][:, 0] = 0  # so that the second layer's range is small
    shifts = measure_shifts(model, spec, scales, "int8", states, threads=1)
    first = measure_shifts(model, spec, {"h": ONE}, "int8", states, threads=1)
    np.testing.assert_array_equal(shifts["h"], first["h"])
    exact, plain, corrected = (
        np.mean([by_channel(run(graph, spec, tmp_path, state["x"]), 1).mean(axis=1) for state in states], axis=0)
        for graph in (model, insert_qdq(model, scales, "int8"), insert_qdq(model, scales, "int8", shifts))
    )
    assert (np.abs(corrected - exact) < 0.1 * np.abs(plain - exact)).all()


def test_float_layers_keep_their_biases():
    model, spec = built(
        "h = Conv (x, w, b)\n y = Conv (h, v, c)",
        {"w": WEIGHT[..., None, None], "b": BIAS, "v": np.ones((2, 2, 1, 1), np.float32), "c": BIAS},
        IMAGES,
        1,
    )
    states: list[Feeds] = [{"x": np.full((1, 3, 4, 4), 7, np.float32)}]
    shifts = measure_shifts(model, spec, {"h": ONE}, "int8", states, threads=1)
    assert set(shifts) == {"h"}
    assert measure_shifts(model, spec, {}, "int8", states, threads=1) == {}
    # Not even a shift that is given moves a layer that stays float.
    corrected = insert_qdq(model, {"h": ONE}, "int8", {**shifts, "y": np.ones(2, np.float32)})
    first, last = (node for node in corrected.graph if node.op_type == "Conv")
    np.testing.assert_allclose(_constant(first, 2), BIAS + LOST @ [7, 7, 7], rtol=1e-4)
    np.testing.assert_array_equal(_constant(last, 2), BIAS)
    np.testing.assert_array_equal(_constant(last, 1), 1)


def _constant(node: ir.Node, index: int) -> NDArray[Any]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


@pytest.fixture(scope="module")
def sources(small_bundle: Bundle) -> Sources:
    """The small model's graphs."""
    graphs = {stage: ir.load(small_bundle.stage_path(stage)) for stage in STAGES}
    for graph in graphs.values():
        ir.external_data.load_to_model(graph)
    schedule = cosine_schedule(small_bundle.manifest.config.dm.training_steps)
    return Sources(graphs, small_bundle.manifest.geometry, schedule, (), small_bundle.null_embedding)


@pytest.fixture(scope="module")
def seen(sources: Sources) -> Calibrated:
    return calibrate(sources, FEW, threads=1)


def test_a_chain_drifts_less(sources: Sources, seen: Calibrated, tmp_path: Path):
    graph, spec = sources.graphs["denoise"], stage_specs(sources.geometry)["denoise"]
    scales = {name: activation_scale(one, "fp8") for name, one in seen.observed["denoise"].items()}
    shifts = measure_shifts(graph, spec, scales, "fp8", seen.states["denoise"], threads=1)
    plain, corrected = (insert_qdq(graph, scales, "fp8", given) for given in (None, shifts))
    errors = [measure_errors(graph, one, spec, seen.held_out["denoise"], threads=1).shift for one in (plain, corrected)]
    assert errors[1] < 0.8 * errors[0]  # found: 0.58
    exact, before, after = (_clip(one, spec, seen, sources, tmp_path) for one in (graph, plain, corrected))
    drifts = [np.abs((found - exact).mean(axis=(0, 2, 3, 4))).max() for found in (before, after)]
    assert drifts[1] < 0.6 * drifts[0]  # found: 0.32


def _clip(model: ir.Model, spec: StageSpec, seen: Calibrated, sources: Sources, folder: Path) -> Float32:
    """The latent of a chain that calibration did not see."""
    trace.save({spec.name: model.clone()}, folder, "denoise.data")
    engine = OnnxRuntimeEngine(folder / "denoise.onnx", spec, threads=1)
    fixed = seen.held_out["denoise"][0]

    def denoise(noisy_latent: Float32, timestep: NDArray[np.int64]) -> Float32:
        feeds = {**fixed, "noisy_latent": noisy_latent, "timestep": timestep}
        return engine.run(feeds)["predicted_noise"].astype(np.float32)

    g = sources.geometry
    source = seeded_noise([77], (3, g.frames, g.latent_size, g.latent_size))
    table = SamplingOptions("ddim", 4, 1.0).table(sources.schedule)
    return sample(step_from_denoiser(denoise), table, source(START), source)


def test_a_report_without_corrections_is_still_read(tmp_path: Path):
    plain = SensitivityReport("fp8", "max", 10, (1, 999, 10), 4, 1.0, ())
    plain.write(tmp_path)
    assert "corrections" not in json.loads((tmp_path / JSON_NAME).read_text(encoding="utf-8"))
    assert SensitivityReport.read(tmp_path) == plain
    corrected = SensitivityReport(
        "fp8", "max", 10, (1, 999, 10), 4, 1.0, (), (Correction("denoise", 54, 20, (28.8, 29.4), (0.0123, 0.0004)),)
    )
    corrected.write(tmp_path)
    assert SensitivityReport.read(tmp_path) == corrected
    assert "| denoise | 54 | 20 | 28.8 dB → 29.4 dB | 1.23% → 0.04% |" in corrected.markdown()

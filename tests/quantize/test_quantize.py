"""Quantizing: arithmetic, scales, inserted nodes, calibration, sensitivity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.openvino.engine import OpenVinoEngine
from lfdm_export.errors import BundleError, InputError
from lfdm_export.quantize import states
from lfdm_export.quantize.layers import KEPT, find_layers, kept_reason
from lfdm_export.quantize.qdq import insert_qdq
from lfdm_export.quantize.ranges import (
    FORMATS,
    LARGEST,
    Format,
    Method,
    Observed,
    activation_scale,
    quantize,
    rounded,
    weight_scales,
)
from lfdm_export.quantize.report import JSON_NAME, SensitivityReport, StageSensitivity
from lfdm_export.quantize.sensitivity import measure_stage
from lfdm_export.quantize.states import Calibration, Sources, calibrate
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.stages import BATCH, StageSpec, TensorSpec
from lfdm_models.schedule import cosine_schedule

Float32 = NDArray[np.float32]
#: Every finite magnitude of E4M3 (bias 7, four bits of exponent, three of mantissa, no infinity; all ones is NaN).
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)
FEW = Calibration(
    chains=(
        SamplingOptions("ddim", 5, 1.0),
        SamplingOptions("unipc", 4),
        SamplingOptions("ddim", 3, 0.0, guidance_scale=0.0),
    ),
    label_chain=SamplingOptions("ddim", 2, 1.0),
    held_out=SamplingOptions("ddim", 3, 1.0),
    values=512,
    chunks=1,
)

X = TensorSpec("x", "float32", (BATCH, 3, 6, 6))
TINY = StageSpec("tiny", (X,), (TensorSpec("y", "float32", (BATCH, 5)),), (1, 1, 4), {})
#: One activation for two convolutions, one through a Relu for a transposed one, and a product.
TINY_TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
tiny (float[batch,3,6,6] x) => (float[batch,5] y)

{
    left = Conv <pads = [1,1,1,1]> (x, first, bias)
    right = Conv (x, second)
    sum = Add (left, right)
    positive = Relu (sum)
    larger = ConvTranspose <strides = [2,2]> (positive, up)
    pooled = ReduceMean <keepdims = 0> (larger, axes)
    y = MatMul (pooled, out)
}
"""


def tiny_graph() -> ir.Model:
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model(TINY_TEXT)
    shapes = {"first": (4, 3, 3, 3), "second": (4, 3, 1, 1), "up": (4, 2, 2, 2), "out": (2, 5), "bias": (4,)}
    arrays: dict[str, NDArray[Any]] = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    del proto.graph.initializer[:]
    for name, array in {**arrays, "axes": np.array([2, 3])}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto = onnx.shape_inference.infer_shapes(proto)
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = f"net.{node.outputs[0].name}/{node.outputs[0].name}"
    return model


TINY_SCALES: Mapping[str, np.float32] = {
    "net.left": np.float32(0.03),
    "net.right": np.float32(0.03),
    "net.larger": np.float32(0.1),
    "net.y": np.float32(0.2),
}


def written(model: ir.Model, folder: Path) -> Path:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    path = folder / "tiny.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope="module")
def sources(small_bundle: Bundle) -> Sources:
    """The small model's graphs, with three labels."""
    graphs = {}
    for stage in states.STAGES:
        graphs[stage] = ir.load(small_bundle.stage_path(stage))
        ir.external_data.load_to_model(graphs[stage])
    schedule = cosine_schedule(small_bundle.manifest.config.dm.training_steps)
    rng = np.random.default_rng(9)
    labels = tuple(rng.standard_normal(small_bundle.manifest.geometry.text_width, np.float32) for _ in range(4))
    return Sources(graphs, small_bundle.manifest.geometry, schedule, labels, small_bundle.null_embedding)


@pytest.fixture(scope="module")
def seen(sources: Sources) -> tuple[states.Calibrated, list[tuple[str, dict[str, NDArray[Any]]]]]:
    """What calibration noted, and what every stage was really fed with."""
    feeds: list[tuple[str, dict[str, NDArray[Any]]]] = []
    run = states._Stage.run

    def spy(stage: Any, given: Any, note: Any, values: int, rng: Any) -> Any:
        if note is not None:
            feeds.append((stage.spec.name, dict(given)))
        return run(stage, given, note, values, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states._Stage, "run", spy)
        return calibrate(sources, FEW, threads=1), feeds


def test_int8_is_rounded_to_even_and_saturates():
    values = np.array([0, 0.24, 0.25, 0.75, -0.25, -0.75, 63.4, 63.6, 1e9, -1e9], np.float32)
    stored = quantize(values, np.float32(0.5), "int8")
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, [0, 0, 0, 2, 0, -2, 127, 127, 127, -127])


def test_fp8_is_the_nearest_value_of_e4m3_and_saturates():
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(4096) * 10 ** rng.uniform(-3, 3, 4096)).astype(np.float32)
    found = quantize(values, np.float32(1), "fp8").astype(np.float64)
    nearest = E4M3[np.abs(np.abs(values)[:, None] - E4M3).argmin(axis=1)]
    assert E4M3.max() == LARGEST["fp8"]
    np.testing.assert_array_equal(found, np.copysign(nearest, values))
    assert (np.abs(values) > 448).sum() > 20


@pytest.mark.parametrize("form", FORMATS)
def test_weights_have_a_scale_for_each_output(form: Format):
    weight = np.random.default_rng(2).standard_normal((3, 4, 2, 2)).astype(np.float32)
    weight[:, 1] *= 100
    weight[:, 2] = 0
    scales = weight_scales(weight, 1, form)
    np.testing.assert_allclose(scales[[0, 1, 3]], np.abs(weight).max(axis=(0, 2, 3))[[0, 1, 3]] / LARGEST[form])
    back = rounded(weight, scales.reshape(1, 4, 1, 1), form)
    limit = (0.5 if form == "int8" else 16) * scales.reshape(1, 4, 1, 1)
    assert (np.abs(back - weight) <= limit * 1.0001).all()
    assert not back[:, 2].any()


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("form", FORMATS)
def test_scales_of_activations(form: Format, method: Method):
    rng = np.random.default_rng(3)
    observed = Observed()
    for _ in range(4):
        observed.add(rng.standard_normal(4096).astype(np.float32), 2048, rng)
    outlier = np.zeros(4096, np.float32)
    outlier[17] = -30
    observed.add(outlier, 2048, rng)
    assert observed.states == 5
    assert observed.largest == 30
    scale = activation_scale(observed, form, method)
    covered = float(scale) * LARGEST[form]
    if method == "max":
        assert covered == pytest.approx(30)
    else:
        assert covered < 30.001
    if method == "mse":
        values = np.concatenate(observed.samples)
        error = np.square(rounded(values, scale, form) - values).mean()
        for share in (0.31, 0.5, 0.77, 1.0):
            other = np.float32(30 / LARGEST[form] * share)
            assert error <= np.square(rounded(values, other, form) - values).mean() * 1.0001


def test_a_tensor_that_is_always_zero_has_a_scale():
    observed = Observed()
    observed.add(np.zeros(64, np.float32), 16, np.random.default_rng(0))
    for form in FORMATS:
        for method in get_args(Method):
            scale = activation_scale(observed, form, method)
            assert np.isfinite(scale)
            assert scale > 0


@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_graph_computes_what_its_nodes_say(form: Format, tmp_path: Path):
    model = tiny_graph()
    quantized = insert_qdq(model, TINY_SCALES, form)
    x = np.random.default_rng(6).standard_normal((2, 3, 6, 6)).astype(np.float32)
    weights: dict[str, np.ndarray] = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        weights[name] = value.const_value.numpy()

    def low(values: Any, layer: str) -> torch.Tensor:
        return torch.from_numpy(rounded(np.asarray(values), TINY_SCALES[layer], form))

    def weight(name: str, axis: int) -> torch.Tensor:
        shape = [1] * weights[name].ndim
        shape[axis] = -1
        scales = weight_scales(weights[name], axis, form).reshape(shape)
        return torch.from_numpy(rounded(weights[name], scales, form))

    functional = torch.nn.functional
    left = functional.conv2d(low(x, "net.left"), weight("first", 0), torch.tensor(weights["bias"]), padding=1)
    positive = functional.relu(left + functional.conv2d(low(x, "net.right"), weight("second", 0)))
    larger = functional.conv_transpose2d(low(positive, "net.larger"), weight("up", 1), stride=2)
    expected = low(larger.mean((2, 3)), "net.y") @ weight("out", 1)
    found = OnnxRuntimeEngine(written(quantized, tmp_path), TINY, threads=1).run({"x": x})["y"]
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=2e-5)
    # The float32 graph would give something else.
    exact = OnnxRuntimeEngine(written(model, tmp_path), TINY, threads=1).run({"x": x})["y"]
    assert np.abs(exact - expected.numpy()).max() > 1e-3


def test_openvino_computes_the_same_int8(tmp_path: Path):
    path = written(insert_qdq(tiny_graph(), TINY_SCALES, "int8"), tmp_path)
    x = np.random.default_rng(6).standard_normal((1, 3, 6, 6)).astype(np.float32)
    expected = OnnxRuntimeEngine(path, TINY, threads=1).run({"x": x})["y"]
    found = OpenVinoEngine(path, TINY, threads=1, precision="fp32").run({"x": x})["y"]
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=1e-4)


def test_nodes_are_shared_and_nothing_is_left_over():
    model = tiny_graph()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    scales = {name: scale for name, scale in TINY_SCALES.items() if name != "net.y"}
    quantized = insert_qdq(model, scales, "int8")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    kinds = [node.op_type for node in quantized.graph]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 2 + 3
    names = [node.name for node in quantized.graph]
    assert len(set(names)) == len(names)
    assert "out" in quantized.graph.initializers
    assert not {"first", "second", "up", "unused"} & set(quantized.graph.initializers)


def test_layers_of_the_stages(sources: Sources):
    for stage, graph in sources.graphs.items():
        layers = find_layers(graph)
        names = [layer.name for layer in layers]
        assert len(set(names)) == len(names), stage
        assert all(layer.weight.shape[layer.axis] > 0 for layer in layers)
    every = [layer.name for graph in sources.graphs.values() for layer in find_layers(graph)]
    for reason in KEPT.values():
        assert any(kept_reason(name) == reason for name in every), f"nothing stays float by reason of: {reason}"
    assert sum(kept_reason(name) is None for name in every) > 60


def test_calibration_meets_every_label_and_the_whole_schedule(
    sources: Sources, seen: tuple[states.Calibrated, list[tuple[str, dict[str, NDArray[Any]]]]]
):
    calibrated, feeds = seen
    denoised = [given for stage, given in feeds if stage == "denoise"]
    for label in (*sources.embeddings, sources.null_embedding):
        assert any(np.array_equal(given["text_embedding"][0], label) for given in denoised)
    timesteps = {int(given["timestep"][0]) for given in denoised}
    assert calibrated.timesteps == timesteps
    assert calibrated.labels == len(sources.embeddings)
    steps = sources.schedule.steps
    assert min(timesteps) < 0.1 * steps
    assert max(timesteps) > 0.9 * steps
    assert len(timesteps) >= 10
    # Real trajectories: what is fed late is hardly noise, what is fed first is nothing else.
    first = max(denoised, key=lambda given: int(given["timestep"][0]))["noisy_latent"]
    last = min(denoised, key=lambda given: int(given["timestep"][0]))["noisy_latent"]
    assert first.std() == pytest.approx(1, abs=0.05)
    assert last.std() != pytest.approx(1, abs=0.05)
    for stage in states.STAGES:
        expected = sum(name == stage for name, _ in feeds)
        found = calibrated.observed[stage]
        assert {layer.name for layer in find_layers(sources.graphs[stage])} == set(found)
        assert {observed.states for observed in found.values()} == {expected}


def test_the_held_out_chain_is_not_calibrated_on(
    seen: tuple[states.Calibrated, list[tuple[str, dict[str, NDArray[Any]]]]],
):
    calibrated, feeds = seen
    for stage in states.STAGES:
        assert calibrated.held_out[stage]
        for kept in calibrated.held_out[stage]:
            assert not any(
                name == stage and all(np.array_equal(given[k], kept[k]) for k in kept) for name, given in feeds
            )


def test_layers_of_one_activation_share_its_scale(
    sources: Sources, seen: tuple[states.Calibrated, list[tuple[str, dict[str, NDArray[Any]]]]]
):
    calibrated, _ = seen
    by_activation: dict[str, set[float]] = {}
    for layer in find_layers(sources.graphs["decode"]):
        scale = activation_scale(calibrated.observed["decode"][layer.name], "int8", "mse")
        by_activation.setdefault(str(layer.activation.name), set()).add(float(scale))
    assert all(len(scales) == 1 for scales in by_activation.values())
    assert len(by_activation) < len(find_layers(sources.graphs["decode"]))


def test_a_sampler_that_cannot_be_is_an_error(sources: Sources):
    with pytest.raises(InputError, match="sampler: found 'euler'"):
        calibrate(sources, dataclasses.replace(FEW, chains=(SamplingOptions("euler", 3),)), threads=1)


def test_a_spoiled_layer_is_named_and_stays_float(
    small_bundle: Bundle,
    sources: Sources,
    seen: tuple[states.Calibrated, list[tuple[str, dict[str, NDArray[Any]]]]],
    tmp_path: Path,
):
    calibrated, _ = seen
    spoiled = "generator.down_blocks.0.conv"
    scales = {name: activation_scale(one, "int8", "mse") for name, one in calibrated.observed["encode"].items()}
    assert spoiled in scales
    scales[spoiled] *= np.float32(500)
    spec, held_out = small_bundle.stages["encode"], calibrated.held_out["encode"]
    found = measure_stage(
        sources.graphs["encode"],
        spec,
        scales,
        held_out,
        "int8",
        seconds=0,
        floor=35,
        together=0,
        threads=1,
        each_way=True,
    )
    report = SensitivityReport("int8", "mse", 10, (1, 999, 10), 4, 1.0, (found,))
    assert report.worst(1)[0][1].name == spoiled
    assert found.kept[spoiled].startswith("alone it leaves ")
    assert found.together > found.everything + 3
    assert kept_reason(spoiled) is None
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert f"| `{spoiled}` | {report.worst(1)[0][1].alone:.1f} |" in page
    assert spoiled in report.summary()
    assert SensitivityReport.read(tmp_path) == report
    # What was measured with it off is what the graph without it gives.
    kept = {name: scale for name, scale in scales.items() if name not in found.kept}
    session = onnxruntime.InferenceSession(
        ir.to_proto(insert_qdq(sources.graphs["encode"], kept, "int8")).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    exact = onnxruntime.InferenceSession(
        ir.to_proto(sources.graphs["encode"]).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pairs = [(session.run(["context"], feeds)[0], exact.run(["context"], feeds)[0]) for feeds in held_out]
    error = sum(float(np.square(a - b).sum()) for a, b in pairs)
    signal = sum(float(np.square(b).sum()) for _, b in pairs)
    assert 10 * np.log10(signal / error) == pytest.approx(found.together, abs=0.3)


def test_groups_stay_float_until_the_stage_leaves_enough(
    small_bundle: Bundle,
    sources: Sources,
    seen: tuple[states.Calibrated, list[tuple[str, dict[str, NDArray[Any]]]]],
):
    calibrated, _ = seen
    scales = {name: activation_scale(one, "int8", "mse") for name, one in calibrated.observed["encode"].items()}

    def measured(together: float) -> StageSensitivity:
        spec, held_out = small_bundle.stages["encode"], calibrated.held_out["encode"]
        return measure_stage(
            sources.graphs["encode"], spec, scales, held_out, "int8", seconds=0, floor=0, together=together, threads=1
        )

    least = measured(0)
    more = measured(least.together + 1)
    assert more.together >= least.together + 1
    added = set(more.kept) - set(least.kept)
    assert added
    assert all(f"the stage leaves {least.together:.1f} dB, below" in more.kept[name] for name in list(added)[:1])
    every = measured(149)
    assert len(every.kept) == every.total_layers


def test_a_damaged_report_is_an_error(tmp_path: Path):
    with pytest.raises(BundleError, match=r"sensitivity\.json cannot be read .*; export again"):
        SensitivityReport.read(tmp_path)
    (tmp_path / JSON_NAME).write_text('{"form": "int4"}')
    with pytest.raises(BundleError, match=r"sensitivity\.json cannot be read .*; export again"):
        SensitivityReport.read(tmp_path)

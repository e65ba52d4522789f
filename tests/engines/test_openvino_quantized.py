from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from lfdm_export.graphs.bodies import with_bodies
from tests.processor import needs_openvino_int8

# The input of one convolution is a Concat of two tensors, as in the UNet's decoder; another one has no Concat.
_MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2,16,8,8] a, float[2,16,8,8] b) => (float[2,16,8,8] y, float[2,16,8,8] z)
<float scale = {0.06}, int8 zero = {0}>
{
    both = Concat <axis = 1> (a, b)
    both_int8 = QuantizeLinear (both, scale, zero)
    both_read = DequantizeLinear (both_int8, scale, zero)
    both_weight_read = DequantizeLinear <axis = 0> (both_weight, weight_scale, weight_zero)
    y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (both_read, both_weight_read)
    one_int8 = QuantizeLinear (a, scale, zero)
    one_read = DequantizeLinear (one_int8, scale, zero)
    one_weight_read = DequantizeLinear <axis = 0> (one_weight, weight_scale, weight_zero)
    z = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (one_read, one_weight_read)
}
"""
# A process selects the instructions of its kernels only once, so each case runs in its own process.
_RUN = """
import sys
import numpy as np
import openvino

feeds = dict(np.load(sys.argv[2]))
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.savez(sys.argv[3], **{name: compiled(feeds)[name] for name in ("y", "z")})
"""


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(_MODEL)
    # Values of 6 bits, so that sums of 8-bit products do not saturate on any processor.
    for name, inputs in (("both_weight", 32), ("one_weight", 16)):
        values = rng.integers(-31, 32, (16, inputs, 3, 3), np.int8)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for name, array in (
        ("weight_scale", np.full(16, 0.004, np.float32)),
        ("weight_zero", np.zeros(16, np.int8)),
    ):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def test_only_what_was_concatenated_becomes_unsigned(model: onnx.ModelProto):
    changed = with_bodies(model, "openvino")
    zeros = {i.name: onnx.numpy_helper.to_array(i) for i in changed.graph.initializer}
    found = {
        node.output[0]: zeros[node.input[2]]
        for node in changed.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and "weight" not in node.input[0]
    }
    assert {name: (zero.dtype.name, int(zero)) for name, zero in found.items()} == {
        "both_int8": ("uint8", 128),
        "both_read": ("uint8", 128),
        "one_int8": ("int8", 0),
        "one_read": ("int8", 0),
    }
    assert with_bodies(model, "tensorrt").graph == model.graph


@needs_openvino_int8
@pytest.mark.parametrize("limit", ["", "AVX512_CORE_BF16"])  # the second: without AMX, on any processor
def test_openvino_computes_what_the_graph_says(model: onnx.ModelProto, limit: str, tmp_path: Path):
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal((2, 16, 8, 8)).astype(np.float32) for name in "ab"}
    expected = dict(zip("yz", ReferenceEvaluator(model).run(None, feeds), strict=True))
    onnx.save(with_bodies(model, "openvino"), tmp_path / "model.onnx")
    np.savez(tmp_path / "feeds.npz", a=feeds["a"], b=feeds["b"])
    done = subprocess.run(
        [sys.executable, "-c", _RUN, tmp_path / "model.onnx", tmp_path / "feeds.npz", tmp_path / "found.npz"],
        env={**os.environ, **({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for name in "yz":
        error = np.abs(found[name] - expected[name])
        # A value between two levels may be rounded to either: a difference of one activation step times one weight.
        assert error.max() <= 3 * 0.06 * 31 * 0.004, name
        assert error.mean() <= 1e-3 * np.abs(expected[name]).mean(), name

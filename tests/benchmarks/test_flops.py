from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from benchmarks.flops import count_graph, count_networks
from lfdm_models.config import LfdmConfig

HEADER = '<ir_version: 10, opset_import: ["": 23, "lfdm": 1]>'
FUNCTION = """
<domain: "lfdm", opset_import: ["": 23]>
Twice (x, w) => (y) { once = MatMul (x, w)  y = MatMul (once, w) }
"""


def count(graph: str, batch: int = 1, function: str = "") -> dict[str, int]:
    model = onnx.parser.parse_model(HEADER + graph + function)
    onnx.checker.check_model(model)
    return count_graph(model, batch).flops


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        # 8 outputs channels on 5 x 5 pixels (no padding), each of 3 · 3 taps on 4 channels.
        (
            "g (float[N,4,7,7] x, float[8,4,3,3] w) => (float[N,8,5,5] y) { y = Conv (x, w) }",
            {"Conv": 2 * 8 * 25 * 36},
        ),
        # Two groups: each output channel sees half of the inputs.
        (
            "g (float[N,4,7,7] x, float[8,2,3,3] w) => (float[N,8,5,5] y) { y = Conv <group = 2> (x, w) }",
            {"Conv": 2 * 8 * 25 * 18},
        ),
        # Each of 4 · 3 · 3 inputs has 2 channels x 16 taps.
        (
            "g (float[N,4,3,3] x, float[4,2,4,4] w) => (float[N,2,6,6] y)"
            "{ y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }",
            {"ConvTranspose": 2 * 36 * 32},
        ),
        # Broadcast over a batch of 6: 5 x 7 outputs, 3 terms each.
        (
            "g (float[N,6,5,3] x, float[3,7] w) => (float[N,6,5,7] y) { y = MatMul (x, w) }",
            {"MatMul": 2 * 6 * 35 * 3},
        ),
        (
            "g (float[N,3] x, float[7,3] w) => (float[N,7] y) { y = Gemm <transB = 1> (x, w) }",
            {"Gemm": 2 * 21},
        ),
        # 2 heads of width 4, 5 queries on 6 keys, values of width 3.
        (
            "g (float[N,5,8] q, float[N,6,8] k, float[N,6,6] v) => (float[N,5,6] y)"
            "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }",
            {"Attention": 2 * 2 * 5 * 6 * (4 + 3)},
        ),
        # Grouped-query: 4 query heads share 2 of keys and values.
        (
            "g (float[N,5,16] q, float[N,6,8] k, float[N,6,6] v) => (float[N,5,12] y)"
            "{ y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) }",
            {"Attention": 2 * 4 * 5 * 6 * (4 + 3)},
        ),
        ("g (float[N,3] x) => (float[N,3] y) { y = Softmax (x) }", {}),
    ],
)
def test_operator_counts_equal_manual_counts(graph: str, expected: dict[str, int]) -> None:
    assert count(graph) == expected
    assert count(graph, batch=3) == {op: 3 * flops for op, flops in expected.items()}


def test_functions_are_counted_inside() -> None:
    graph = "g (float[N,5,4] x, float[4,4] w) => (float[N,5,4] y) { y = lfdm.Twice (x, w) }"
    assert count(graph, function=FUNCTION) == {"MatMul": 2 * 2 * 20 * 4}


def test_products_of_weights_alone_are_not_counted() -> None:
    # Large enough that it is not folded before counting.
    graph = "g (float[N,128] x) => (float[N,128] y) { b = MatMul (a, a)  w = MatMul (b, a)  y = MatMul (x, w) }"
    model = onnx.parser.parse_model(HEADER + graph)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((128, 128), np.float32), "a"))
    assert count_graph(model).flops == {"MatMul": 2 * 128 * 128}


def test_sampling_is_listed_by_its_bytes() -> None:
    graph = "g (float[N,3,8,8] x, float[N,4,4,2] grid) => (float[N,3,4,4] y) { y = GridSample (x, grid) }"
    counted = count_graph(onnx.parser.parse_model(HEADER + graph))
    assert counted.flops == {}
    assert counted.sampled_bytes == 4 * (3 * 64 + 32 + 3 * 16)


def test_what_cannot_be_counted_is_refused() -> None:
    graph = 'g (float[N,3] x, float[3,4] w) => (float[N,4] y) { y = Einsum <equation = "ab,bc->ac"> (x, w) }'
    with pytest.raises(ValueError, match="Einsum"):
        count(graph)


def test_published_networks_have_the_documented_cost() -> None:
    counts = {name: count.total / 1e9 for name, count in count_networks(LfdmConfig(), 40, 128).items()}
    assert counts["step"] == pytest.approx(235.1, abs=0.05)
    assert counts["init_conv"] == pytest.approx(66.5, abs=0.05)
    assert counts["encode"] == pytest.approx(5.1, abs=0.05)
    assert counts["encode"] + counts["decode_frame"] == pytest.approx(24.8, abs=0.05)

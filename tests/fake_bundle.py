"""A bundle of tiny graphs with simple arithmetic, for tests that need no real networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.sampling.options import DEFAULTS, SamplingOptions
from lfdm_export.stages import Geometry, StageSpec, TensorSpec, stage_specs
from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig

Float32 = NDArray[np.float32]
Feeds = dict[str, Any]

SIZE, LATENT, FRAMES, CHUNK, WIDTH = 16, 4, 5, 2, 6
TRAINING_STEPS = 20
LABELS = ("Anger", "happiness", "turn left")
EMBEDDINGS: Float32 = np.linspace(0, 1.7, len(LABELS) * WIDTH, dtype=np.float32).reshape(len(LABELS), WIDTH)
NULL = np.full(WIDTH, -0.5, np.float32)

_HOURGLASS = HourglassConfig(4, blocks=1)
CONFIG = LfdmConfig(
    LfaeConfig(width=4, flow_predictor=_HOURGLASS, region_predictor=_HOURGLASS, bg_predictor=_HOURGLASS),
    DmConfig(width=8, multipliers=(1,), feature_channels=16, text_width=WIDTH, training_steps=TRAINING_STEPS),
)
GEOMETRY = Geometry(SIZE, LATENT, FRAMES, CHUNK, (4, 8, 16), 3, WIDTH)
SPECS = stage_specs(GEOMETRY, with_text=True)

# predicted noise = x / 10 + mean(context) + s mean(embedding) + t / 1000, with s = 1 unless guided
_NOISE = """
    c = ReduceMean <keepdims = 1> (context, axes_1_2_3)
    c5 = Unsqueeze (c, axis_1)
    e = ReduceMean <keepdims = 1> (text_embedding, axis_1)
    {scale}
    e5 = Unsqueeze (e_scaled, axes_2_3_4)
    t = Cast <to = 1> (timestep)
    t_small = Div (t, thousand)
    t5 = Unsqueeze (t_small, axes_1_2_3_4)
    x_small = Div (noisy_latent, ten)
    sum_1 = Add (x_small, c5)
    sum_2 = Add (sum_1, e5)
    {predicted_noise} = Add (sum_2, t5)
"""
_UNGUIDED = "e_scaled = Identity (e)"
_GUIDED = "s2 = Unsqueeze (guidance_scale, axis_1)\n    e_scaled = Mul (e, s2)"

# The samplers' arithmetic, with x0 clamped to [-1, 1] instead of the quantile.
_UPDATE = """
    columns = Unsqueeze (coefficients, axes_2_3_4_5)
    c0, c1, c2, c3, c4, c5_, c6, c7, c8, c9, c10 = Split <axis = 1, num_outputs = 11> (columns)
    c_x0_x = Squeeze (c0, axis_1)
    c_x0_e = Squeeze (c1, axis_1)
    c_x = Squeeze (c2, axis_1)
    c_x0 = Squeeze (c3, axis_1)
    c_e = Squeeze (c4, axis_1)
    c_p = Squeeze (c5_, axis_1)
    c_m = Squeeze (c6, axis_1)
    c_n = Squeeze (c7, axis_1)
    c_pp = Squeeze (c8, axis_1)
    c_px0 = Squeeze (c9, axis_1)
    c_pm = Squeeze (c10, axis_1)
    p6, m6 = Split <axis = 1, num_outputs = 2> (history)
    p = Squeeze (p6, axis_1)
    m = Squeeze (m6, axis_1)
    a1 = Mul (c_x0_x, noisy_latent)
    a2 = Mul (c_x0_e, predicted)
    a3 = Add (a1, a2)
    x0 = Clip (a3, minus_one, plus_one)
    n1 = Mul (c_x, noisy_latent)
    n2 = Mul (c_x0, x0)
    n3 = Mul (c_e, predicted)
    n4 = Mul (c_p, p)
    n5 = Mul (c_m, m)
    n6 = Mul (c_n, noise)
    next_latent = Sum (n1, n2, n3, n4, n5, n6)
    h1 = Mul (c_pp, p)
    h2 = Mul (c_px0, x0)
    h3 = Mul (c_pm, m)
    carry = Sum (h1, h2, h3)
    carry6 = Unsqueeze (carry, axis_1)
    x06 = Unsqueeze (x0, axis_1)
    next_history = Concat <axis = 1> (carry6, x06)
"""

BODIES = {
    "encode": """
    gray = ReduceMean <keepdims = 1> (image, axis_1)
    gray_2 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (gray)
    gray_4 = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (gray)
    skip_0 = Tile (gray, repeat_4)
    skip_1 = Tile (gray_2, repeat_8)
    feature = Tile (gray_4, repeat_16)
    context = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (image)
""",
    "denoise": _NOISE.format(scale=_UNGUIDED, predicted_noise="predicted_noise"),
    "denoise_guided": _NOISE.format(scale=_GUIDED, predicted_noise="predicted_noise"),
    "step": _NOISE.format(scale=_UNGUIDED, predicted_noise="predicted") + _UPDATE,
    "step_guided": _NOISE.format(scale=_GUIDED, predicted_noise="predicted") + _UPDATE,
    # frame = image / 2 + 1/4 + mean(latent of the frame) / 4; warped = image * mean(skip_0) of the sample
    "decode": """
    level = ReduceMean <keepdims = 1> (latent, axes_1_3_4)
    image5 = Unsqueeze (image, axis_2)
    half = Mul (image5, one_half)
    quarter_level = Mul (level, one_quarter)
    sum_1 = Add (half, quarter_level)
    frames = Add (sum_1, one_quarter)
    brightness = ReduceMean <keepdims = 1> (skip_0, axes_1_2_3)
    dimmed = Mul (image, brightness)
    dimmed5 = Unsqueeze (dimmed, axis_2)
    zero_level = Mul (level, zero)
    warped = Add (dimmed5, zero_level)
""",
    "estimate_motion": """
    difference = Sub (driving, image)
    latent = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (difference)
""",
    "text": """
    kept = Mul (input_ids, attention_mask)
    total = ReduceSum <keepdims = 1> (kept, axis_1)
    total_float = Cast <to = 1> (total)
    text_embedding = Tile (total_float, repeat_width)
""",
}

_CONSTANTS = {
    **{f"axis_{axis}": np.array([axis]) for axis in (1, 2)},
    **{
        "axes_" + "_".join(map(str, axes)): np.array(axes)
        for axes in ((1, 2, 3), (2, 3, 4), (1, 2, 3, 4), (2, 3, 4, 5), (1, 3, 4))
    },
    **{f"repeat_{count}": np.array([1, count, 1, 1]) for count in (4, 8, 16)},
    "repeat_width": np.array([1, WIDTH]),
    **{
        name: np.array(value, np.float32)
        for name, value in {
            "thousand": 1000,
            "ten": 10,
            "minus_one": -1,
            "plus_one": 1,
            "one_half": 0.5,
            "one_quarter": 0.25,
            "zero": 0,
        }.items()
    },
}


def fake_graph(spec: StageSpec, body: str | None = None) -> onnx.ModelProto:
    """Return the stage's fake graph, or one with the same interface and another body."""
    body = BODIES[spec.name] if body is None else body

    def signature(tensors: tuple[TensorSpec, ...]) -> str:
        types = {"float32": "float", "int64": "int64"}
        return ", ".join(f"{types[t.dtype]}[{','.join(map(str, t.shape))}] {t.name}" for t in tensors)

    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        f"{spec.name} ({signature(spec.inputs)}) => ({signature(spec.outputs)}) {{\n{body}}}"
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in _CONSTANTS.items() if name in used
    )
    onnx.checker.check_model(model)
    return model


def feeds_for(spec: StageSpec, **axes: int) -> Feeds:
    """Return random inputs of a stage, from a fixed seed."""
    rng = np.random.default_rng(0)
    return {
        tensor.name: rng.standard_normal(tensor.concrete(**axes)).astype(np.float32)
        if tensor.dtype == "float32"
        else rng.integers(0, 20, tensor.concrete(**axes))
        for tensor in spec.inputs
    }


def with_input(spec: StageSpec, change: Callable[[TensorSpec], TensorSpec]) -> StageSpec:
    """Return the stage with a changed first input, which graphs of the original stage do not match."""
    return replace(spec, inputs=(change(spec.inputs[0]), *spec.inputs[1:]))


def fake_manifest(
    *, with_text: bool = False, with_drive: bool = True, sampler: SamplingOptions | None = None
) -> Manifest:
    return Manifest(
        config=CONFIG,
        geometry=GEOMETRY,
        precision="fp32",
        stages=tuple(stage_specs(GEOMETRY, with_text=with_text, with_drive=with_drive).values()),
        labels=LABELS,
        preprocessing=Preprocessing(),
        sampler=sampler or replace(DEFAULTS, steps=4),
        provenance={"trained": False},
        versions={"onnx": onnx.__version__},
    )


def write_graphs(folder: Path, manifest: Manifest, **bodies: str) -> None:
    """Write every stage's graph below `folder`; `bodies` replaces those of single stages."""
    for spec in manifest.stages:
        onnx.save(fake_graph(spec, bodies.get(spec.name)), folder / "onnx" / f"{spec.name}.onnx")


def write_fake_bundle(target: Path, manifest: Manifest | None = None, **bodies: str) -> Bundle:
    """Write the bundle; `bodies` replaces those of single stages."""
    manifest = manifest or fake_manifest()
    with BundleWriter(target) as writer:
        write_graphs(writer.folder, manifest, **bodies)
        writer.write_embeddings(EMBEDDINGS, NULL)
        return writer.finish(manifest)


def predicted_noise(
    noisy_latent: Float32, context: Float32, embedding: Float32, timestep: NDArray[np.int64], scale: float = 1.0
) -> Float32:
    """Return the prediction of the fake denoiser."""

    def per_sample(values: NDArray[np.floating]) -> Float32:
        return values.astype(np.float32).reshape(-1, 1, 1, 1, 1)

    return (
        noisy_latent / np.float32(10)
        + per_sample(context.mean(axis=(1, 2, 3)))
        + per_sample(embedding.mean(axis=1) * np.float32(scale))
        + per_sample(timestep / 1000)
    )


def update(
    latent: Float32, predicted: Float32, history: Float32, noise: Float32, coefficients: Float32
) -> tuple[Float32, Float32]:
    """Return the result of the fake steps' update after the denoiser."""
    c = coefficients.T.reshape(11, -1, 1, 1, 1, 1)
    carry, previous = history[:, 0], history[:, 1]
    x0 = np.clip(c[0] * latent + c[1] * predicted, -1, 1)
    following = c[2] * latent + c[3] * x0 + c[4] * predicted + c[5] * carry + c[6] * previous + c[7] * noise
    return following, np.stack([c[8] * carry + c[9] * x0 + c[10] * previous, x0], axis=1)

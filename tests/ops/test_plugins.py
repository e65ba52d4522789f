"""The kernels' way into TensorRT: PTX from NVRTC, and plugins under TensorRT's own Python layer."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.ops.cuda import host, launcher, nvrtc
from lfdm_export.ops.cuda.source import Kernel, Launch, Storage
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.ops.plugins import register_plugins
from lfdm_export.ops.temporal_attention.kernels import core_kernel
from lfdm_export.ops.thresholded_step.kernels import STORAGES, step_kernel, step_launch
from lfdm_export.ops.thresholded_step.reference import thresholded_step
from lfdm_export.ops.warp.kernels import Layout, warp_kernel, warp_launch
from lfdm_export.ops.warp.reference import warp, warp_blend, warp_blend_in_torch
from lfdm_export.sampling import rows
from lfdm_export.sampling.loop import quantile_rank
from tests.kernel_arrays import KERNELS, addresses, empty, stored, values_of

PLUGINS = ("Warp", "WarpBlend", "ThresholdedStep")

DRIVER = Path(__file__).parents[1] / "plugin_driver.py"
TYPES: dict[Storage, str] = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
#: The next latent of the published model.
LATENT = (3, 40, 32, 32)
BATCH, FRAMES = 2, 3


# -- PTX


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_ptx_has_the_entry_and_its_parameters(kernel: Kernel) -> None:
    text = nvrtc.compile_ptx(kernel)
    inputs, outputs = kernel.pointers
    assert parameters(text, kernel.name) == [".u64"] * inputs + [".u32"] * kernel.scalars + [".u64"] * outputs
    assert re.search(rf"^\.target {kernel.architecture.replace('compute', 'sm')}$", text, re.MULTILINE)
    # Nothing to link with: what the GPU's own mathematics needs is part of the text.
    assert not re.search(r"^\s*\.extern", text, re.MULTILINE)


def parameters(text: str, name: str) -> list[str]:
    """Types of a kernel's parameters."""
    entries = re.findall(r"\.visible \.entry (\w+)\(([^)]*)\)", text)
    assert [entry for entry, _ in entries] == [name]
    return re.findall(r"\.param (\.\w+)", entries[0][1])


def test_compiler_is_old_enough_for_old_drivers() -> None:
    # PTX 8.4 of CUDA 12.4; TensorRT 10.12 knows 8.8.
    assert nvrtc.version() <= (12, 9)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_channels_are_moved_16_bytes_at_a_time(storage: Storage) -> None:
    text = nvrtc.compile_ptx(warp_kernel(storage, "channels_last", blend=True))
    assert text.count("ld.global.nc.v4.u32") >= 5  # four corners and the previous activation
    assert text.count("st.global.v4.u32") + text.count("st.global.v4.f32") >= 1


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_assembler_takes_the_kernels(architecture: str) -> None:
    kernels = [warp_kernel("float16", "channels_last", blend=True), step_kernel("float32", "float16")]
    if architecture != "sm_75":
        kernels += [core_kernel("float16", 32, 40), core_kernel("bfloat16", 64, 64)]
    for kernel in kernels:
        assert nvrtc.compile_cubin(kernel, architecture).startswith(b"\x7fELF")


def test_matrix_products_are_the_matrix_units() -> None:
    text = nvrtc.compile_ptx(core_kernel("bfloat16", 32, 40))
    # Of 16 queries in the loop: 5 tiles of keys by 2 steps, 4 of values by 2 and a half; and of the last 8.
    assert text.count("mma.sync.aligned.m16n8k16.row.col.f32.bf16") == 2 * (10 + 8)
    assert text.count("mma.sync.aligned.m16n8k8.row.col.f32.bf16") == 2 * 4
    assert text.count("movmatrix") == 20
    assert text.count("ld.global.nc.L1::no_allocate.v4.u32") == 5 + 5 + 2 + 2 + 1
    # What spills lies in local memory.
    assert ".local" not in text


def test_text_that_is_no_kernel_is_told_with_the_compilers_words() -> None:
    with pytest.raises(EngineError, match=r"(?s)cannot compile nothing.*LFDM_NO_SUCH_KERNEL"):
        nvrtc.compile_ptx(Kernel("nothing", "warp/kernel.cuh", "LFDM_NO_SUCH_KERNEL(nothing)", 1, (0, 0), 0))


def test_the_locale_stays_as_it_was() -> None:
    """NVRTC leaves its thread's at "C", and what `open` reads next would be ASCII."""
    code = (
        "import locale; from lfdm_export.ops.cuda import nvrtc; from lfdm_export.ops.warp.kernels import warp_kernel\n"
        "before = locale.nl_langinfo(locale.CODESET)\n"
        "nvrtc.compile_ptx(warp_kernel('float32', 'channels_last', blend=True))\n"
        "print(before, locale.nl_langinfo(locale.CODESET))"
    )
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["UTF-8", "UTF-8"]


def test_without_nvrtc_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_PACKAGES", ())
    monkeypatch.setattr(nvrtc, "_SONAMES", ("libnothing.so.0",))
    monkeypatch.setenv("PATH", "")
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"pip install 'lfdm-export\[kernels\]'"):
            nvrtc.version()
    finally:
        nvrtc._library.cache_clear()


def test_without_a_driver_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_LIBRARY", "libnothing.so.0")
    launcher._driver.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"NVIDIA's driver, which is not available"):
            launcher._driver()
    finally:
        launcher._driver.cache_clear()


# -- plugins


def tensor(shape: tuple[int, ...], storage: Storage = "float32") -> dict[str, Any]:
    """An input whose first axis is dynamic."""
    return {"shape": [None, *shape], "type": TYPES[storage]}


def warp_case(channels: int, storage: Storage, size: int = 128) -> dict[str, Any]:
    return {
        "op": "Warp",
        "batch": [BATCH, BATCH * FRAMES],
        "inputs": [tensor((channels, size, size), storage), tensor((3, 32, 32))],
        "attributes": {},
    }


def blend_case(channels: int, storage: Storage, size: int, stride: int = 1) -> dict[str, Any]:
    return {
        "op": "WarpBlend",
        "batch": [BATCH, BATCH * FRAMES, BATCH * FRAMES],
        "inputs": [
            tensor((channels, size, size), storage),
            tensor((3, 32, 32)),
            tensor((channels, size // stride, size // stride), storage),
        ],
        "attributes": {"stride": stride, "phase_y": stride - 1, "phase_x": 0},
    }


def step_case(state: Storage, predicted: Storage) -> dict[str, Any]:
    lower, weight = quantile_rank(math.prod(LATENT))
    types = {"predicted": predicted}
    shapes = {"latent": LATENT, "predicted": LATENT, "history": (2, *LATENT), "noise": LATENT}
    inputs = [tensor(shape, types.get(name, state)) for name, shape in shapes.items()]
    return {
        "op": "ThresholdedStep",
        "batch": [BATCH] * 5,
        "inputs": [*inputs, tensor((rows.NEXT_FROM_NOISE + 4,))],
        "attributes": {"lower_rank": lower, "weight": float(weight)},
    }


CASES = {
    "picture": warp_case(3, "float32"),
    "feature": warp_case(256, "float16", 32),
    "blend": blend_case(128, "float16", 64),
    "phase": blend_case(64, "bfloat16", 128, stride=2),
    "blended picture": blend_case(3, "float32", 128),
    "four channels": blend_case(4, "float32", 16),
    **{f"step {state} {predicted}": step_case(state, predicted) for state, predicted in STORAGES},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What TensorRT's layer got from the plugins, by case."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    done = subprocess.run(
        [sys.executable, DRIVER, folder, host.find_compiler()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert tuple(found["registered"]) == PLUGINS
    return dict(zip(CASES, found["results"], strict=True))


def chosen(answer: dict[str, Any]) -> set[tuple[str, str]]:
    """Type and layout of the first input of every combination."""
    return {(one["types"][0], one["layouts"][0]) for one in answer["combinations"]}


LINEAR = {("FLOAT", "LINEAR"), ("HALF", "LINEAR"), ("BF16", "LINEAR")}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("picture", LINEAR),
        ("blended picture", LINEAR),
        ("four channels", LINEAR | {("FLOAT", "HWC")}),
        ("feature", LINEAR | {("FLOAT", "HWC"), ("HALF", "HWC8"), ("BF16", "HWC8")}),
        ("blend", LINEAR | {("FLOAT", "HWC"), ("HALF", "HWC8"), ("BF16", "HWC8")}),
        ("phase", LINEAR | {("FLOAT", "HWC"), ("HALF", "HWC8"), ("BF16", "HWC8")}),
    ],
)
def test_types_and_layouts_of_warps(
    answers: dict[str, dict[str, Any]], case: str, expected: set[tuple[str, str]]
) -> None:
    answer = answers[case]
    assert chosen(answer) == expected
    for one in answer["combinations"]:
        source, motion, *others = zip(one["types"], one["layouts"], strict=True)
        assert motion == ("FLOAT", "LINEAR"), "coordinates are float32 in whatever precision"
        assert set(others) == {source}


@pytest.mark.parametrize(("state", "predicted"), STORAGES)
def test_types_of_steps(answers: dict[str, dict[str, Any]], state: Storage, predicted: Storage) -> None:
    answer = answers[f"step {state} {predicted}"]
    s, p = TYPES[state], TYPES[predicted]
    assert answer["output_types"] == [s, s]
    assert [s, p, s, s, "FLOAT", s, s] in [one["types"] for one in answer["combinations"]]
    assert all(set(one["layouts"]) == {"LINEAR"} for one in answer["combinations"])


def test_shapes_of_results(answers: dict[str, dict[str, Any]]) -> None:
    frames = BATCH * FRAMES
    assert answers["picture"]["output_shapes"] == [[frames, 3, 128, 128]]
    assert answers["phase"]["output_shapes"] == [[frames, 64, 64, 64]]
    assert answers["step float32 float16"]["output_shapes"] == [[BATCH, *LATENT], [BATCH, 2, *LATENT]]


@pytest.mark.parametrize("case", CASES)
def test_kernels_take_what_they_are_given(answers: dict[str, dict[str, Any]], case: str) -> None:
    answer = answers[case]
    inputs, outputs = len(CASES[case]["inputs"]), len(answer["output_shapes"])
    by_name = {kernel.name: kernel for kernel in KERNELS}
    for one in answer["combinations"]:
        expected = [".u64"] * inputs + [".u32"] * len(one["scalars"]) + [".u64"] * outputs
        assert parameters(one["text"], one["kernel"]) == expected
        assert one["scalar_types"] == ["INT32"]
        assert one["block"] == [by_name[one["kernel"]].threads, 1, 1]
        assert one["shared"] == 0
        assert all(tactic > 0 for tactic in one["tactics"])


@pytest.mark.parametrize("case", ["picture", "feature", "blend", "phase", "four channels"])
def test_warps_are_launched_as_elsewhere(answers: dict[str, dict[str, Any]], case: str) -> None:
    source, motion = (tuple(given["shape"][1:]) for given in CASES[case]["inputs"][:2])
    attributes = CASES[case]["attributes"]
    stride, phase = attributes.get("stride", 1), (attributes.get("phase_y", 0), attributes.get("phase_x", 0))
    storages = {name: storage for storage, name in TYPES.items()}
    for one in answers[case]["combinations"]:
        storage = storages[one["types"][0]]
        layout: Layout = "planar" if one["layouts"][0] == "LINEAR" else "channels_last"
        plan = warp_launch(storage, layout, source, motion[1:], BATCH * FRAMES, FRAMES, stride=stride, phase=phase)
        assert one["kernel"] == warp_kernel(storage, layout, blend=CASES[case]["op"] == "WarpBlend").name
        assert (one["grid"], one["scalars"]) == (list(plan.grid), list(plan.scalars))


def test_steps_are_launched_as_elsewhere(answers: dict[str, dict[str, Any]]) -> None:
    elements = math.prod(LATENT)
    lower, weight = quantile_rank(elements)
    plan = step_launch(elements, lower, float(weight), BATCH)
    for state, predicted in STORAGES:
        combinations = answers[f"step {state} {predicted}"]["combinations"]
        names = {tuple(one["types"][:2]): one["kernel"] for one in combinations}
        assert names[TYPES[state], TYPES[predicted]] == step_kernel(state, predicted).name
        assert all((one["grid"], one["scalars"]) == (list(plan.grid), list(plan.scalars)) for one in combinations)


@pytest.mark.parametrize("case", ["blend", "phase"])
def test_what_a_plugin_launches_gives_the_reference(
    answers: dict[str, dict[str, Any]], case: str, tmp_path: Path
) -> None:
    # Nothing of this project between the plugin's answer and the kernel's host build.
    kernels = [kernel for kernel in KERNELS if "warp_blend" in kernel.name and "f32" in kernel.name]
    built = host.HostKernels(host.build(kernels, tmp_path / "kernels.so"), kernels)
    rng = np.random.default_rng(0)
    shapes = [
        (batch, *given["shape"][1:]) for batch, given in zip(CASES[case]["batch"], CASES[case]["inputs"], strict=True)
    ]
    source, motion, previous = (torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)) for shape in shapes)
    attributes = CASES[case]["attributes"]
    phase = (attributes["phase_y"], attributes["phase_x"])
    expected = warp_blend_in_torch(source, motion, previous, stride=attributes["stride"], phase=phase)
    wanted = [one for one in answers[case]["combinations"] if one["types"][0] == "FLOAT"]
    assert len(wanted) == 2
    for one in wanted:
        layout: Layout = "planar" if one["layouts"][0] == "LINEAR" else "channels_last"
        result = empty(tuple(answers[case]["output_shapes"][0]), "float32", layout)
        inputs = [stored(t, "float32", form) for t, form in ((source, layout), (motion, "planar"), (previous, layout))]
        built.run(
            one["kernel"], Launch(tuple(one["grid"]), tuple(one["scalars"])), addresses(inputs), addresses([result])
        )
        found = values_of(result, "float32", layout).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class _Operators(nn.Module):
    """Each operator with a plugin, once."""

    def forward(
        self, source: torch.Tensor, motion: torch.Tensor, latent: torch.Tensor, coefficients: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        warped = warp(source, motion)
        blended = warp_blend(source, motion, warped[:, :, ::2, ::2], stride=2, phase=(1, 0))
        return (
            warped,
            blended,
            *thresholded_step(latent, latent, torch.stack([latent, latent], 1), latent, coefficients),
        )


def test_exported_nodes_carry_what_the_plugins_want(answers: dict[str, dict[str, Any]]) -> None:
    inputs = (torch.zeros(1, 8, 8, 8), torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 11))
    program = torch.onnx.export(_Operators().eval(), inputs, dynamo=True, opset_version=23, verbose=False)
    assert program is not None
    nodes = {node.op_type: node for node in program.model_proto.graph.node if node.domain == DOMAIN}
    assert set(nodes) == set(PLUGINS)
    fields = {CASES[case]["op"]: answer["fields"] for case, answer in answers.items()}
    for name, node in nodes.items():
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert (values.pop("plugin_namespace"), values.pop("plugin_version")) == (DOMAIN.encode(), b"1")
        # What the parser does not find it would fill in with nothing.
        assert sorted(values) == sorted(fields[name])


def test_without_tensorrt_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.endswith(".plugin") and name.startswith("lfdm_export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="tensorrt"):
        register_plugins()

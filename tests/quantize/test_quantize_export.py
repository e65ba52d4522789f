"""`lfdm-export --engine int8` and `fp8`, from the command to a clip."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from lfdm_export.bundle.reader import PARITY_FOLDER, Bundle
from lfdm_export.cli import export_main
from lfdm_export.engines.targets import find_target, this_machine
from lfdm_export.errors import InputError
from lfdm_export.export import precisions
from lfdm_export.export.bundle_export import export_bundle
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.parity.chain import check_chain
from lfdm_export.parity.report.checks import Check
from lfdm_export.parity.verify import verify_bundle
from lfdm_export.quantize.graphs import quantized_graphs
from lfdm_export.quantize.ranges import FORMATS, Format
from lfdm_export.quantize.report import SensitivityReport
from lfdm_export.quantize.states import Calibration
from lfdm_export.reference.stored import Reference
from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.model import LfdmModel
from tests.processor import needs_openvino_int8

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"
FEW = Calibration(
    chains=(
        SamplingOptions("ddim", 6, 1.0),
        SamplingOptions("dpm++2m", 4),
        SamplingOptions("ddim", 3, 0.0, guidance_scale=0.0),
    ),
    label_chain=SamplingOptions("ddim", 2, 1.0),
    held_out=SamplingOptions("ddim", 3, 1.0),
    chunks=1,
)
STORED = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


@pytest.fixture(scope="module", autouse=True)
def quick(traced_already: None) -> Iterator[None]:
    """Calibrate on less, and take the graphs that were traced already."""
    less = functools.partial(quantized_graphs, calibration=FEW, seconds=0.0, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precisions, "quantized_graphs", less)
        yield


@pytest.fixture(scope="module")
def bundles(small_model: LfdmModel, tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Bundle]:
    """The small model in either format."""
    folder = tmp_path_factory.mktemp("eight")
    return {form: export_bundle(small_model, folder / form, engine=form, frames=10, image_size=64) for form in FORMATS}


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_stored_in_8_bits_and_shared(small_bundle: Bundle, bundles: dict[Format, Bundle], form: Format):
    bundle = bundles[form]
    assert bundle.manifest.precision == form
    for stage in bundle.stages:
        graph = onnx.load(bundle.stage_path(stage), load_external_data=False).graph
        kinds = Counter(tensor.data_type for tensor in graph.initializer)
        operators = Counter(node.op_type for node in graph.node)
        if stage == "estimate_motion":
            assert not operators["QuantizeLinear"]
            continue
        assert kinds[STORED[form]] > operators["QuantizeLinear"] > 0, stage
        for old, new in (("inputs", "inputs"), ("outputs", "outputs")):
            assert [t.name for t in getattr(bundle.stages[stage], new)] == [
                t.name for t in getattr(small_bundle.stages[stage], old)
            ]
    sizes = {b: (b.path / "onnx" / "unet.data").stat().st_size for b in (small_bundle, bundle)}
    # Attention, which stays float, is half of so small a network.
    assert sizes[bundle] < 0.75 * sizes[small_bundle]


@pytest.mark.parametrize("form", FORMATS)
def test_stages_and_a_clip_have_the_parity_that_is_wanted(bundles: dict[Format, Bundle], form: Format):
    report = verify_bundle(bundles[form], threads=1)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert f"rounded to {form}" in report.engine
    assert_parity(report.checks)


@needs_openvino_int8
def test_a_clip_has_it_in_openvino_as_well(bundles: dict[Format, Bundle]):
    bundle = bundles["int8"]
    assert bundle.reference_path is not None
    manifest = bundle.manifest
    reference = Reference.load(
        bundle.reference_path, manifest.config, manifest.geometry, bundle.stages, manifest.provenance
    )
    assert_parity(check_chain(bundle, reference.chain, reference.seed, 1, None, "openvino").checks)


def assert_parity(checks: Sequence[Check]) -> None:
    assert not [check for check in checks if not check.passed]
    psnr = {check.subject: check.found for check in checks}["frames, PSNR"]
    assert psnr is not None
    # Worse than float32, which leaves more than 70 dB.
    assert 30 <= psnr < 70


@pytest.mark.parametrize("form", FORMATS)
def test_what_sensitivity_keeps_is_not_quantized(bundles: dict[Format, Bundle], form: Format):
    report = SensitivityReport.read(bundles[form].path / PARITY_FOLDER)
    assert report.form == form
    assert report.labels == len(bundles[form].labels)
    for stage in report.stages:
        assert stage.together >= stage.everything
        kept = {name for name in stage.kept if "dB, below" in stage.kept[name]}
        graph = onnx.load(bundles[form].stage_path(stage.stage), load_external_data=False).graph
        quantized = {
            (node.name.rpartition("/")[0]) for node in graph.node if any(i.endswith("_read") for i in node.input[1:2])
        }
        assert quantized
        assert not kept & quantized
        assert len(quantized) <= stage.total_layers - len(stage.kept)


@pytest.mark.parametrize("form", FORMATS)
def test_biases_take_back_the_shift_in_every_graph_of_a_network(bundles: dict[Format, Bundle], form: Format):
    corrections = {one.stage: one for one in SensitivityReport.read(bundles[form].path / PARITY_FOLDER).corrections}
    assert set(corrections) == {"encode", "denoise", "decode"}
    biases = {}
    for stage in bundles[form].stages:
        model = onnx.load(bundles[form].stage_path(stage))
        added = {name for node in model.graph.node for name in node.input if name.endswith(".bias")}
        biases[stage] = Counter(
            onnx.numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer if tensor.name in added
        )
    for stage, one in corrections.items():
        assert biases[stage].total() >= one.layers > 0
        assert one.shift[1] != one.shift[0]
    shared = biases["denoise"]
    assert shared
    for stage in ("step", "step_guided", "denoise_guided"):
        assert biases[stage] == shared


def test_targets_of_8_bits(bundles: dict[Format, Bundle]):
    vnni = {"avx512_vnni", "avx_vnni", "amx_int8"} & set(this_machine().processor)
    assert find_target("auto", "run", "int8").target == ("openvino" if vnni else "onnxruntime")
    assert find_target("auto", "run", "fp8").target == "onnxruntime"


@needs_openvino_int8
def test_the_same_seed_gives_a_like_clip_on_both_runtimes(bundles: dict[Format, Bundle]):
    latents = []
    for target in ("onnxruntime", "openvino"):
        pipe = Pipeline(bundles["int8"], threads=1, target=target)
        encoded = pipe.encode(np.full((1, 64, 64, 3), 90, np.uint8))
        rng = np.random.default_rng(4)
        shape = (1, 3, 10, 16, 16)
        noise = (rng.standard_normal(shape, np.float32) for _ in range(100))
        latents.append(
            pipe.sample(
                encoded,
                bundles["int8"].embeddings[:1],
                sampler="ddim",
                steps=3,
                eta=1.0,
                guidance_scale=1.0,
                noise=noise,
            )
        )
    assert 0 < np.abs(latents[0] - latents[1]).mean() < 0.05


def test_the_command(small_model: LfdmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", "untrained", "--frames", "10", "--image-size", "64", "--engine", "int8"]
    assert export_main([*arguments, "--target", "none", "--no-verify", "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    page = tmp_path / "b" / "parity" / "sensitivity.md"
    line = next(line for line in said.splitlines() if line.startswith("layers "))
    assert str(page) in line
    assert "layers in int8; most sensitive: " in line
    worst = json.loads((page.parent / "sensitivity.json").read_text(encoding="utf-8"))
    assert {stage["stage"] for stage in worst["stages"]} == {"encode", "denoise", "decode"}
    # Like the other report it is not part of the bundle, which is whole without it.
    page.unlink()
    Bundle.open(tmp_path / "b")


def test_an_unknown_precision_names_those_that_are(small_model: LfdmModel, tmp_path: Path):
    with pytest.raises(InputError, match=r"unknown engine precision 'int4'; expected one of .*, int8, fp8"):
        export_bundle(small_model, tmp_path / "b", engine="int4")


def test_fp8_for_openvino_is_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status = export_main(
        ["--model", "untrained", "--engine", "fp8", "--target", "openvino", "--out", str(tmp_path / "b")]
    )
    assert status == 1
    assert "OpenVINO has no fp8 on a CPU: take another target" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()

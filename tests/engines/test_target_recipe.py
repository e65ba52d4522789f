"""A backend needs only its declaration and its entry in the list of targets; this file adds a small one."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lfdm_export import Pipeline
from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli.plans import add_target_option
from lfdm_export.engines import target_table, targets
from lfdm_export.engines.bundle_facts import bundle_facts
from lfdm_export.engines.interface import Engine
from lfdm_export.engines.target_spec import FIRST_CAPABILITY, Machine, Purpose, TargetSpec
from lfdm_export.engines.targets import AUTO, TARGETS, find_target, find_targets, this_machine
from lfdm_export.errors import EngineError, InputError
from lfdm_export.generate.stage_runner import load_engine
from lfdm_export.graphs.bodies import BODIES
from lfdm_export.serving.triton.settings import ServingSettings
from lfdm_export.stages import PRECISIONS, StageSpec
from tests.fake_bundle import SIZE, write_fake_bundle
from tests.test_imports import ROOT

DOCUMENTS = ("docs/targets.md",)


class ReferenceEngine:
    """Runs a stage with ONNX's reference evaluator, in NumPy."""

    def __init__(self, path: Path, spec: StageSpec) -> None:
        self.spec = spec
        self._evaluator = ReferenceEvaluator(onnx.load(path))

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._evaluator.run(names, dict(feeds)), strict=True))


def load(bundle: Bundle, stage: str, _target: str, _threads: int | None, _device: str) -> Engine:
    return ReferenceEngine(bundle.stage_path(stage), bundle.stages[stage])


def lacks(_purpose: Purpose, precision: str, machine: Machine, _gpus: Collection[str] | None) -> str:
    return "a GPU is in the way: hide it" if machine.gpus else ""


TOY = TargetSpec(
    name="toy",
    title="The Toy",
    extra="export",
    packages={"onnx": ("onnx",)},
    takes="graphs",
    load=f"{__name__}:load",
    cpu_precisions=("fp32",),
    devices=("abacus",),
    lacks=lacks,
    note="for `nobody`",
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> TargetSpec:
    """Add a backend to the list of targets; a real one also has a folder."""
    monkeypatch.setattr(targets, "TARGETS", (*TARGETS, TOY))
    return TOY


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("toy") / "bundle")


def test_a_listed_target_is_found_and_refused_like_every_other(toy: TargetSpec):
    here = Machine((), "there is no GPU", {"onnx": "1.20"})
    assert find_target("toy", "run", "fp32", machine=here).target == "toy"
    assert find_target(AUTO, "run", "fp32", machine=here).reason.startswith("The Toy 1.20 is installed; not ONNX Run")
    both = find_targets(AUTO, "run", "fp32", machine=Machine((), "none", {"onnx": "1.20", "onnxruntime": "1.32"}))
    assert [choice.target for choice in both] == ["onnxruntime", "toy"]
    for machine, precision, message in (
        (Machine((), "", {}), "fp32", r"onnx not installed: pip install 'lfdm-export\[export\]'"),
        (here, "int8", "The Toy has no int8 on a CPU: take another target, or export another precision"),
    ):
        with pytest.raises(EngineError, match=f"the target 'toy' is not available here: {message}"):
            find_target("toy", "run", precision, machine=machine)
    with pytest.raises(InputError, match=r"unknown target 'tpu'; expected auto, .*, torch, toy"):
        find_target("tpu", "run", "fp32")
    assert "onnx" in this_machine().packages


def test_it_makes_the_clip_that_every_other_makes(toy: TargetSpec, bundle: Bundle):
    assert isinstance(load_engine(bundle, "encode", "toy"), ReferenceEngine)
    photo = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    there, here = (Pipeline(bundle, target=target) for target in ("toy", "onnxruntime"))
    found, expected = (pipe.generate(photo, label="Anger", seed=3) for pipe in (there, here))
    assert np.abs(found.latent - expected.latent).max() < 1e-5
    assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1
    assert there.stages.engine_facts()["versions"] == {"onnx": this_machine().packages["onnx"]}
    assert Pipeline(bundle, device="abacus").stages.choice.reason == "the device 'abacus' is The Toy's"  # type: ignore[arg-type]


def test_it_is_named_wherever_targets_are(toy: TargetSpec, bundle: Bundle):
    assert bundle_facts(bundle).targets["toy"].runs != bool(this_machine().gpus)
    parser = argparse.ArgumentParser()
    add_target_option(parser)
    assert parser.parse_args(["--target", "toy"]).target == "toy"
    assert "ONNX Runtime, OpenVINO or The Toy, whichever is faster" in " ".join(parser.format_help().split())
    assert ServingSettings(target="toy", device="abacus").target == "toy"
    assert "| `toy` | `export` | graphs | fp32 |  | for `nobody` |" in target_table.as_markdown().splitlines()
    assert "  toy           takes graphs; CPU: fp32; for nobody; extra export" in target_table.as_text().splitlines()


def test_without_its_line_it_is_unknown(bundle: Bundle):
    with pytest.raises(InputError, match="unknown target 'toy'"):
        Pipeline(bundle, target="toy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_precisions": ()}, "target 'toy': precisions: found none, expected fp32, "),
        ({"cpu_precisions": ("fp33",)}, "precisions: found fp33"),
        ({"first_in": ("int9",)}, "precisions: found int9"),
        ({"takes": "tea"}, "takes 'tea', expected graphs, plans, weights"),
        ({"packages": {}}, "packages: found none"),
    ],
)
def test_a_declaration_checks_itself(change: dict[str, object], message: str):
    fields = {name: getattr(TOY, name) for name in ("name", "title", "extra", "packages", "takes", "load")}
    with pytest.raises(InputError, match=message):
        TargetSpec(**{**fields, "cpu_precisions": ("fp32",), **change})


def test_what_is_declared_exists():
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    assert len({spec.name for spec in TARGETS}) == len(TARGETS)
    assert set(FIRST_CAPABILITY) == set(PRECISIONS)
    for spec in TARGETS:
        assert f"\n{spec.extra} = [" in extras, spec.name
        assert spec.bodies in BODIES, spec.name
        for entry in filter(None, (spec.load, spec.clip_maker, spec.device_chain)):
            assert callable(resolve_name(entry)), entry


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_hold_the_table_of_the_declarations(name: str):
    document = (ROOT / name).read_text(encoding="utf-8")
    remedy = f"run: python -m lfdm_export.engines.target_table {' '.join(DOCUMENTS)}"
    assert target_table.with_table(document, name) == document, remedy


def test_the_table_is_written_between_its_marks(tmp_path: Path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{target_table.BEGIN}\nold\n{target_table.END}\nbehind\n")
    target_table.main([str(path)])
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nbehind\n")
    assert "old" not in text
    assert text.count("\n| `") == len(TARGETS)
    path.write_text("nothing")
    with pytest.raises(InputError, match=r"page\.md has no place for the table of targets"):
        target_table.main([str(path)])

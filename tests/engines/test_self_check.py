"""The targets that `auto` selects, and errors of an explicit target, by the reference in a bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli.serve import settle_target
from lfdm_export.engines import self_check
from lfdm_export.engines.onnxruntime import engine as ort_engine
from lfdm_export.engines.onnxruntime.target import PROVIDERS
from lfdm_export.engines.self_check import VARIABLE, Finding, SelfCheck
from lfdm_export.engines.self_check_choice import choose_checked
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import Choice
from lfdm_export.errors import EngineError
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.machine import environment
from lfdm_export.serving.triton.settings import ServingSettings

ABLE = (Choice("onnxruntime", "is installed"), Choice("openvino", "is there"))
Change = Callable[[str, tuple[np.ndarray, ...]], tuple[np.ndarray, ...]]


class FakeTarget:
    """ONNX Runtime under another name: a test can change its outputs; it counts its runs."""

    def __init__(self, bundle: Bundle, change: Change | None = None) -> None:
        self._real = StageRunner(bundle, threads=1, target="onnxruntime", self_check=False)
        self._change = change
        self.runs: list[str] = []

    def run(self, stage: str, *tensors: np.ndarray) -> tuple[np.ndarray, ...]:
        self.runs.append(stage)
        outputs = self._real.run(stage, *tensors)
        return outputs if self._change is None else self._change(stage, outputs)

    def sample(self, stage: str, *arguments: Any) -> np.ndarray:
        self.runs.append("chain")
        latent = self._real.sample(stage, *arguments)
        return latent if self._change is None else self._change("chain", (latent,))[0]


def wrong_in(place: str, by: float = 0.1) -> Change:
    return lambda stage, outputs: tuple(o + np.float32(by) for o in outputs) if stage == place else outputs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache per test, with the self-check enabled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "cache" / "lfdm-export" / "self-check"


@pytest.fixture
def same_speed(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds of the targets, in the order of their checks, replacing measured times."""
    seconds: dict[int, float] = {}
    measured = SelfCheck._stages
    count = iter(range(100))

    def stages(self: SelfCheck, runner: Any) -> tuple[float, list[str]]:
        return seconds.get(next(count), 1.0), measured(self, runner)[1]

    monkeypatch.setattr(SelfCheck, "_stages", stages)
    return seconds


def choose(
    bundle: Bundle, targets: Mapping[str, FakeTarget], *, named: str | None = None
) -> tuple[Choice, FakeTarget | None]:
    able = ABLE if named is None else tuple(one for one in ABLE if one.target == named)
    choice, runner = choose_checked(bundle, able, lambda target: targets[target], named=named is not None)
    return choice, runner  # type: ignore[return-value]


def with_precision(bundle: Bundle, precision: str) -> Bundle:
    """Return the bundle with another precision, and thus other tolerances."""
    return replace(bundle, manifest=replace(bundle.manifest, precision=precision))


def pair(bundle: Bundle, first: Change | None = None, second: Change | None = None) -> dict[str, FakeTarget]:
    return {"onnxruntime": FakeTarget(bundle, first), "openvino": FakeTarget(bundle, second)}


def test_the_first_is_taken_where_both_are_as_fast(small_bundle: Bundle, same_speed: dict[int, float]):
    targets = pair(small_bundle)
    choice, runner = choose(small_bundle, targets)
    assert choice.target == "onnxruntime"
    assert runner is targets["onnxruntime"]
    assert "passed the self-check on this machine, 1 s for its clip; OpenVINO takes 1 s" in choice.reason


def test_the_faster_is_taken(small_bundle: Bundle, same_speed: dict[int, float]):
    same_speed[1] = 0.5
    assert choose(small_bundle, pair(small_bundle))[0].target == "openvino"


def test_a_little_faster_is_not_enough(small_bundle: Bundle, same_speed: dict[int, float]):
    same_speed[1] = 0.95
    assert choose(small_bundle, pair(small_bundle))[0].target == "onnxruntime"


@pytest.mark.parametrize("place", ["encode", "step", "decode"])
def test_a_wrong_stage_makes_auto_take_the_other(small_bundle: Bundle, same_speed: dict[int, float], place: str):
    choice, runner = choose(small_bundle, pair(small_bundle, wrong_in(place)))
    assert choice.target == "openvino"
    assert "not ONNX Runtime, which is wrong here: " in choice.reason
    assert f"of {place}: error " in choice.reason
    assert runner is not None


def test_a_stage_that_is_not_finite_is_wrong(small_bundle: Bundle, same_speed: dict[int, float]):
    assert choose(small_bundle, pair(small_bundle, wrong_in("step", np.nan)))[0].target == "openvino"


def test_a_clip_that_goes_astray_is_wrong_in_a_lowered_precision(small_bundle: Bundle, same_speed: dict[int, float]):
    same_speed[1] = 0.5
    bundle = with_precision(small_bundle, "int8")
    targets = pair(bundle, second=wrong_in("chain", 0.5))
    choice, _ = choose(bundle, targets)
    assert choice.target == "onnxruntime"
    assert "not OpenVINO, which is wrong here: latent, mean error: 0.5, at most 0.12 is allowed" in choice.reason
    # Single stages are within int8's tolerances, so only the clip shows the error; it runs only for candidates.
    assert targets["openvino"].runs.count("chain") == targets["onnxruntime"].runs.count("chain") == 1


def test_pictures_count_too(small_bundle: Bundle, same_speed: dict[int, float]):
    bundle = with_precision(small_bundle, "int8")
    with pytest.raises(EngineError, match=r"frames: PSNR 1\d\.\d dB, at least 30 dB are expected"):
        choose(bundle, pair(bundle, wrong_in("decode", 0.2)), named="onnxruntime")


def test_an_explicit_target_that_is_wrong_is_an_error_with_the_figure(small_bundle: Bundle):
    with pytest.raises(
        EngineError,
        match=r"in fp32 comes out wrong on this processor \(.*\): OpenVINO: next_latent of step: error 0\.\d+, at most "
        r"0\.0002 is allowed; next_history .*use another --target, or export another precision.*LFDM_SELF_CHECK=0",
    ):
        choose(small_bundle, pair(small_bundle, second=wrong_in("step")), named="openvino")


def test_nothing_that_passes_is_an_error_with_every_figure(small_bundle: Bundle):
    with pytest.raises(EngineError, match=r"ONNX Runtime: .*error.* \| OpenVINO: .*error"):
        choose(small_bundle, pair(small_bundle, wrong_in("step"), wrong_in("encode")))


def test_what_was_found_is_not_run_again(small_bundle: Bundle, cache: Path):
    bundle = with_precision(small_bundle, "int8")
    first, _ = choose(bundle, pair(bundle, second=wrong_in("chain", 0.5)))
    targets = pair(bundle)
    again, _ = choose(bundle, targets)
    assert again == first
    assert not targets["onnxruntime"].runs
    assert not targets["openvino"].runs
    assert not [path for path in cache.iterdir() if path.suffix != ".json"]  # files are written atomically


def test_a_wrong_one_stays_wrong(small_bundle: Bundle):
    for _ in range(2):
        with pytest.raises(EngineError, match="comes out wrong"):
            choose(small_bundle, pair(small_bundle, second=wrong_in("step")), named="openvino")


def changed_processor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(self_check, "processor_facts", lambda: ["AMD EPYC", "avx512f"])


def changed_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def changed_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(self_check, "environment", lambda *a, **k: {**environment(*a, **k), "onnxruntime": "0.1"})


@pytest.mark.parametrize("change", [changed_processor, changed_limit, changed_version])
def test_another_machine_or_version_is_checked_anew(
    small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
):
    check = SelfCheck(small_bundle)
    self_check._write(check._key("onnxruntime"), Finding(1.0, (), whole=True))
    assert check.known("onnxruntime") == Finding(1.0, (), whole=True)
    assert check.known("openvino") is None
    change(monkeypatch)
    assert check.known("onnxruntime") is None


def test_another_bundle_is_checked_anew(small_bundle: Bundle, tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes((small_bundle.path / "manifest.json").read_bytes() + b"\n")
    keys = [SelfCheck(bundle)._key("onnxruntime") for bundle in (small_bundle, replace(small_bundle, path=tmp_path))]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"bundle"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": 1, "finding": 2}'])
def test_a_damaged_finding_is_found_anew(small_bundle: Bundle, cache: Path, text: str):
    choose(small_bundle, pair(small_bundle), named="openvino")
    (path,) = cache.iterdir()
    path.write_text(text)
    targets = pair(small_bundle)
    choose(small_bundle, targets, named="openvino")
    assert targets["openvino"].runs
    assert json.loads(path.read_text())["finding"]["wrong"] == []


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()  # no folder can be created below a file, even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        targets = pair(small_bundle)
        assert choose(small_bundle, targets, named="onnxruntime")[0].target == "onnxruntime"
        assert targets["onnxruntime"].runs


def test_a_bundle_without_reference_is_not_checked(small_bundle: Bundle, caplog: pytest.LogCaptureFixture):
    files = {name: entry for name, entry in small_bundle.manifest.files.items() if name != "reference.npz"}
    bundle = replace(small_bundle, manifest=replace(small_bundle.manifest, precision="int8", files=files))
    # OpenVINO would be first in int8; ONNX Runtime rounds as the graph says and computes in float32.
    choice, runner = choose_checked(bundle, ABLE[::-1], lambda _: pytest.fail("nothing is loaded"), named=False)
    assert (choice.target, runner) == ("onnxruntime", None)
    assert "not checked on this machine: the bundle holds no reference to compare with" in choice.reason
    assert "ONNX Runtime in int8 is not checked on this machine" in caplog.text
    assert (
        choose_checked(bundle, ABLE[1:], lambda _: pytest.fail("nothing is loaded"), named=True)[0].target == "openvino"
    )


def test_an_engine_that_cannot_be_loaded_is_passed_over(small_bundle: Bundle, same_speed: dict[int, float]):
    targets = pair(small_bundle)

    def make(target: Target) -> FakeTarget:
        if target == "onnxruntime":
            raise EngineError("out of memory")
        return targets[target]

    choice, _ = choose_checked(small_bundle, ABLE, make, named=False)
    assert choice.target == "openvino"
    assert "not ONNX Runtime, which is wrong here: out of memory" in choice.reason
    with pytest.raises(EngineError, match=r"^out of memory$"):
        choose_checked(small_bundle, ABLE[:1], make, named=True)


def test_the_runner_checks_and_keeps_what_it_loaded(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    runner = StageRunner(small_bundle, threads=1, target="onnxruntime")
    assert "passed the self-check on this machine" in runner.choice.reason
    assert set(runner.loaded) == {"encode", "step", "decode"}
    assert "self-check" in StageRunner(small_bundle, threads=1, target="onnxruntime").choice.reason
    for off in (
        StageRunner(small_bundle, threads=1, target="onnxruntime", self_check=False),
        StageRunner(small_bundle, threads=1, target="onnxruntime"),
    ):
        monkeypatch.setenv(VARIABLE, "0" if off._self_check else "1")
        assert off.choice == Choice("onnxruntime", "as requested")
        assert off.loaded == ()


def test_a_device_is_checked_too(small_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The CPU runs under a GPU's name; results of the CPU itself do not count."""
    monkeypatch.setitem(PROVIDERS, "cuda", ("CPUExecutionProvider",))
    monkeypatch.setitem(ort_engine.MEMORY, "cuda", "cpu")
    monkeypatch.setattr(ort_engine, "require_on_gpu", lambda *_: None)
    for target in ("auto", "onnxruntime"):  # what is not supported on a CPU does not count
        bf16 = with_precision(small_bundle, "bf16")
        assert StageRunner(bf16, device="cuda", target=target, self_check=False).target == "onnxruntime"
    SelfCheck(small_bundle, threads=1).check("onnxruntime", FakeTarget(small_bundle), whole=True)
    runner = StageRunner(small_bundle, threads=1, device="cuda")
    assert runner.target == "onnxruntime"
    assert runner.choice.reason.startswith("the device 'cuda' is ONNX Runtime's; passed the self-check on this machine")
    assert set(runner.loaded) == {"encode", "step", "decode"}
    found = [json.loads(path.read_text())["key"] for path in cache.iterdir()]
    assert sorted((key["device"], "gpus" in key) for key in found) == [("cpu", False), ("cuda", True)]
    monkeypatch.setattr(SelfCheck, "check", lambda *_args, **_options: Finding(1.0, ("frames: PSNR 24.3 dB",), True))
    with pytest.raises(
        EngineError, match=r"comes out wrong on this machine's device 'cuda': ONNX Runtime: frames: PSNR"
    ):
        _ = StageRunner(small_bundle, threads=1, device="cuda").choice


def test_a_server_is_started_on_what_was_checked(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    settings, choice = settle_target(small_bundle, ServingSettings(threads=1, target="onnxruntime"))
    assert (settings.target, settings.self_check) == ("onnxruntime", False)
    assert "passed the self-check" in choice.reason
    monkeypatch.setattr(SelfCheck, "check", lambda *_args, **_options: Finding(1.0, ("frames: PSNR 24.3 dB",), True))
    with pytest.raises(EngineError, match=r"ONNX Runtime: frames: PSNR 24\.3 dB"):
        settle_target(small_bundle, ServingSettings(threads=2, target="onnxruntime"))


def test_processes_may_check_at_the_same_time(small_bundle: Bundle, cache: Path):
    code = (
        "import sys; from lfdm_export.generate.pipeline import Pipeline\n"
        "print(Pipeline.open(sys.argv[1], threads=1, target='onnxruntime').stages.target)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(small_bundle.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["onnxruntime"] * 2
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["finding"]["wrong"] == []

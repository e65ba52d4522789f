"""The plan store: stored and rejected plans, and the state after an interrupted or failed build."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.held import held_targets
from lfdm_export.engines.target_spec import Machine
from lfdm_export.engines.tensorrt import build as tensorrt_build
from lfdm_export.engines.tensorrt import plans
from lfdm_export.engines.tensorrt.build import BuildRequest, BuildResult
from lfdm_export.engines.tensorrt.plan_checks import plan_to_run
from lfdm_export.engines.tensorrt.plans import BuildOptions, PlanFolder, PlanRecord
from lfdm_export.errors import EngineError, InputError
from lfdm_export.export import plans as plan_making
from lfdm_export.export.plans import PlanMade, make_plans
from lfdm_export.files.json_codec import from_plain, to_plain
from tests.engines.test_targets import RTX, TENSORRT_11
from tests.fake_bundle import EMBEDDINGS, NULL, fake_manifest, write_fake_bundle, write_graphs

L4 = Gpu("NVIDIA L4", (8, 9), 24 << 30, "13.0")
H200 = Gpu("NVIDIA H200", (9, 0), 140 << 30, "13.0")
RTX_TITLE = "TensorRT for RTX 1.7.1.116"
HERE = Machine((), "the NVIDIA driver sees no GPU", RTX)
WITH_GPU = Machine((L4,), "", TENSORRT_11)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "fake")


class Builder:
    """Fake of the child process: writes given content."""

    def __init__(self) -> None:
        self.requests: list[BuildRequest] = []
        self.before: Callable[[Path, BuildRequest], object] = lambda folder, request: None
        self.layers = ""

    def __call__(self, folder: Path, request: BuildRequest, graph: bytes) -> BuildResult:
        self.requests.append(request)
        self.before(folder, request)
        (folder / "plan").write_bytes(f"plan {len(self.requests)} of {request.stage}".encode())
        if self.layers:
            (folder / "layers.json").write_text(self.layers, encoding="utf-8")
        return BuildResult("", 1.5, 10**9, {"network layers": 3})

    @property
    def built(self) -> list[str]:
        return [request.stage for request in self.requests]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    found = Builder()
    monkeypatch.setattr(plan_making, "build_in_child", found)
    return found


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TensorRT appear installed."""

    class Api:
        title = "TensorRT 11.4.0.106"

    monkeypatch.setattr(plan_making, "load_api", lambda target: Api())


def make(bundle: Bundle, *stages: str, **options: Any) -> dict[str, PlanMade]:
    made = make_plans(bundle, "tensorrt-rtx", stages=stages or None, machine=HERE, **options)
    return {one.stage: one for one in made}


def files(folder: PlanFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.path.rglob("*")) if path.is_file()}


def edit_record(folder: PlanFolder, stage: str, changes: dict[str, object]) -> None:
    path = folder.record_path(stage)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["fingerprint"].update(changes)
    path.write_text(json.dumps(record), encoding="utf-8")


# -------------------------------------------------------------------------------- building and storing


def test_every_stage_gets_a_plan_and_a_record(bundle: Bundle, builder: Builder):
    seen: list[tuple[str, int, int]] = []
    made = make(bundle, progress=lambda *call: seen.append(call))
    assert list(made) == list(bundle.stages) == builder.built
    assert {one.how for one in made.values()} == {"built"}
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    assert folder.path == bundle.path / "plans" / "tensorrt-rtx"
    assert sorted(files(folder)) == sorted(f"{stage}.{end}" for stage in bundle.stages for end in ("json", "plan"))
    record = made["step"].record
    assert folder.record("step") == record
    made_of = record.fingerprint
    assert made_of.sources == {"onnx/step.onnx": bundle.manifest.files["onnx/step.onnx"].sha256}
    assert (made_of.library, made_of.precision, made_of.batch) == (RTX_TITLE, "fp32", (1, 1, 32))
    assert made_of.gpus == ("SM80", "SM86", "SM89", "SM120", "SM121")
    assert record.seconds == 1.5
    assert held_targets(bundle) == ("tensorrt-rtx",)
    assert seen[0] == ("encode", 0, 7)
    assert seen[-1] == ("done", 7, 7)


def test_the_builder_is_told_shapes_and_weights(bundle: Bundle, builder: Builder):
    make(bundle, "step_guided", "decode")
    step, decode = builder.requests
    assert step.profile["noisy_latent"] == ((1, 3, 5, 4, 4), (1, 3, 5, 4, 4), (16, 3, 5, 4, 4))
    assert step.profile["guidance_scale"] == ((1,), (1,), (16,))
    assert decode.profile["latent"][2] == (8, 3, 2, 4, 4)
    assert step.weights_beside == str(bundle.stage_path("step_guided"))
    assert not step.tf32
    assert step.timing_cache == ""
    assert from_plain(BuildRequest, json.loads(json.dumps(to_plain(step))), "request") == step


def test_plans_that_fit_are_kept(bundle: Bundle, builder: Builder):
    make(bundle)
    before = files(PlanFolder(bundle.path, "tensorrt-rtx"))
    again = make(bundle)
    assert {one.how for one in again.values()} == {"kept"}
    assert len(builder.requests) == 7
    assert files(PlanFolder(bundle.path, "tensorrt-rtx")) == before


@pytest.mark.parametrize(
    "change",
    [
        {"library": "TensorRT for RTX 1.6.1.120"},
        {"gpus": ["SM89"]},
        {"batch": [1, 1, 64]},
        {"precision": "fp16"},
        {"grid_sampling": "as the parser read it"},
        {"structure": "0" * 64},
        {"sources": {"onnx/encode.onnx": "0" * 64}},
        {"options": {**to_plain(BuildOptions()), "optimization_level": 5}},
        {"target": "tensorrt"},
        {"unknown": 1},
    ],
)
def test_a_plan_of_anything_else_is_built_anew(bundle: Bundle, builder: Builder, change: dict[str, object]):
    make(bundle, "encode", "decode")
    edit_record(PlanFolder(bundle.path, "tensorrt-rtx"), "encode", change)
    made = make(bundle, "encode", "decode")
    assert (made["encode"].how, made["decode"].how) == ("built", "kept")
    assert make(bundle, "encode")["encode"].how == "kept"


@pytest.mark.parametrize("spoil", ["cut", "change", "remove", "no record", "no json", "endless"])
def test_a_plan_that_is_not_whole_is_built_anew(bundle: Bundle, builder: Builder, spoil: str):
    make(bundle, "encode")
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    plan, record = folder.plan("encode"), folder.record_path("encode")
    spoilers: dict[str, Callable[[], object]] = {
        "cut": lambda: plan.write_bytes(plan.read_bytes()[:-1]),
        "change": lambda: plan.write_bytes(b"X" + plan.read_bytes()[1:]),
        "remove": plan.unlink,
        "no record": record.unlink,
        "no json": lambda: record.write_bytes(b"\xff{"),
        "endless": lambda: record.write_bytes(b" " * (2 << 20)),
    }
    spoilers[spoil]()
    assert make(bundle, "encode")["encode"].how == "built"
    assert plan.read_bytes() == b"plan 2 of encode"


def test_the_inspectors_words_belong_to_their_plan(bundle: Bundle, builder: Builder):
    builder.layers = '{"Layers": []}'
    make(bundle, "encode")
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    assert folder.layers_path("encode").read_text(encoding="utf-8") == '{"Layers": []}'
    builder.layers = ""
    make(bundle, "encode", options=BuildOptions(optimization_level=1))
    assert not folder.layers_path("encode").exists()


def test_other_options_make_other_plans(bundle: Bundle, builder: Builder):
    make(bundle, "encode")
    assert make(bundle, "encode", options=BuildOptions(optimization_level=5))["encode"].how == "built"
    assert make(bundle, "encode", gpus=["SM89"])["encode"].how == "built"
    assert builder.requests[-1].gpus == ("SM89",)


def test_wrong_arguments(bundle: Bundle, builder: Builder):
    with pytest.raises(InputError, match="optimization level is 6, expected 0 to 5"):
        make(bundle, options=BuildOptions(optimization_level=6))
    with pytest.raises(InputError, match="cannot strip weights without"):
        make(bundle, options=BuildOptions(strip=True))
    with pytest.raises(InputError, match="'onnxruntime' takes the graphs as they are"):
        make_plans(bundle, "onnxruntime")
    with pytest.raises(InputError, match="unknown GPU architecture 'SM90'"):
        make(bundle, gpus=["SM90"])
    with pytest.raises(Exception, match="has no stage 'paint'"):
        make(bundle, "paint")
    with pytest.raises(EngineError, match="'tensorrt' is not available here"):
        make_plans(bundle, "tensorrt", machine=HERE)
    assert not builder.requests
    assert not (bundle.path / "plans").exists()


# ---------------------------------------------------------------------------------- TensorRT's options


@pytest.mark.usefixtures("tensorrt")
def test_tensorrt_builds_for_the_gpu_that_is_there(bundle: Bundle, builder: Builder):
    (made,) = make_plans(bundle, "tensorrt", stages=["encode"], machine=WITH_GPU)
    assert made.record.fingerprint.gpus == ("SM89", "NVIDIA L4")
    (request,) = builder.requests
    assert Path(request.timing_cache) == bundle.path / "plans" / "tensorrt" / "timing.cache"
    elsewhere = Machine((H200,), "", TENSORRT_11)
    (made,) = make_plans(bundle, "tensorrt", stages=["encode"], machine=elsewhere)
    assert made.how == "built"
    with pytest.raises(InputError, match="builds for the GPU that is here; leave out --gpus"):
        make_plans(bundle, "tensorrt", gpus=["SM89"], machine=WITH_GPU)


@pytest.mark.usefixtures("tensorrt")
def test_a_stripped_plan_serves_other_weights_of_the_same_structure(builder: Builder, tmp_path: Path):
    def bundle(value: float, operator: str = "Mul") -> Bundle:
        """Write a bundle whose encoder has a weight of this value, in an unused node of this operator."""
        manifest = fake_manifest()
        with BundleWriter(tmp_path / "fake") as writer:
            write_graphs(writer.folder, manifest)
            path = writer.folder / "onnx" / "encode.onnx"
            model = onnx.load(path)
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(3, value, np.float32), "w"))
            model.graph.node.append(onnx.helper.make_node(operator, ["w", "w"], ["unread"]))
            onnx.save(model, path)
            writer.write_embeddings(EMBEDDINGS, NULL)
            return writer.finish(manifest)

    def how(bundle: Bundle, *, strip: bool) -> str:
        options = BuildOptions(strip=strip)
        (one,) = make_plans(bundle, "tensorrt", stages=["encode"], options=options, machine=WITH_GPU)
        return one.how

    assert how(bundle(1.0), strip=True) == "built"
    assert how(bundle(2.0), strip=True) == "kept"
    assert how(bundle(2.0, "Add"), strip=True) == "built", "another structure"
    assert how(bundle(1.0), strip=False) == "built"
    assert how(bundle(2.0), strip=False) == "built", "a whole plan holds its weights"


# -------------------------------------------------------------------------------------- failing builds


def test_a_failed_build_leaves_the_old_plan(bundle: Bundle, builder: Builder):
    make(bundle, "encode", "decode")
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    before = files(folder)

    def fail(folder: Path, request: BuildRequest) -> None:
        (folder / "plan").write_bytes(b"half a pl")
        raise EngineError("the graph is refused")

    builder.before = fail
    with pytest.raises(EngineError, match="the graph is refused"):
        make(bundle, "encode", gpus=["SM89"])
    assert files(folder) == before
    builder.before = lambda *_: None
    assert make(bundle, "encode")["encode"].how == "kept"


def test_stages_that_were_done_before_a_failure_are_kept(bundle: Bundle, builder: Builder):
    def fail(folder: Path, request: BuildRequest) -> None:
        if request.stage == "step":
            raise EngineError("no")

    builder.before = fail
    with pytest.raises(EngineError, match="no"):
        make(bundle)
    builder.before = lambda *_: None
    how = {stage: one.how for stage, one in make(bundle).items()}
    assert [stage for stage, what in how.items() if what == "kept"] == ["encode", "denoise", "denoise_guided"]


@pytest.mark.parametrize("name", ["plan", "encode.json"])
def test_a_full_disk_leaves_the_old_plan_or_none(
    bundle: Bundle, builder: Builder, monkeypatch: pytest.MonkeyPatch, name: str
):
    make(bundle, "encode")
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    before = files(folder)

    def full(path: Path) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(plans, "sync_path", full)
    with pytest.raises(EngineError, match=r"plan of stage 'encode' cannot be written: No space left on device"):
        make(bundle, "encode", gpus=["SM89"])
    assert files(folder) == before


def test_a_crash_between_plan_and_record_leaves_none(bundle: Bundle, builder: Builder, monkeypatch: pytest.MonkeyPatch):
    make(bundle, "encode")
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    real = Path.replace

    def crash(path: Path, target: Path) -> Path:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        make(bundle, "encode", gpus=["SM89"])
    monkeypatch.undo()
    assert folder.record("encode") is None
    with pytest.raises(EngineError, match="has no whole TensorRT for RTX plan of stage 'encode'"):
        plan_to_run(bundle, "encode", "tensorrt-rtx", RTX_TITLE, L4)


def test_what_a_killed_builder_left_is_swept(bundle: Bundle, builder: Builder):
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    left = folder.path / ".building.lfdm-0123456789ab.part" / "step"
    left.mkdir(parents=True)
    (left / "plan").write_bytes(b"half")
    make(bundle, "encode")
    assert [path.name for path in sorted(folder.path.iterdir())] == ["encode.json", "encode.plan"]


def test_a_bundle_that_cannot_be_written(bundle: Bundle, builder: Builder):
    (bundle.path / "plans").write_bytes(b"")
    with pytest.raises(EngineError, match=r"plans cannot be written to .*tensorrt-rtx: "):
        make(bundle, "encode")


def test_builders_take_turns(bundle: Bundle):
    folder = PlanFolder(bundle.path, "tensorrt-rtx")
    with folder.workshop():
        other = os.open(folder.path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


# ------------------------------------------------------------------------------- the child process


def request(**changes: Any) -> BuildRequest:
    return dataclasses.replace(BuildRequest("tensorrt-rtx", "encode", "x.onnx", {}), **changes)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replace the builder's program by the test's own."""

    def install(code: str) -> Path:
        script = tmp_path / "child.py"
        script.write_text(code, encoding="utf-8")
        real = subprocess.Popen

        def start(command: list[str], **options: Any) -> Any:
            assert command[1:3] == ["-m", "lfdm_export.engines.tensorrt.build"]
            return real([sys.executable, str(script), command[3]], **options)

        monkeypatch.setattr(subprocess, "Popen", start)
        (tmp_path / "work").mkdir()
        return tmp_path / "work"

    return install


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "its process died of SIGSEGV$"),
        ("import os; os.kill(os.getpid(), 9)", r"died of SIGKILL \(perhaps out of memory\)"),
        ("import sys; sys.exit('last words')", "ended with status 1 and no result; it said: last words"),
        ("import sys, pathlib; pathlib.Path(sys.argv[1], 'result.json').write_text('{')", "ended with status 0"),
    ],
)
def test_a_builder_that_dies_is_an_error(child: Callable[[str], Path], code: str, message: str):
    with pytest.raises(EngineError, match=f"TensorRT for RTX could not build stage 'encode': .*{message}"):
        tensorrt_build.build_in_child(child(code), request(), b"")


def test_an_interrupt_takes_the_builder_along(child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    work = child("import time; time.sleep(600)")
    started: list[Any] = []
    real = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        process = real(*arguments, **options)
        started.append(process)
        monkeypatch.setattr(process, "communicate", interrupt)
        return process

    def interrupt() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        tensorrt_build.build_in_child(work, request(), b"")
    assert started[0].poll() == -signal.SIGKILL


def test_a_killed_parent_takes_the_builder_along(tmp_path: Path):
    """The builder's process ends with its parent, even if the parent is killed."""
    if not sys.platform.startswith("linux"):
        return  # not supported by this system
    child_code = (
        "import time\nfrom lfdm_export.engines.tensorrt.build import _die_with_parent\n"
        "_die_with_parent()\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    parent_code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child_code!r}], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\nchild.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(1200):
        if not alive(pid):
            break
        time.sleep(0.05)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child outlived its parent")


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_plan_that_does_not_fit_on_the_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the real child's `main` on a disk with room for some kilobytes."""
    import signal as signals

    work = tmp_path / "work"
    work.mkdir()
    (work / "request.json").write_text(json.dumps(to_plain(request())), encoding="utf-8")
    (work / "graph.onnx").write_bytes(b"")
    monkeypatch.setattr(tensorrt_build, "load_api", lambda target: None)
    monkeypatch.setattr(tensorrt_build, "_built", lambda *_: (bytes(1 << 20), {}))
    monkeypatch.setattr(tensorrt_build, "_die_with_parent", lambda: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signals.signal(signals.SIGXFSZ, signals.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        assert tensorrt_build.main(str(work)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signals.signal(signals.SIGXFSZ, handler)
    result = json.loads((work / "result.json").read_text(encoding="utf-8"))
    assert result["error"] == "the plan cannot be written: File too large"


# ------------------------------------------------------------------------- selecting a plan to run


def test_a_plan_that_fits_is_given(bundle: Bundle, builder: Builder):
    made = make(bundle, "encode")["encode"]
    assert plan_to_run(bundle, "encode", "tensorrt-rtx", RTX_TITLE, L4) == (made.path, made.record)


def test_no_plan(bundle: Bundle):
    again = rf"make it with: lfdm-export --plans {bundle.path} --target tensorrt-rtx"
    with pytest.raises(EngineError, match=f"no whole TensorRT for RTX plan of stage 'step'; {again}"):
        plan_to_run(bundle, "step", "tensorrt-rtx", RTX_TITLE, L4)
    assert held_targets(bundle) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": "TensorRT for RTX 1.6.1.120"}, r"was built by TensorRT for RTX 1\.6\.1\.120, here is TensorRT f"),
        ({"gpus": ["SM120"]}, r"was built for SM120, here is NVIDIA L4 \(SM89\)"),
        ({"batch": [1, 1, 64]}, r"is of batch profile \(1, 1, 64\), expected \(1, 1, 32\)"),
        ({"precision": "fp16"}, "is of precision fp16, expected fp32"),
        ({"grid_sampling": "as the parser read it"}, "is of sampling as the parser read it, expected linear, zeros"),
        ({"stage": "step"}, "is of stage step, expected encode"),
        ({"sources": {"onnx/encode.onnx": "0" * 64}}, "was made from another onnx/encode.onnx than the bundle's"),
        ({"sources": {"onnx/gone.data": "0" * 64}}, "was made from another onnx/gone.data than the bundle's"),
        ({"sources": {}}, "does not say what it was made from"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_what_to_run(
    bundle: Bundle, builder: Builder, change: dict[str, object], message: str
):
    make(bundle, "encode")
    edit_record(PlanFolder(bundle.path, "tensorrt-rtx"), "encode", change)
    advice = "; make it with: lfdm-export --plans .* --target tensorrt-rtx, or take --target onnxruntime"
    with pytest.raises(EngineError, match=message + ".*" + advice):
        plan_to_run(bundle, "encode", "tensorrt-rtx", RTX_TITLE, L4)


def test_an_altered_plan_is_refused(bundle: Bundle, builder: Builder):
    made = make(bundle, "encode")["encode"]
    made.path.write_bytes(b"X" + made.path.read_bytes()[1:])
    with pytest.raises(EngineError, match="is not what its record says: it was altered, or cut off"):
        plan_to_run(bundle, "encode", "tensorrt-rtx", RTX_TITLE, L4)


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize(
    ("options", "runs", "refused"),
    [
        (BuildOptions(), [L4], [H200, dataclasses.replace(L4, name="NVIDIA GeForce RTX 4090")]),
        (
            BuildOptions(hardware_compatible="same-capability"),
            [L4, dataclasses.replace(L4, name="NVIDIA GeForce RTX 4090")],
            [H200],
        ),
        (BuildOptions(hardware_compatible="ampere+"), [L4, H200], [Gpu("NVIDIA T4", (7, 5), 16 << 30, "13.0")]),
    ],
)
def test_which_gpus_run_a_plan_of_tensorrt(
    bundle: Bundle, builder: Builder, options: BuildOptions, runs: list[Gpu], refused: list[Gpu]
):
    make_plans(bundle, "tensorrt", stages=["encode"], options=options, machine=WITH_GPU)
    for gpu in runs:
        assert plan_to_run(bundle, "encode", "tensorrt", "TensorRT 11.4.0.106", gpu)
    for gpu in refused:
        with pytest.raises(EngineError, match=f"was built for SM89, NVIDIA L4, here is {gpu.name}"):
            plan_to_run(bundle, "encode", "tensorrt", "TensorRT 11.4.0.106", gpu)


@pytest.mark.usefixtures("tensorrt")
def test_a_version_compatible_plan_runs_under_later_versions_of_its_major_number(bundle: Bundle, builder: Builder):
    options = BuildOptions(version_compatible=True)
    make_plans(bundle, "tensorrt", stages=["encode"], options=options, machine=WITH_GPU)
    for version in ("11.4.0.106", "11.4.1.2", "11.10.0.1"):
        assert plan_to_run(bundle, "encode", "tensorrt", f"TensorRT {version}", L4)
    for version in ("11.3.0.99", "12.0.0.1", "10.16.1.11"):
        with pytest.raises(EngineError, match=rf"was built by TensorRT 11\.4\.0\.106, here is TensorRT {version}"):
            plan_to_run(bundle, "encode", "tensorrt", f"TensorRT {version}", L4)


# -------------------------------------------------------------------------------- bundles and plans


def test_plans_are_no_part_of_the_bundle_and_outlive_its_export(bundle: Bundle, builder: Builder):
    make(bundle)
    assert Bundle.open(bundle.path).manifest.files == bundle.manifest.files
    again = write_fake_bundle(bundle.path)
    assert {one.how for one in make(again).values()} == {"kept"}
    changed = write_fake_bundle(bundle.path, None, encode=_ENCODE_OTHERWISE)
    how = {stage: one.how for stage, one in make(changed).items()}
    assert [stage for stage, what in how.items() if what == "built"] == ["encode"]


def test_a_plan_that_is_left_from_another_model_is_refused(bundle: Bundle, builder: Builder):
    make(bundle)
    changed = write_fake_bundle(bundle.path, None, encode=_ENCODE_OTHERWISE)
    with pytest.raises(EngineError, match=r"was made from another onnx/encode\.onnx than the bundle's"):
        plan_to_run(changed, "encode", "tensorrt-rtx", RTX_TITLE, L4)
    assert plan_to_run(changed, "decode", "tensorrt-rtx", RTX_TITLE, L4)


def test_a_failed_export_leaves_the_plans(bundle: Bundle, builder: Builder):
    make(bundle)
    with pytest.raises(RuntimeError), BundleWriter(bundle.path):
        raise RuntimeError
    assert held_targets(bundle) == ("tensorrt-rtx",)


def test_a_record_is_read_as_it_was_written(bundle: Bundle, builder: Builder):
    record = make(bundle, "encode")["encode"].record
    assert from_plain(PlanRecord, json.loads(json.dumps(to_plain(record))), "record") == record


_ENCODE_OTHERWISE = """
    gray = ReduceMax <keepdims = 1> (image, axis_1)
    gray_2 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (gray)
    gray_4 = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (gray)
    skip_0 = Tile (gray, repeat_4)
    skip_1 = Tile (gray_2, repeat_8)
    feature = Tile (gray_4, repeat_16)
    context = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (image)
"""

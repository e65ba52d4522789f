"""The target torch: weights in the bundle, compiled programs in the user's cache, stages and whole clips."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import MANIFEST, TORCH_WEIGHTS, Bundle, fingerprint
from lfdm_export.engines.compiled_cache import CompiledCache
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.held import held_targets, why_not_held
from lfdm_export.engines.pytorch import compiled
from lfdm_export.engines.pytorch.clips import TorchClipMaker
from lfdm_export.engines.pytorch.compiled import VARIABLE, Program, make_program
from lfdm_export.engines.pytorch.engine import open_engine
from lfdm_export.engines.pytorch.loop import TorchLoop
from lfdm_export.engines.pytorch.session import TorchSession, find_device, torch_session
from lfdm_export.engines.pytorch.target import PYTORCH
from lfdm_export.engines.pytorch.weights import DTYPES, load_modules, write_weights
from lfdm_export.engines.target_spec import Machine
from lfdm_export.engines.targets import find_target, find_targets
from lfdm_export.errors import EngineError, InputError
from lfdm_export.export.bundle_export import export_bundle
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.ops.cuda.dispatch import standing_in
from lfdm_export.ops.cuda.host import HostKernels
from lfdm_export.rewrite.precision import in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_models.model import LfdmModel

PACKAGES = {"onnxruntime": "1.30.0", "torch": "2.11.0", "einops": "0.8.0", "safetensors": "0.5.0"}
WITH_GPU = Machine((Gpu("NVIDIA H200", (9, 0), 1 << 37, "13.0"),), "", PACKAGES)
WITHOUT = Machine((), "the NVIDIA driver sees no GPU", PACKAGES)


def with_weights(bundle: Bundle, model: LfdmModel, folder: Path, precision: str = "fp32") -> Bundle:
    """Copy an fp32 bundle, and set its precision and the weights of that precision."""
    shutil.copytree(bundle.path, folder)
    write_weights(model, folder / TORCH_WEIGHTS)
    return listed(folder, bundle.manifest, precision)


def listed(folder: Path, manifest: Manifest, precision: str = "fp32") -> Bundle:
    """Return the bundle with its current weights in the manifest."""
    files = {**manifest.files, TORCH_WEIGHTS: fingerprint(folder / TORCH_WEIGHTS)}
    changed = dataclasses.replace(manifest, files=files, precision=precision)
    (folder / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def torch_bundle(small_bundle: Bundle, small_model: LfdmModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small bundle with weights for PyTorch; read-only."""
    return with_weights(small_bundle, small_model, tmp_path_factory.mktemp("torch") / "bundle")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip compilation, which takes minutes; the results are the same."""
    monkeypatch.setenv(VARIABLE, "0")


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("precision", list(DTYPES))
def test_modules_come_back_as_they_were(
    small_bundle: Bundle, small_model: LfdmModel, tmp_path: Path, precision: str
) -> None:
    bundle = with_weights(small_bundle, small_model, tmp_path / "bundle", precision)
    modules = load_modules(bundle, torch.device("cpu"))
    expected = in_precision(stage_modules(small_model, bundle.manifest.geometry.frames), DTYPES[precision])
    assert set(modules) == {"encode", "step", "step_guided", "decode", "estimate_motion"}
    for stage, module in modules.items():
        state = expected[stage].state_dict()
        found = module.state_dict()
        assert set(found) == set(state)
        for name, tensor in found.items():
            assert tensor.dtype == state[name].dtype, name
            assert torch.equal(tensor, state[name]), name


def test_a_precision_that_it_has_not_is_refused_before_the_export(small_model: LfdmModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the target 'torch' has no int8; expected fp32, tf32, fp16, bf16"):
        export_bundle(small_model, tmp_path / "bundle", engine="int8", torch_weights=True)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_weights_says_so(small_bundle: Bundle, torch_bundle: Bundle) -> None:
    assert held_targets(small_bundle) == ()
    assert "export it again from its checkpoints with --target torch" in why_not_held(small_bundle, "torch")
    assert (held_targets(torch_bundle), why_not_held(torch_bundle, "torch")) == (("torch",), "")
    with pytest.raises(EngineError, match=r"holds no weights for PyTorch: export it again"):
        open_engine(small_bundle, "encode", "torch")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


ONE = "diffusion.denoise_fn.init_conv.weight"


def without_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(ONE)
    save_file(tensors, path)


def of_another_shape(path: Path) -> None:
    save_file({**load_file(path), ONE: torch.zeros(3)}, path)


def with_another(path: Path) -> None:
    save_file({**load_file(path), "lfae.another": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "does not hold the weights of this bundle's networks"),
        (without_one, "Missing key.*denoise_fn.init_conv.weight"),
        (of_another_shape, "size mismatch for denoise_fn.init_conv.weight"),
        (with_another, "Unexpected key.*another"),
    ],
)
def test_weights_of_something_else_are_refused(
    torch_bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(torch_bundle.path, folder)
    damage(folder / TORCH_WEIGHTS)
    bundle = listed(folder, torch_bundle.manifest)
    with pytest.raises(EngineError, match=said):
        open_engine(bundle, "encode", "torch")


@pytest.mark.usefixtures("uncompiled")
def test_clips_are_those_of_onnx_runtime(torch_bundle: Bundle, picture: np.ndarray) -> None:
    ours = Pipeline(torch_bundle, target="torch", threads=1, self_check=False)
    other = Pipeline(torch_bundle, target="onnxruntime", threads=1, self_check=False)
    for scale in (1.0, 2.5):
        found, expected = (
            pipe.generate(picture, label=torch_bundle.labels[0], steps=3, guidance_scale=scale, seed=5)
            for pipe in (ours, other)
        )
        assert np.abs(found.latent - expected.latent).max() < 1e-3
        assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1
    assert ours.stages.target == "torch"


@pytest.mark.usefixtures("uncompiled")
def test_a_sample_depends_on_no_other(torch_bundle: Bundle) -> None:
    engine = open_engine(torch_bundle, "denoise", "torch", threads=1)
    rng = np.random.default_rng(0)
    feeds = {
        tensor.name: rng.integers(0, 999, 3) if tensor.dtype == "int64" else rng.standard_normal(
            tensor.concrete(batch=3)
        ).astype(np.float32)
        for tensor in engine.spec.inputs
    }  # fmt: skip
    together = engine.run(feeds)["predicted_noise"]
    alone = engine.run({name: array[2:] for name, array in feeds.items()})["predicted_noise"]
    assert np.array_equal(together[2:], alone)


@pytest.mark.usefixtures("uncompiled")
def test_engines_of_a_bundle_share_their_session(torch_bundle: Bundle) -> None:
    assert torch_session(torch_bundle) is torch_session(torch_bundle)
    assert torch_session(torch_bundle, threads=1) is not torch_session(torch_bundle)


@pytest.mark.usefixtures("uncompiled")
def test_weights_are_loaded_once_whatever_the_threads(
    torch_bundle: Bundle, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int | None] = []
    real = TorchSession.__init__

    def counting(self: TorchSession, bundle: Bundle, *, threads: int | None = None, **more: Any) -> None:
        loaded.append(threads)
        real(self, bundle, threads=threads, **more)

    monkeypatch.setattr(TorchSession, "__init__", counting)
    opened = Bundle.open(torch_bundle.path)
    Pipeline(opened, target="torch", threads=1, self_check=False).generate(picture, label=opened.labels[0], steps=1)
    assert loaded == [1]


class Product(torch.nn.Module):
    """A minimal program."""

    factor: torch.Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((4,), factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * self.factor)


def test_a_program_is_compiled_once_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # pytest would capture torch's internal log
    cache = CompiledCache(tmp_path)
    x = torch.tensor([[-1.0, 2.0, 3.0, -4.0]])

    def program(weights: str, *, factor: float = 2.0) -> Program:
        return make_program(Product(factor), (x,), name="product", identity={"weights": weights}, cache=cache)

    (found,) = program("a")(x)
    assert found.tolist() == [[0.0, 4.0, 6.0, 0.0]]
    assert [entry.name.partition("-")[0] for entry in tmp_path.iterdir()] == ["product"]

    def fail(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiled, "_compile", fail)
    (again,) = program("a", factor=5.0)(x)  # the compiled program is found only by its identity
    assert torch.equal(again, found)
    with pytest.raises(AssertionError, match="compiled again"):
        program("b")
    monkeypatch.setattr(compiled, "_sources", lambda: "other code")
    with pytest.raises(AssertionError, match="compiled again"):
        program("a")


def test_a_machine_without_a_compiler_gets_the_remedy(
    torch_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    # Its own session: that of the other tests may have run this stage already.
    engine = open_engine(Bundle.open(torch_bundle.path), "encode", "torch", threads=1)
    with pytest.raises(EngineError, match=r"No working C\+\+ compiler found; .* LFDM_TORCH_COMPILE=0 runs it"):
        engine.run({"image": np.zeros((1, 3, 64, 64), np.float32)})


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_clips_are_those_of_the_stages(
    torch_bundle: Bundle, host_kernels: HostKernels, picture: np.ndarray, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Pipeline(torch_bundle, target="onnxruntime", threads=1, self_check=False)
    pipe = Pipeline(torch_bundle, target="torch", threads=1, self_check=False)
    made: list[int] = []

    def maker(stage: str, batch: int) -> TorchClipMaker:
        made.append(batch)
        stages = torch_bundle.stages
        return TorchClipMaker(torch_session(torch_bundle, threads=1), stages["encode"], stages[stage], batch)

    monkeypatch.setattr(pipe.stages, "clip_maker", maker)  # as on a GPU
    options = {"label": [torch_bundle.labels[0]] * batch, "seed": [7, 8][:batch]}
    reports: list[tuple[str, int, int]] = []
    with standing_in(host_kernels):
        for more in ({"sampler": "ddim", "eta": 1.0, "steps": 3}, {"guidance_scale": 2.0, "steps": 2, "eta": 0.0}):
            found = pipe.generate(
                picture, **options, **more, progress=lambda *report: reports.append(report)  # type: ignore[arg-type]
            )  # fmt: skip
            wanted = expected.generate(picture, **options, **more)  # type: ignore[arg-type]
            assert np.abs(found.latent - wanted.latent).max() < 1e-3
            assert np.abs(found.frames.astype(int) - wanted.frames).max() <= 1
            assert np.abs(found.warped.astype(int) - wanted.warped).max() <= 1
            assert (found.seeds, found.labels, found.settings) == (wanted.seeds, wanted.labels, wanted.settings)
    assert made == [batch, batch]
    assert reports[:4] == [("denoise", index, 3) for index in range(4)]


@pytest.mark.usefixtures("uncompiled")
def test_a_loop_takes_noise_of_the_host_or_draws_its_own(torch_bundle: Bundle, host_kernels: HostKernels) -> None:
    from lfdm_export.sampling.noise import START, seeded_noise

    pipe = Pipeline(torch_bundle, target="torch", threads=1, self_check=False)
    table = pipe.sampler_table("ddim", 3, 1.0)
    spec = torch_bundle.stages["step"]
    rng = np.random.default_rng(0)
    fixed = {
        tensor.name: rng.standard_normal(tensor.concrete(batch=2)).astype(np.float32)
        for tensor in spec.inputs
        if tensor.name in ("context", "text_embedding")
    }
    with standing_in(host_kernels):
        loop = TorchLoop(torch_session(torch_bundle, threads=1), spec, 2)
        source = seeded_noise([3, 4], spec.inputs[0].concrete(batch=1)[1:])
        loop.begin(source(START), fixed, table)
        for index in range(table.steps):
            loop.step(index, source(index) if table.draws_noise[index] else None)
        handed = loop.finish()
        for _ in range(2):  # a chain must leave no state
            loop.begin_seeded([3, 4], fixed, table)
            for index in range(table.steps):
                loop.step_seeded(index, draws=bool(table.draws_noise[index]))
            assert np.abs(loop.finish() - handed).max() < 1e-4


def test_auto_takes_it_on_a_gpu_alone() -> None:
    chosen = find_targets("auto", "run", "fp16", plans=("torch",), machine=WITH_GPU)
    assert [choice.target for choice in chosen] == ["torch", "onnxruntime"]
    assert chosen[0].reason == "PyTorch 2.11.0 is installed and there is a GPU, NVIDIA H200 (SM90)"
    assert find_target("auto", "run", "fp16", machine=WITH_GPU).target == "onnxruntime"
    assert find_target("auto", "run", "fp32", plans=("torch",), machine=WITHOUT).target == "onnxruntime"
    assert find_target("torch", "run", "fp32", plans=("torch",), machine=WITHOUT).target == "torch"


def test_what_it_lacks_is_said() -> None:
    assert PYTORCH.lacking("run", "fp16", WITHOUT).startswith("PyTorch runs fp16 on a GPU, and the NVIDIA driver sees")
    assert PYTORCH.lacking("export", "fp16", WITHOUT) == ""
    assert PYTORCH.lacking("export", "int8", WITH_GPU).startswith("PyTorch has no int8 here")
    assert "pip install 'lfdm-export[torch]'" in PYTORCH.lacking("run", "fp32", Machine((), "no GPU", {}))
    old = Machine((Gpu("Tesla T4", (7, 5), 1 << 34, "12.4"),), "", PACKAGES)
    assert PYTORCH.lacking("run", "bf16", old).startswith("Tesla T4 (SM75) has no bf16")


def test_how_it_compiles_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert (compiled.mode(cpu), compiled.mode(cuda)) == ("aot", "jit")
    monkeypatch.setenv(VARIABLE, "0")
    assert (compiled.mode(cpu), compiled.mode(cuda)) == ("0", "0")
    monkeypatch.setenv(VARIABLE, "aot")
    with pytest.raises(InputError, match="is 'aot', which has crashed on GPUs; expected 'jit' or '0' there"):
        compiled.mode(cuda)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(InputError, match="LFDM_TORCH_COMPILE is 'fast', expected aot, jit, 0"):
        compiled.mode(cpu)


def test_a_gpu_that_pytorch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lfdm_export.engines.pytorch.session.find_gpus", lambda: (WITH_GPU.gpus, ""))
    with pytest.raises(
        EngineError, match=r"there is a GPU, NVIDIA H200, but PyTorch .* hide the GPU with CUDA_VISIBLE"
    ):
        find_device()

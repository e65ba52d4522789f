"""Resources available to a process: cores within masks and quotas, and the user's cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lfdm_export import machine


def fake_process(folder: Path, version: int, path: str, *, root: str = "/") -> tuple[Path, Path]:
    """Create a process's folder in /proc, and the mount point of its cgroups."""
    process, mount = folder / "self", folder / "cgroups"
    process.mkdir()
    mount.mkdir()
    kind, names, options = ("cgroup2", "", "rw") if version == 2 else ("cgroup", "cpu,cpuacct", "rw,cpu,cpuacct")
    (process / "cgroup").write_text(f"9:name=systemd:/\n4:memory:/other\n{0 if version == 2 else 3}:{names}:{path}\n")
    (process / "mountinfo").write_text(
        "22 1 0:21 / / rw - ext4 /dev/root rw\n"
        "29 22 0:25 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
        f"30 22 0:26 {root} {mount} rw,nosuid shared:10 - {kind} {kind} {options}\n"
    )
    return process, mount


def limit(folder: Path, version: int, quota: int | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{'max' if quota is None else quota} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroups_quota_counts_and_so_do_those_around_it(tmp_path: Path, version: int):
    process, mount = fake_process(tmp_path, version, "/pod/container")
    assert machine._cgroup_quota(process) is None
    limit(mount / "pod" / "container", version, None)
    assert machine._cgroup_quota(process) is None
    limit(mount / "pod" / "container", version, 350_000)
    assert machine._cgroup_quota(process) == 3.5
    limit(mount / "pod", version, 200_000)
    assert machine._cgroup_quota(process) == 2.0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("root", ["/", "/docker/1f2e"])
def test_a_container_that_sees_the_hosts_path(tmp_path: Path, version: int, root: str):
    process, mount = fake_process(tmp_path, version, "/docker/1f2e", root=root)
    limit(mount, version, 150_000)  # the mount point is its own group
    assert machine._cgroup_quota(process) == 1.5


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path):
    assert machine._cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (3.5, 3), (0.25, 1), (64.0, 8)])
def test_available_cores_are_those_of_mask_and_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int):
    monkeypatch.setattr(machine, "_cgroup_quota", lambda _process: quota)
    monkeypatch.setattr(machine, "_cores_of_mask", lambda: 8)
    assert machine.available_cores() == cores


def test_hardware_threads_of_one_core_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 5}, raising=False)
    assert machine._cores_of_mask() == 4  # no file says which hardware threads share a core
    for number, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 5: "5,7"}.items():
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert machine._cores_of_mask() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_mask_of_one_processor_leaves_one_core():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from lfdm_export.machine import available_cores; print(available_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_math_libraries_keep_to_a_quota(monkeypatch: pytest.MonkeyPatch):
    for name in machine._THREAD_VARIABLES:
        monkeypatch.setenv(name, "placeholder")  # registers the variable, so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "_cores_of_mask", lambda: 8)
    monkeypatch.setattr(machine, "_cgroup_quota", lambda _process: None)
    machine.limit_math_threads()
    assert not set(machine._THREAD_VARIABLES) & set(os.environ)
    monkeypatch.setattr(machine, "_cgroup_quota", lambda _process: 3.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    machine.limit_math_threads()
    assert [os.environ[name] for name in machine._THREAD_VARIABLES] == ["6", "3", "3"]


def test_the_cache_folder_is_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert machine.user_cache() == tmp_path / "cache"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert machine.user_cache() == tmp_path / "home" / ".cache"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert machine.user_cache() is None
    assert machine.optional_cache() is None


def test_a_home_without_a_cache_folder_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert machine.optional_cache() is None
    (tmp_path / ".cache").mkdir()
    assert machine.optional_cache() == tmp_path / ".cache" / "lfdm-export"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert machine.optional_cache() == tmp_path / "elsewhere" / "lfdm-export"


def test_only_one_place_looks_for_the_home():
    root = Path(__file__).resolve().parents[1]
    sources = [*root.glob("lfdm_export/**/*.py"), *root.glob("models/**/*.py"), *root.glob("benchmarks/*.py")]
    seekers = {path.name for path in sources if "Path.home()" in path.read_text(encoding="utf-8")}
    assert seekers == {"machine.py"}


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)
@pytest.mark.parametrize("engine", ["onnxruntime.OnnxRuntimeEngine", "openvino.OpenVinoEngine"])
def test_no_thread_of_an_engine_leaves_the_mask(engine: str, tmp_path: Path):
    import onnx

    from tests.fake_bundle import SPECS, fake_graph

    onnx.save(fake_graph(SPECS["denoise"]), tmp_path / "denoise.onnx")
    module, name = engine.split(".")
    code = (
        "import os; allowed = {max(os.sched_getaffinity(0))}; os.sched_setaffinity(0, allowed)\n"
        f"from lfdm_export.engines.{module}.engine import {name}\n"
        "from tests.fake_bundle import SPECS, feeds_for\n"
        f"engine = {name}({str(tmp_path / 'denoise.onnx')!r}, SPECS['denoise'])\n"
        "engine.run(feeds_for(SPECS['denoise'], batch=1))\n"
        "print([n for n in os.listdir('/proc/self/task') if not os.sched_getaffinity(int(n)) <= allowed])\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (2, 2), (8, 8)])
def test_every_engine_is_given_its_number_of_threads(
    threads: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import onnx
    import onnxruntime

    from lfdm_export.engines.onnxruntime import engine as ort_engine
    from lfdm_export.engines.openvino import engine as openvino_engine
    from tests.fake_bundle import SPECS, fake_graph

    path = tmp_path / "denoise.onnx"
    onnx.save(fake_graph(SPECS["denoise"]), path)
    for module in (ort_engine, machine):
        monkeypatch.setattr(module, "available_cores", lambda: 3)
    real, given = onnxruntime.InferenceSession, []

    def session(path: Path, options: onnxruntime.SessionOptions, **more: object) -> object:
        spins = options.get_session_config_entry("session.intra_op.allow_spinning")
        given.append((options.intra_op_num_threads, options.inter_op_num_threads, spins))
        return real(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    ort_engine.OnnxRuntimeEngine(path, SPECS["denoise"], threads=threads)
    # With more threads than cores, spinning threads would block each other.
    assert given == [(expected, 1, "1" if expected <= 3 else "0")]
    options = openvino_engine.OpenVinoEngine(path, SPECS["denoise"], threads=threads)._options
    assert (options["INFERENCE_NUM_THREADS"], options["ENABLE_CPU_PINNING"]) == (expected, False)


def test_pytorch_keeps_to_the_cores_and_gets_its_own_back(monkeypatch: pytest.MonkeyPatch):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        monkeypatch.setattr(machine, "available_cores", lambda: 2)
        with machine.torch_threads():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        monkeypatch.setattr(machine, "available_cores", lambda: 64)
        with machine.torch_threads():
            assert torch.get_num_threads() == 4  # fewer threads are the user's choice
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("SSE41", {"sse4_1"}),
        ("AVX", {"sse4_1", "avx"}),
        ("avx2", {"sse4_1", "avx", "avx2", "fma"}),
        ("AVX2_VNNI", {"sse4_1", "avx", "avx2", "fma", "avx_vnni"}),
        ("AVX512_CORE", {"sse4_1", "avx", "avx2", "fma", "avx512f"}),
        ("AVX512_CORE_BF16", {"sse4_1", "avx", "avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16"}),
        ("ALL", None),
        (None, None),
    ],
)
def test_a_variable_takes_features_of_the_processor_away(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, left: set[str] | None
):
    features = "sse4_1 avx avx2 fma avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8"
    monkeypatch.setattr(machine, "processor_info", lambda: {"flags": features})
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert machine.processor_features() == (set(features.split()) if left is None else left)

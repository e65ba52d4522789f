"""What this machine has and what this process may use: versions, processor, cores, the user's cache folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lfdm_export.errors import EngineError

#: NumPy's and PyTorch's math libraries read these when they are loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
#: Name of this project's folder inside the user's cache folder.
CACHE_NAME = "lfdm-export"
# An engine starts the threads that it is given, however many.
_MOST_THREADS = 256
_PROCESS = Path("/proc/self")
_CPUS = Path("/sys/devices/system/cpu")

#: Environment variables that keep libraries from using some features of the processor.
_LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")
#: What each value of ONEDNN_MAX_CPU_ISA takes from oneDNN and OpenVINO: prefixes of features, by Linux's names.
#: Source: oneDNN, "CPU dispatcher control".
_TAKEN: Mapping[str, tuple[str, ...]] = {
    "SSE41": ("avx", "fma", "f16c", "amx"),
    "AVX": ("avx2", "avx_vnni", "avx512", "fma", "f16c", "amx"),
    "AVX2": ("avx_vnni", "avx512", "amx"),
    "AVX2_VNNI": ("avx512", "amx"),
    "AVX2_VNNI_2": ("avx512", "amx"),
    "AVX512_CORE": ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx"),
    "AVX512_CORE_VNNI": ("avx512_bf16", "avx512_fp16", "amx"),
    "AVX512_CORE_BF16": ("avx512_fp16", "amx"),
    "AVX512_CORE_FP16": ("amx",),
}


def environment(threads: int | None, packages: Iterable[str]) -> dict[str, str]:
    """This machine and its programs, by name.

    Args:
        threads: threads of each engine; None for all cores.
        packages: distributions that took part; those that are not installed are left out.
    """
    return {
        "python": platform.python_version(),
        **package_versions(("lfdm-export", "numpy", *packages)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "threads": str(threads) if threads is not None else f"all of {available_cores()} cores",
    }


def available_cores() -> int:
    """Cores that this process may keep busy, at least 1; every engine's default number of threads.

    These are the cores in its CPU mask (`taskset`, a container's cpuset, Slurm), where the two hardware threads of a
    core count once, limited to the whole processors of its cgroup quota (a container's limit).
    """
    cores, quota = _cores_of_mask(), _cgroup_quota(_PROCESS)
    return cores if quota is None else max(1, min(cores, int(quota)))


def engine_threads(threads: int | None) -> int:
    """The number of an engine's threads: as requested, or `available_cores` for None.

    Raises:
        EngineError: the number is below 1, or far more than any processor has.
    """
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= most):
        raise EngineError(f"threads is {threads!r}, expected 1 or more (at most {most}), or None for all cores")
    return available_cores() if threads is None else threads


def limit_math_threads() -> None:
    """Keep the threads of BLAS and OpenMP within the cgroup quota, which they ignore (they respect CPU masks).

    Takes effect on libraries loaded afterwards, here and in child processes; a variable that the user has set keeps
    its value.
    """
    cores = available_cores()
    if cores < _cores_of_mask():
        for name in _THREAD_VARIABLES:
            os.environ.setdefault(name, str(cores))


@contextmanager
def torch_threads() -> Iterator[None]:
    """Limit PyTorch's CPU threads to `available_cores` inside the context; its own default may be higher."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, available_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def user_cache() -> Path | None:
    """The user's cache folder: XDG_CACHE_HOME, else ~/.cache; None for a user without a home.

    The folder need not exist, nor be writable.
    """
    said = os.environ.get("XDG_CACHE_HOME", "")
    if Path(said).is_absolute():  # a relative path is ignored. Source: XDG Base Directory Specification
        return Path(said)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in passwd
        return None


def optional_cache() -> Path | None:
    """This project's folder for data that only saves time; None where the user has no cache folder.

    A home without ~/.cache (of a container, of a service) stays as it is: no folder is created without a request.
    XDG_CACHE_HOME counts whether it exists or not.
    """
    cache = user_cache()
    wanted = cache is not None and (cache.is_dir() or Path(os.environ.get("XDG_CACHE_HOME", "")).is_absolute())
    return cache / CACHE_NAME if cache is not None and wanted else None


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the installed packages among `names`."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """The processor's name, as far as the system reports it."""
    return processor_info().get("model name") or platform.processor() or platform.machine()


def processor_facts() -> list[str]:
    """What decides which kernels libraries choose: the processor's name and features, and limits in the environment."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return [processor_name(), processor_info().get("flags", ""), *limits]


def processor_features() -> frozenset[str]:
    """The features of the processor that oneDNN and OpenVINO use, by Linux's names: a variable can take some away."""
    found = frozenset(processor_info().get("flags", "").split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return frozenset(feature for feature in found if not feature.startswith(_TAKEN.get(limit, ())))


def processor_info() -> dict[str, str]:
    """The first core's entry in /proc/cpuinfo, by Linux's names; empty on other systems."""
    text = _read(Path("/proc/cpuinfo"))
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _cores_of_mask() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    # The hardware threads of a core name the same siblings; where the system does not report them, each counts.
    siblings = {
        _read(_CPUS / f"cpu{number}" / "topology" / "thread_siblings_list").strip() or number
        for number in os.sched_getaffinity(0)
    }
    return max(1, len(siblings))


def _cgroup_quota(process: Path) -> float | None:
    """Processors that the process's cgroup and its parents allow, as a share of time; None without a limit.

    Args:
        process: the process's folder in /proc.
    """
    groups = [line.split(":", 2) for line in _read(process / "cgroup").splitlines() if line.count(":") >= 2]
    quotas = []
    for root, mount, controllers in _cgroup_mounts(_read(process / "mountinfo")):
        for _, names, path in groups:
            # Version 2 has one tree, without controller names.
            if (not names and controllers is None) or (controllers is not None and "cpu" in names.split(",")):
                # A container may see itself as the root of the mount, but see its path as on the host.
                inside = path[len(root) :] if root != "/" and path.startswith(root) else path
                group = mount / inside.lstrip("/")
                quotas += [quota for folder in _upwards(group, mount) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_mounts(mountinfo: str) -> Iterator[tuple[str, Path, tuple[str, ...] | None]]:
    """Root, mount point and controllers (None for version 2) of each tree that can limit CPU time. Source: proc(5)."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = None if kind[0] == "cgroup2" else tuple(kind[2].split(","))
        if controllers is None or "cpu" in controllers:
            yield fields[3], Path(fields[4]), controllers


def _upwards(folder: Path, top: Path) -> Iterator[Path]:
    """A folder and its parents, up to `top`."""
    yield folder
    while folder != top and top in folder.parents:
        folder = folder.parent
        yield folder
    if folder != top:
        yield top


def _quota_of(folder: Path) -> float | None:
    """The quota of one cgroup, of either version; None without a limit."""
    words = _read(folder / "cpu.max").split() or [
        _read(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    ]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    """The text of a system file; "" if it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""The GPU suite on the CPU: its parts with the host build of the kernels, and the handling of failures."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    gpu_attention,
    gpu_driver,
    gpu_errors,
    gpu_final,
    gpu_kernels,
    gpu_kernels_once,
    gpu_norms,
    gpu_part,
    gpu_suite,
)
from benchmarks.gpu_floors import Rates, Work, clip_floors
from benchmarks.gpu_parts import PARTS, SHARED
from benchmarks.gpu_processes import Job, run_jobs
from benchmarks.gpu_profile import kernel_table
from benchmarks.gpu_records import Record, plain, read_record, write_record
from benchmarks.gpu_summary import summary, write_summary
from benchmarks.gpu_timing import Budget, OutOfTimeError, Timing
from benchmarks.gpu_verdicts import TARGETS, floors, verdicts
from benchmarks.gpu_work import Bench, Settings, load_model
from lfdm_export.engines.cuda_driver import CudaDriver
from lfdm_export.ops.final_conv.gpu import final_conv_on_gpu
from lfdm_export.ops.temporal_attention.gpu import core_on_gpu
from tests.fake_gpu import FakeLibrary

ROOT = Path(__file__).resolve().parents[2]
TRIAL = ["--device", "cpu", "--tiny"]
#: One part of each kind: the others differ only by the precision or an option.
TRIED = (
    "checks", "ceilings", "faithful-fp32", "ours-fp16", "ours-fp16-compiled", "attention", "step", "warp",
    "norm", "linear", "final",
    "faithful-fp16-graphs", "batches-fp16", "ours-bf16",
)  # fmt: skip


def bench_for(name: str, settings: Settings) -> Bench:
    return Bench(settings, Budget(time.monotonic() + 3600), settings.record(name))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, Any]]:
    """Records of the parts, run in this process, read from their files."""
    folder = tmp_path_factory.mktemp("trial")
    settings = Settings("cpu", True, folder, folder / "out")
    threads = torch.get_num_threads()
    records = {}
    try:
        for name in ("shared", *TRIED):
            bench = bench_for(name, settings)
            part = SHARED if name == "shared" else PARTS[name]
            if part.model:
                bench.model = load_model(settings)
            gpu_part.run(part, bench)
            records[name] = strict_json(settings.record(name))
    finally:
        torch.set_num_threads(threads)
    return settings, records


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return found


def timings(value: Any) -> list[Mapping[str, Any]]:
    """Every timing within a record."""
    if not isinstance(value, dict):
        return []
    if value.keys() == {"median", "low", "high", "runs"}:
        return [value]
    return [timing for part in value.values() for timing in timings(part)]


# -- the parts


def test_parts_run(trial: tuple[Settings, dict[str, Any]]) -> None:
    assert {name: part["status"] for name, part in trial[1].items()} == dict.fromkeys(("shared", *TRIED), "ok")
    assert trial[1]["shared"]["data"]["weights"] == "small, untrained"


def test_times_are_medians_with_their_spread(trial: tuple[Settings, dict[str, Any]]) -> None:
    for name in (
        "ceilings",
        "ours-fp16",
        "ours-fp16-compiled",
        "batches-fp16",
        "attention",
        "step",
        "warp",
        "norm",
        "linear",
        "final",
    ):
        found = timings(trial[1][name]["data"])
        assert found, name
        assert all(0 < one["low"] <= one["median"] <= one["high"] and one["runs"] >= 1 for one in found)


def test_a_way_is_measured_stage_by_stage(trial: tuple[Settings, dict[str, Any]]) -> None:
    for name in ("faithful-fp32", "ours-fp16", "ours-fp16-compiled", "faithful-fp16-graphs"):
        data = trial[1][name]["data"]
        assert {"encode", "step", "decode", "clip", "end_to_end"} <= data.keys()
        for stage in ("step", "decode"):
            table = data["launched"][stage]
            assert table["launches"] >= len(table["kernels"]) > 1
            seconds = [one["seconds"] for one in table["kernels"]]
            assert seconds == sorted(seconds, reverse=True)
    assert trial[1]["batches-fp16"]["data"].keys() == {"1", "2"}


def test_ways_make_the_same_clip(trial: tuple[Settings, dict[str, Any]]) -> None:
    def psnr(name: str) -> float:
        parity = trial[1][name]["data"]["parity"]
        assert parity["finite"]
        return float(parity["psnr"])

    assert psnr("ours-fp16") > 40
    assert psnr("ours-fp16-compiled") > 40
    assert psnr("ours-bf16") > 30
    assert "parity" not in trial[1]["faithful-fp32"]["data"]  # the reference itself


def test_without_reference_frames_parity_is_not_measured(
    trial: tuple[Settings, dict[str, Any]], tmp_path: Path
) -> None:
    settings, _ = trial
    alone = Settings("cpu", True, tmp_path, tmp_path / "out")
    for file in (settings.weights, settings.host_kernels):
        (tmp_path / file.name).symlink_to(file)
    bench = bench_for("ours-fp16", alone)
    bench.model = load_model(alone)
    record = gpu_part.run(PARTS["ours-fp16"], bench)
    assert record["data"]["parity"].startswith("not measured")
    assert not alone.reference.exists()  # half precision is not a reference for others


def test_work_of_the_stages_is_counted(trial: tuple[Settings, dict[str, Any]]) -> None:
    work = trial[1]["ours-fp16"]["data"]["work"]
    assert work["step"]["flops"] > 1e6
    assert work["decode"]["flops"] > 1e6
    model = load_model(trial[0])
    half = 2 * sum(p.numel() for p in model.diffusion.denoise_fn.parameters())
    assert 0.8 * half < work["step"]["bytes"] < 2 * half


def test_kernels_were_checked(trial: tuple[Settings, dict[str, Any]]) -> None:
    checks = trial[1]["checks"]["data"]
    assert {"noise", "thresholded step whole", "thresholded step odd"} <= checks.keys()
    assert {name.split()[-1] for name in checks if name.startswith("warp")} == {"planar", "channels_last"}


def driver_check(settings: Settings, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(gpu_driver, "load_driver", lambda: CudaDriver(library))
    return gpu_part.run(PARTS["driver"], bench_for("driver", settings))


def test_driver_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    record = driver_check(Settings("cuda", False, tmp_path, tmp_path), library, monkeypatch)
    assert record["status"] == "ok"
    assert record["data"]["gpus"][0]["name"] == "NVIDIA L4"
    assert [record["data"][name] for name in ("copies", "capture and replay", "pinned ring", "second thread")] == [
        "right"
    ] * 4
    assert [library.device, library.pinned, library.streams, library.events] == [{}] * 4
    assert library.calls.count("cuGraphLaunch") == 3


def test_driver_check_finds_a_copy_that_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDriver, "copy", lambda self, target, source, size, stream: None)
    record = driver_check(Settings("cuda", False, tmp_path, tmp_path), FakeLibrary(), monkeypatch)
    assert record["status"] == "failed"
    assert record["error"].endswith("122879 of 122880 values differ")
    assert record["data"]["copies"] == "right"
    assert "pinned ring" not in record["data"]


def test_driver_check_finds_a_thread_without_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use = CudaDriver.use_first_gpu

    def on_this_thread_alone(self: CudaDriver) -> None:
        use(self)
        monkeypatch.setattr(self, "bind", lambda: None)

    monkeypatch.setattr(CudaDriver, "use_first_gpu", on_this_thread_alone)
    record = driver_check(Settings("cuda", False, tmp_path, tmp_path), FakeLibrary(), monkeypatch)
    assert record["status"] == "failed"
    assert "does not work from a second thread" in record["error"]
    assert "error 201" in record["error"]
    assert record["data"]["pinned ring"] == "right"


def test_a_wrong_kernel_fails_its_part(trial: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "warp", lambda source, motion: torch.zeros(len(motion), *source.shape[1:]))
    record = gpu_part.run(PARTS["checks"], bench_for("wrong", trial[0]))
    assert record["status"] == "failed"
    assert "differ from float64: warp" in record["error"]


def test_a_wrong_norm_fails_the_checks(trial: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_norms, "group_norm_silu", lambda **arguments: arguments["x"])
    record = gpu_part.run(PARTS["checks"], bench_for("wrong norm", trial[0]))
    assert record["status"] == "failed"
    assert "differ from float64: norm" in record["error"]


def test_a_wrong_last_convolution_fails_the_checks(
    trial: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_final, "final_conv_on_gpu", lambda *arguments: final_conv_on_gpu(*arguments) * 1.001)
    record = gpu_part.run(PARTS["checks"], bench_for("wrong last convolution", trial[0]))
    assert record["status"] == "failed"
    assert "differ from float64: final conv" in record["error"]


def test_the_last_convolution_is_compared(trial: tuple[Settings, dict[str, Any]]) -> None:
    data = trial[1]["final"]["data"]
    # Both ways make the same pictures, one from rounded maps.
    assert data["kernel"]["error"] < 1e-5 < data["columns, compiled"]["error"] < 5e-3
    assert data["bytes"] == 2 * 20 * 20 * (2 * 16 + 12)


def test_a_wrong_attention_fails_its_part(
    trial: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = F.scaled_dot_product_attention

    def wrong(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return right(q, *rest, **options) * (1 if q.dtype == torch.float64 else 1.01)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    record = gpu_part.run(PARTS["attention"], bench_for("wrong", trial[0]))
    assert (record["status"], record["error"].partition(":")[0]) == ("failed", "WrongResultError")


def test_a_wrong_core_fails_the_checks_and_its_part(
    trial: tuple[Settings, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = core_on_gpu

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return right(*arguments, **options) * 1.01

    monkeypatch.setattr(gpu_attention, "core_on_gpu", wrong)
    record = gpu_part.run(PARTS["checks"], bench_for("wrong", trial[0]))
    assert record["status"] == "failed"
    assert "differ from float64: temporal core" in record["error"]
    record = gpu_part.run(PARTS["attention"], bench_for("wrong", trial[0]))
    assert (record["status"], record["error"].partition(":")[0]) == ("failed", "WrongResultError")


def test_no_checked_pixel_lies_on_a_pixel_of_the_motion() -> None:
    # There rounding would decide whether a neighbor has weight 0, and with wild values also the expected result.
    levels = [*gpu_kernels.LEVELS.values(), *gpu_kernels.TOY_LEVELS.values(), (*gpu_kernels.PICTURE, 1)]
    for _, side, _ in levels:
        small = max(side // 4, 8)
        positions = [Fraction(small, side) * (at + Fraction(1, 2)) - Fraction(1, 2) for at in range(side)]
        assert all(position.denominator > 1 for position in positions), side


def test_results_of_a_warp_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result in the memory of the previous one would still be in the L2 cache."""
    alive: list[int] = []

    def captured(run: Any, _device: torch.device) -> Any:
        results = run()
        alive.extend({result.data_ptr() for result in results})
        return run

    monkeypatch.setattr(gpu_kernels, "captured", captured)
    gpu_kernels._each(torch.clone, [torch.zeros(8) for _ in range(5)], torch.device("cpu"))
    assert len(alive) == 5


def test_kernel_table_counts_launches() -> None:
    table = kernel_table(lambda: [torch.ones(4).cos() for _ in range(3)], torch.device("cpu"))
    assert next(one for one in table["kernels"] if one["name"] == "aten::cos")["launches"] == 3
    assert table["seconds"] == pytest.approx(sum(one["seconds"] for one in table["kernels"]))


def test_kernels_run_once_for_profilers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels_once, "build_host_kernels", lambda _settings: None)
    monkeypatch.setattr(gpu_kernels_once, "kernels_for", lambda _settings: open(os.devnull))  # noqa: PTH123, SIM115
    monkeypatch.setattr(gpu_kernels, "run_once", lambda device, toy: 6)
    assert gpu_kernels_once.main(["--device", "cpu"]) == 0
    assert "6 launches" in capsys.readouterr().out

    def wrong(device: torch.device, toy: bool) -> Record:
        raise gpu_errors.WrongResultError("kernels differ")

    monkeypatch.setattr(gpu_kernels, "checks", wrong)
    assert gpu_kernels_once.main(["checks", "--device", "cpu"]) == 1


# -- a record


def test_a_failed_part_keeps_its_results(tmp_path: Path) -> None:
    def broken(bench: Bench) -> Record:
        bench.keep({"first": 1.0})
        raise ZeroDivisionError("by nothing")

    part = type(SHARED)("", broken, 0, 1, torch=False)
    record = gpu_part.run(part, bench_for("broken", Settings("cpu", True, tmp_path, tmp_path)))
    assert plain(record) == strict_json(tmp_path / "parts" / "broken.json")
    assert (record["status"], record["data"]) == ("failed", {"first": 1.0})
    assert record["error"] == "ZeroDivisionError: by nothing"
    assert "broken" in record["traceback"]


def test_a_part_out_of_time_keeps_its_results(tmp_path: Path) -> None:
    def slow(bench: Bench) -> Record:
        bench.keep({"first": 1.0})
        bench.budget.need(1e9, "the rest")
        return {}

    part = type(SHARED)("", slow, 0, 1, torch=False)
    record = gpu_part.run(part, bench_for("slow", Settings("cpu", True, tmp_path, tmp_path)))
    assert (record["status"], record["data"]) == ("ok", {"first": 1.0})
    assert record["reason"].startswith("the rest takes about")


def test_records_are_always_valid_json(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", {"error": math.inf, "list": [math.nan, 1.5], "pair": (-math.inf,)})
    assert strict_json(tmp_path / "x.json") == {"error": "inf", "list": ["nan", 1.5], "pair": ["-inf"]}
    assert read_record(tmp_path / "none.json") is None


def test_records_do_not_name_folders_of_the_machine(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", {"traceback": f'File "{gpu_part.__file__}", in {sys.prefix}/lib/x.py'})
    assert strict_json(tmp_path / "x.json") == {"traceback": 'File "benchmarks/gpu_part.py", in lib/x.py'}


def test_settings_round_trip(tmp_path: Path) -> None:
    for more in ({}, {"golden": tmp_path}, {"checkpoints": (tmp_path / "a", tmp_path / "b")}):
        settings = Settings("cuda", False, tmp_path, tmp_path / "out", **more)
        settings.save()
        assert Settings.load(tmp_path) == settings


# -- processes


class Line:
    """Jobs that are small programs without torch, run by `run_jobs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Record] = {}

    def job(
        self,
        name: str,
        code: str = "",
        *,
        early: str = "",
        limit: float = 120,
        need: float = 0,
        after: str | None = None,
    ) -> Job:
        """A job that runs `early`, waits for its turn, runs `code`, and writes a record with ``data``."""
        record = self.folder / f"{name}.json"
        program = f"""
import json, os, pathlib, signal, subprocess, sys, time
record, data, folder = pathlib.Path({str(record)!r}), {{}}, pathlib.Path({str(self.folder)!r})
{textwrap.dedent(early)}
turn = sys.stdin.readline()
if not turn:
    sys.exit(1)
{textwrap.dedent(code)}
record.write_text(json.dumps({{"status": "ok", "data": data}}))
"""
        command = (sys.executable, "-S", "-c", program)
        return Job(name, command, record, self.folder / f"{name}.txt", need, limit, after)

    def run(self, *jobs: Job, background: tuple[Job, ...] = (), seconds: float = 600) -> dict[str, Record]:
        run_jobs(
            jobs, background, end=time.monotonic() + seconds, environment=dict(os.environ), done=self.done.__setitem__
        )
        return self.done


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def has_ended(process: int) -> bool:
    """Wait until a process has ended or is a zombie."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_jobs_run_in_order_one_at_a_time(line: Line) -> None:
    code = """
        assert not (folder / "busy").exists()
        (folder / "busy").touch()
        with (folder / "order").open("a") as file:
            file.write({name!r} + " ")
        (folder / "busy").unlink()
    """
    found = line.run(*(line.job(name, code.format(name=name)) for name in "abc"))
    assert (line.folder / "order").read_text().split() == list(found) == ["a", "b", "c"]
    assert {record["status"] for record in found.values()} == {"ok"}


def test_the_next_job_prepares_while_one_runs(line: Line) -> None:
    found = line.run(
        line.job("first", "while not (folder / 'prepared').exists(): time.sleep(0.01)"),
        line.job("second", early="(folder / 'prepared').touch()"),
    )
    assert [record["status"] for record in found.values()] == ["ok", "ok"]


def test_a_crash_of_a_waiting_job_does_not_affect_others(line: Line) -> None:
    early = "(folder / 'waiting').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    found = line.run(
        line.job("first", "while not (folder / 'waiting').exists(): time.sleep(0.01)"),
        line.job("second", early=early),
        line.job("third"),
    )
    assert [record["status"] for record in found.values()] == ["ok", "failed", "ok"]
    assert found["second"]["error"] == "ended by SIGKILL"


def test_a_crash_ends_only_one_job(line: Line) -> None:
    found = line.run(
        line.job("crash", "print('before the end', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        line.job("silent", "sys.exit(0)"),
        line.job("exit", "sys.exit(7)"),
        line.job("last"),
    )
    assert [record["status"] for record in found.values()] == ["failed", "failed", "failed", "ok"]
    assert found["crash"]["error"] == "ended by SIGSEGV"
    assert found["crash"]["last_lines"] == ["before the end"]
    assert found["silent"]["error"] == "ended with exit status 0 and no result"
    assert found["exit"]["error"] == "ended with exit status 7 and no result"


def test_a_hanging_job_is_killed_with_its_children(line: Line) -> None:
    hang = """
        child = subprocess.Popen(["sleep", "600"])
        apart = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (folder / "children").write_text(f"{child.pid} {apart.pid}")
        record.write_text(json.dumps({"status": "running", "data": {"first": 1}}))
        time.sleep(600)
    """
    found = line.run(line.job("hang", hang, limit=5), line.job("last"))
    assert found["hang"]["status"] == "failed"
    assert "was killed" in found["hang"]["error"]
    assert found["hang"]["data"] == {"first": 1}
    assert found["last"]["status"] == "ok"
    assert all(has_ended(int(pid)) for pid in (line.folder / "children").read_text().split())


def test_a_job_gets_its_time_limit(line: Line) -> None:
    found = line.run(line.job("one", "data = {'seconds': float(turn)}", limit=50))
    assert found["one"]["data"]["seconds"] == pytest.approx(47)


def test_the_whole_budget_bounds_a_job(line: Line) -> None:
    found = line.run(line.job("one", "data = {'seconds': float(turn)}", limit=5000), seconds=500)
    assert 0 < found["one"]["data"]["seconds"] <= 497


def test_a_job_without_enough_time_is_skipped_and_a_smaller_one_runs(line: Line) -> None:
    found = line.run(line.job("large", need=10_000), line.job("small"))
    assert found["large"]["status"] == "skipped"
    assert re.fullmatch(r"it takes at least 10000 s, and \d+ s were left", found["large"]["reason"])
    assert found["small"]["status"] == "ok"


def test_a_job_waits_for_its_dependency(line: Line) -> None:
    shared = line.job("shared", "(folder / 'made').touch()")
    user = line.job("user", "data = {'made': (folder / 'made').exists()}", after="shared")
    found = line.run(line.job("first"), user, background=(shared,))
    assert found["user"]["data"] == {"made": True}
    assert list(found) == ["first", "shared", "user"]


def test_a_job_without_its_dependency_is_skipped(line: Line) -> None:
    found = line.run(
        line.job("user", after="shared"), line.job("last"), background=(line.job("shared", "sys.exit(3)"),)
    )
    assert found["shared"]["status"] == "failed"
    assert (found["user"]["status"], found["user"]["reason"]) == ("skipped", "the part 'shared' did not succeed")
    assert found["last"]["status"] == "ok"


def test_an_old_record_does_not_count_as_new(line: Line) -> None:
    job = line.job("one", "sys.exit(0)")
    write_record(job.record, {"status": "ok", "data": {"old": True}})
    found = line.run(job)
    assert found["one"]["status"] == "failed"
    assert "data" not in found["one"]


def test_an_interrupted_run_leaves_no_process(line: Line) -> None:
    processes: list[int] = []

    def stop(name: str, record: Record) -> None:
        processes.append(record["data"]["process"])
        raise KeyboardInterrupt

    code = "data = {'process': os.getpid()}"
    waiting = line.job("second", "time.sleep(600)")
    forever = line.job("beside", "(folder / 'process').write_text(str(os.getpid())); time.sleep(600)")
    first = line.job("first", "while not (folder / 'process').exists(): time.sleep(0.01)\n" + code)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([first, waiting], [forever], end=time.monotonic() + 600, environment=dict(os.environ), done=stop)
    assert all(has_ended(process) for process in (*processes, int((line.folder / "process").read_text())))


# -- the command


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The command's own result: one part that runs, and one that cannot run on a CPU."""
    out = tmp_path_factory.mktemp("result") / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", *TRIAL, "--parts", "ceilings,driver", "--out", out],
        capture_output=True, text=True, check=False, cwd=out.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, strict_json(out / "gpu.json"), done.stderr


def test_command_writes_results(result: tuple[Path, dict[str, Any], str]) -> None:
    out, found, errors = result
    assert {name: part["status"] for name, part in found["parts"].items()} == {"driver": "skipped", "ceilings": "ok"}
    assert found["settings"] == {"device": "cpu", "tiny": True, "minutes": 6.5}
    assert {"date", "cpu", "platform", "python", "versions", "gpu"} <= found.keys()
    assert found["targets"].keys() == TARGETS.keys()
    assert {one["measured"] for one in found["targets"].values()} == {"not measured"}
    assert "A trial: its times mean nothing." in (out / "gpu.md").read_text(encoding="utf-8")
    assert (out / "logs" / "ceilings.txt").exists()
    assert "ceilings" in errors


def test_parts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)


def test_the_most_important_parts_come_first() -> None:
    """Checks come first, the most important measurements soon after."""
    names = list(PARTS)
    assert names[:2] == ["driver", "checks"]
    assert names.index("ours-fp16-compiled") <= 5
    assert all(part.need < part.limit for part in PARTS.values())
    fastest = sum(part.limit for part in list(PARTS.values())[: names.index("ours-fp16-compiled") + 1])
    assert fastest < 8 * 60


def test_parts_run_in_the_suites_order_not_the_commands() -> None:
    assert gpu_suite._arguments([*TRIAL, "--parts", "warp,checks"]).parts == ["checks", "warp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "give --tiny"),
        ([*TRIAL, "--minutes", "0"], "--minutes is 0, expected more than 0"),
        ([*TRIAL, "--minutes", "nan"], "--minutes is nan"),
        ([*TRIAL, "--parts", "warp,speed"], "no such part: speed; --list shows all"),
        ([*TRIAL, "--golden", "/nowhere"], "/nowhere has no make_checkpoints.py"),
        ([*TRIAL, "--checkpoints", "a.pth", "b.pth"], "no such file: a.pth, b.pth"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_suite, "find_gpus", lambda: ((), "the NVIDIA driver sees no GPU"))
    assert gpu_suite.main([]) == 2
    assert "the NVIDIA driver sees no GPU; give --device cpu --tiny" in capsys.readouterr().err


def test_a_failed_part_is_in_summary_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(jobs: Any, background: Any, *, done: Any, **_: Any) -> None:
        broken = {"status": "failed", "error": "ended by SIGSEGV", "last_lines": ["where it was"], "seconds": 1.0}
        done("checks", broken)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gpu_suite, "run_jobs", run)
    try:
        assert gpu_suite.main([*TRIAL, "--parts", "checks,warp", "--out", str(tmp_path)]) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert strict_json(tmp_path / "gpu.json")["parts"]["warp"] == {"status": "not run"}
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| checks | failed | 1.0 | ended by SIGSEGV |" in text
    assert "where it was" in text
    assert "failed: checks" in capsys.readouterr().err


def test_a_terminated_run_writes_its_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*TRIAL, "--parts", "ceilings,ours-fp16", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "ceilings" in process.stderr.readline()
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    process.stderr.close()
    parts = strict_json(out / "gpu.json")["parts"]
    assert parts["ceilings"]["status"] == "ok"
    assert parts["ours-fp16"]["status"] == "not run"
    assert (out / "gpu.md").exists()


def test_no_plotting_library_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu_summary.importlib.util.find_spec", lambda _name: None)
    write_summary(measured(), tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.md"]


def test_it_runs_with_the_packages_of_the_gpu_machine() -> None:
    """Its Python has only torch, numpy, pillow, einops, and the checkout."""
    code = f"""
        import sys
        missing = {{"rich", "onnx", "onnxruntime", "onnxscript", "safetensors", "matplotlib", "tritonclient"}}
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in missing:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Missing())
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "models")!r}]
        from benchmarks import gpu_suite, gpu_part, gpu_driver, gpu_attention, gpu_ways, gpu_kernels_once
        from lfdm_export.rewrite.stage_modules import stage_modules
        from lfdm_models.demo import untrained_model
        stage_modules(untrained_model(), 2)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("arguments", [[], ["measure"], ["dance", "out"], ["inspect", "out", "more"]])
def test_the_script_prints_its_usage(arguments: list[str], tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_run.sh"
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "gpu_run.sh measure OUT" in done.stderr


def test_script_measures(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu_run.sh"), "measure", str(tmp_path / "out"), *TRIAL, "--parts", "driver"]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    assert strict_json(tmp_path / "out" / "gpu.json")["parts"]["driver"]["status"] == "skipped"


# -- timing


def test_budget() -> None:
    Budget(time.monotonic() + 100).need(50, "this")
    with pytest.raises(OutOfTimeError, match=r"that takes about 50 s, \d+ s were left"):
        Budget(time.monotonic() + 10).need(50, "that")


def test_timing_is_robust() -> None:
    timing = Timing.of([*range(1, 20), 1000])
    assert (timing.median, timing.low, timing.high, timing.runs) == (10.5, 3, 18, 20)
    assert timing.divided(2).median == 5.25


# -- floors and verdicts


def measured() -> dict[str, Any]:
    """The verdicts' inputs from a run on a GPU. Step and decode have floors of 0.2 and 1 ms, a clip of 3 ms."""

    def warp_at(share: float, times: float) -> dict[str, Any]:
        slow = {"bytes_per_second": 1e11, "times_pytorch": 1.0}
        return {"planar": slow, "channels_last": {"bytes_per_second": share * 4e12, "times_pytorch": times}}

    def takes(seconds: float, **more: Any) -> dict[str, Any]:
        stage = {"median": seconds}
        return {"seconds_to_prepare": 1.0, "clip": stage, "end_to_end": stage, "step": stage, **more}

    data: dict[str, Any] = {
        "ceilings": {
            "copy": {"bytes_per_second": 4e12},
            "matrix_product": {name: {"flops_per_second": 8e14} for name in ("fp16", "bf16")},
        },
        "faithful-fp32": takes(0.2),
        "ours-fp16": takes(
            0.06,
            parity={"psnr": 46.0},
            work={"step": {"flops": 1.6e11, "bytes": 8e7}, "decode": {"flops": 1e9, "bytes": 4e9}},
        ),
        "ours-fp16-compiled": takes(0.027, parity={"psnr": 45.0}),
        "product-fp16": {"1": {"seconds_to_prepare": 28.0, "psnr": 47.0, "end_to_end": {"median": 0.031}}},
        "ours-bf16": takes(0.06, parity={"psnr": 33.0}),
        "warp": {
            "128x128x64 fp16 40 frames": warp_at(0.7, 5.0),
            "32x32x256 fp16 40 frames": warp_at(0.65, 4.0),
            "32x32x256 fp16 8 frames": warp_at(0.1, 1.0),
            "phase of 128 fp16 40 frames": warp_at(0.3, 2.0),
        },
        "batches-fp16": {"1": takes(1e-3), "8": takes(8e-3), "32": takes(24e-3)},
    }
    return {
        "date": "2026-11-27", "gpu": "a GPU", "nvidia-smi": "", "versions": {"torch": "2.11"},
        "settings": {"device": "cuda", "tiny": False, "minutes": 6.5},
        "parts": {name: {"status": "ok", "seconds": 1.0, "data": part} for name, part in data.items()},
    }  # fmt: skip


def test_a_floor_is_the_larger_of_both_bounds() -> None:
    rates = Rates(flops=1e15, bytes=1e12)
    assert rates.floor(Work(flops=1e12, bytes=1e6)) == pytest.approx(1e-3)
    assert rates.floor(Work(flops=1e6, bytes=1e10)) == pytest.approx(1e-2)


def test_floors_of_a_clip() -> None:
    assert floors(measured()) == pytest.approx({"step": 0.2e-3, "decode": 1e-3, "clip": 3e-3})
    ceilings = {"copy": {"bytes_per_second": 1e12}, "matrix_product": {"fp16": {"flops_per_second": 1e12}}}
    work = {"step": {"flops": 1e9, "bytes": 1.0}, "decode": {"flops": 1e9, "bytes": 5e9}}
    assert clip_floors(ceilings, work, "fp16", 4) == pytest.approx({"step": 1e-3, "decode": 5e-3, "clip": 9e-3})


def test_verdicts() -> None:
    found = verdicts(measured())
    values = [one["measured"] for one in found.values()]
    assert values == pytest.approx([4.0, 0.65, 9.0, 27.0, 31.0, 32 * 1.6e11 / 24e-3 / 8e14, 45.0, 33.0])
    assert [one["met"] for one in found.values()] == [True, True, True, True, False, True, True, False]
    slower = measured()
    slower["parts"]["ours-fp16-compiled"]["data"]["end_to_end"] = {"median": 0.0303}
    assert [one["met"] for one in verdicts(slower).values()][2:4] == [False, False]
    slower["parts"]["product-fp16"]["data"]["1"]["psnr"] = 39.0  # frames of any part count
    assert verdicts(slower)["PSNR of fp16 frames, dB"]["met"] is False


def test_verdicts_of_what_is_missing() -> None:
    result = measured()
    result["parts"]["ours-fp16"] = {"status": "failed", "error": "out of memory", "data": {}}
    del result["parts"]["ceilings"]
    found = verdicts(result).values()
    assert [one["measured"] for one in found] == [4.0, *["not measured"] * 2, 27.0, 31.0, "not measured", 45.0, 33.0]
    assert [one["met"] for one in found] == [True, *["not measured"] * 2, True, False, "not measured", True, False]


@pytest.mark.parametrize(("name", "value"), [("device", "cpu"), ("tiny", True)])
def test_a_trial_has_no_verdicts(name: str, value: object) -> None:
    result = measured()
    result["settings"][name] = value
    assert {one["met"] for one in verdicts(result).values()} == {"not measured"}


def test_summary_compares_ways_with_the_floor() -> None:
    text = summary(measured())
    assert "| ours-fp16-compiled | not measured | 27.000 | not measured | 27.000 | 27.000 | 9.0 | 45 |" in text
    assert "| floor of clip, fp16, ms | 3.000 |" in text
    assert "| batches-fp16 | 32 | 24.000 | 1333.3 |" in text


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.gpu_plots import plot

    plot(measured(), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"

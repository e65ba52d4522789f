"""Bulk jobs on a real Ray cluster on this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lfdm_export.bulk.run import BulkProgress
from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import EngineError, LfdmExportError, MissingDependencyError
from tests.bulk.tables import assert_right_clips, make_rows, run, write_csv
from tests.bulk.test_bulk import times, written
from tests.fake_bundle import write_fake_bundle
from tests.fake_triton import Port


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("ray") / "fake")


@pytest.fixture(scope="module")
def ray() -> Any:
    """Ray with a cluster of two cores, shared by all tests of this file."""
    pytest.importorskip("pyarrow", reason="the extra `bulk` is not installed: pip install '.[bulk]'")
    ray = pytest.importorskip("ray", reason="the extra `bulk` is not installed: pip install '.[bulk]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_an_actor_is_killed_and_nothing_is_lost_or_made_twice(ray: Any, bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 24)
    table, out = write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out"
    killed: list[int] = []
    there: dict[str, int] = {}

    def kill_once(progress: BulkProgress) -> None:
        if progress.done >= 4 and not killed:
            there.update(times(out))
            pid = int(written(out)[-1].worker.rpartition(":")[2])
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    summary = run(bundle, table, out, ray="local", workers=2, progress=kill_once)
    assert killed
    assert (summary.made, summary.failed, summary.left) == (24, 0, 0)
    assert sorted(record.id for record in written(out)) == [row["id"] for row in rows]
    assert there.items() <= times(out).items(), "what was there when the actor died is as it was"
    assert killed[0] not in {int(record.worker.rpartition(":")[2]) for record in written(out)[-2:]}
    assert_right_clips(bundle, tmp_path, rows, out)
    before = times(out)
    assert run(bundle, table, out, ray="local").made_now == 0
    (out / "c007.npz").unlink()
    assert run(bundle, table, out, ray="local").made_now == 1
    changed = {name for name, at in times(out).items() if before[name] != at}
    assert changed == {"c007.npz"}


def test_what_no_actor_can_do_ends_the_run(ray: Any, bundle: Bundle, tmp_path: Path):
    table = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 1))
    (tmp_path / "out" / "c000.npz").mkdir(parents=True)
    with pytest.raises(LfdmExportError, match=r"c000\.npz cannot be written: Is a directory"):
        run(bundle, table, tmp_path / "out", ray="local")
    with pytest.raises(EngineError, match="1 actor of 64 cores each does not fit the cluster, which has 2"):
        run(bundle, table, tmp_path / "out", ray="local", threads=64)


def test_without_ray_the_extra_is_named(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    table = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 1))
    with pytest.raises(MissingDependencyError, match=r"--ray needs the package 'ray'.*\[bulk\]"):
        run(bundle, table, tmp_path / "out", ray="local")


def test_no_cluster_is_one_sentence(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    table = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 1))
    with Port() as port, pytest.raises(EngineError, match=rf"'{port.address}' cannot be reached \(.*refused\); start"):
        run(bundle, table, tmp_path / "out", ray=port.address)

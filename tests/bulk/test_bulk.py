"""Tables of jobs: every clip is correct, however a run ends and however the rows are distributed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.bulk import workers
from lfdm_export.bulk.job import JobSettings, seed_of
from lfdm_export.bulk.records import Journal, Record
from lfdm_export.bulk.run import BulkOptions, BulkProgress, Shard, plan_units
from lfdm_export.bulk.table import read_jobs
from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli import generate_main
from lfdm_export.cli.bulk import describe_progress
from lfdm_export.errors import EngineError, InputError, LfdmExportError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.crop import parse_crop
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.sampling.options import SamplingOptions
from tests.bulk import lethal
from tests.bulk.tables import (
    NPZ,
    assert_right_clips,
    frames_of,
    make_rows,
    run,
    write_csv,
    write_jsonl,
    write_picture,
)
from tests.fake_bundle import WIDTH, write_fake_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("bulk") / "fake")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npz"))


def written(out: Path) -> list[Record]:
    """Return all records of all journals."""
    lines = [line for path in sorted((out / "journal").iterdir()) for line in path.read_text().splitlines()]
    return [record for line in lines if (record := Record.from_json(line)) is not None]


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}


# ----------------------------------------------------------------------------------------------- one run


def test_every_clip_is_that_of_generate(bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 7)
    seen: list[BulkProgress] = []
    summary = run(bundle, write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out", progress=seen.append)
    assert_right_clips(bundle, tmp_path, rows, tmp_path / "out")
    assert (summary.jobs, summary.made, summary.failed, summary.left, summary.made_now) == (7, 7, 0, 0, 7)
    assert [progress.done for progress in seen] == list(range(8))
    assert seen[0].rate is None
    assert seen[-1].seconds_left == 0
    found = clip_metadata(tmp_path / "out" / "c002.npz")
    assert (found["label"], found["seed"], found["made_by"]) == ("turn left", seed_of("c002"), "generate")


def test_conditions_of_every_kind(bundle: Bundle, tmp_path: Path):
    photo = write_picture(tmp_path / "p.png")
    pipeline = Pipeline.open(bundle, threads=1, target="onnxruntime")
    source = pipeline.generate(photo, label="Anger", steps=3, seed=5)
    source.save(tmp_path / "m.motion")
    vector = np.linspace(-1, 1, WIDTH, dtype=np.float32)
    np.save(tmp_path / "e.npy", vector)
    rows: list[dict[str, Any]] = [
        {"id": "motion", "image": "p.png", "motion": "m.motion"},
        {"id": "file", "image": "p.png", "embedding": "e.npy", "seed": 1},
        {"id": "cell", "image": "p.png", "embedding": vector.tolist(), "seed": 1},
        {"id": "guided", "image": "p.png", "label": "anger", "seed": 1, "guidance_scale": 2, "sampler": "unipc"},
        {"id": "folder/cropped", "image": "p.png", "label": "anger", "seed": 1, "crop": "0,0,8,8", "format": "png"},
    ]
    summary = run(bundle, write_jsonl(tmp_path / "jobs.jsonl", rows), tmp_path / "out")
    assert summary.failures == {}
    out = tmp_path / "out"
    np.testing.assert_array_equal(frames_of(out / "motion.npz"), source.frames)
    by_vector = pipeline.generate(photo, text_embedding=vector, seed=1, steps=2).frames
    np.testing.assert_array_equal(frames_of(out / "file.npz"), by_vector)
    np.testing.assert_array_equal(frames_of(out / "cell.npz"), by_vector)
    guided = pipeline.generate(photo, label="Anger", seed=1, steps=2, guidance_scale=2, sampler="unipc")
    np.testing.assert_array_equal(frames_of(out / "guided.npz"), guided.frames)
    assert (out / "folder" / "cropped.png").is_file()


def test_a_row_is_pasted_back(bundle: Bundle, tmp_path: Path):
    photo = write_picture(tmp_path / "p.png", size=40)
    rows: list[dict[str, Any]] = [
        {"id": name, "image": "p.png", "label": "anger", "seed": 1, "crop": crop, "format": "png"}
        for name, crop in (("left", "0,4,20,20"), ("right", "15,10,24,24"))
    ]
    defaults = JobSettings(SamplingOptions(steps=2), paste_back=True)
    summary = run(bundle, write_jsonl(tmp_path / "jobs.jsonl", rows), tmp_path / "out", defaults=defaults)
    assert summary.failures == {}
    pipeline = Pipeline.open(bundle, threads=1, target="onnxruntime")
    for row in rows:
        crop = parse_crop(row["crop"])
        clip = pipeline.generate(photo, label="Anger", steps=2, seed=1, crop=crop).paste_back(photo, crop)
        (expected,) = clip.save(tmp_path / f"{row['id']}.png")
        with Image.open(expected) as wanted, Image.open(tmp_path / "out" / f"{row['id']}.png") as found:
            assert wanted.width > 40
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_failures_are_noted_and_stop_nobody(bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    np.save(tmp_path / "long.npy", np.zeros(WIDTH + 1))
    bad: list[dict[str, Any]] = [
        {"id": "gone", "image": "gone.png", "label": "Anger"},
        {"id": "broken", "image": "broken.png", "label": "Anger"},
        {"id": "label", "image": "p0.png", "label": "angr"},
        {"id": "steps", "image": "p0.png", "label": "Anger", "steps": 10_000},
        {"id": "none", "image": "p0.png"},
        {"id": "text", "image": "p0.png", "text": "hello"},
        {"id": "long", "image": "p0.png", "embedding": "long.npy"},
        {"id": "no_motion", "image": "p0.png", "motion": "p0.png"},
    ]
    table = write_jsonl(tmp_path / "jobs.jsonl", [{**row, "seed": row["seed"] or None} for row in rows] + bad)
    summary = run(bundle, table, tmp_path / "out")
    assert names(tmp_path / "out") == ["c000.npz", "c001.npz", "c002.npz"]
    expected = {
        "gone": "gone.png cannot be read: No such file",
        "broken": "broken.png cannot be read as an image",
        "label": "unknown label 'angr': did you mean 'Anger'",
        "steps": "steps",
        "none": "found none of label, text",
        "text": "no text encoder",
        "long": f"shape ({WIDTH + 1},), expected ({WIDTH},)",
        "no_motion": "p0.png cannot be read as a NumPy archive",
    }
    assert list(summary.failures) == list(expected)
    for name, words in expected.items():
        assert words in summary.failures[name]
    assert (summary.made, summary.failed, summary.failed_now) == (3, 8, 8)

    (tmp_path / "long.npy").unlink()
    np.save(tmp_path / "long.npy", np.zeros(WIDTH))
    again = run(bundle, table, tmp_path / "out")
    assert (again.made_now, again.failed_now) == (1, 0), "what has changed is made; what has not is passed over"
    retried = run(bundle, table, tmp_path / "out", retry_failed=True)
    assert (retried.made, retried.failed, retried.made_now, retried.failed_now) == (4, 7, 0, 7)


def test_batches_hold_equal_settings(bundle: Bundle, tmp_path: Path):
    rows = [{**row, "steps": 2 + (index % 5 == 4)} for index, row in enumerate(make_rows(tmp_path, 12))]
    table = write_csv(tmp_path / "jobs.csv", rows)
    units = plan_units(read_jobs(str(table), NPZ), {}, 4)
    assert [[job.id for job in unit] for unit in units] == [
        ["c000", "c001", "c002", "c003"], ["c004", "c009"], ["c005", "c006", "c007", "c008"], ["c010", "c011"],
    ]  # fmt: skip
    summary = run(bundle, table, tmp_path / "out", batch=4)
    assert summary.made == 12
    pipeline = Pipeline.open(bundle, threads=1, target="onnxruntime")
    for row in rows:
        seed = seed_of(row["id"]) if row["seed"] == "" else row["seed"]
        clip = pipeline.generate(tmp_path / row["image"], label=row["label"], seed=seed, steps=row["steps"])
        made = frames_of(tmp_path / "out" / f"{row['id']}.npz")
        assert np.abs(made.astype(int) - clip.frames).max() <= 1, "a batch rounds otherwise, by a level at most"


def test_a_batch_is_the_same_whatever_is_there(bundle: Bundle, tmp_path: Path):
    rows = [{**row, "label": "Anger"} for row in make_rows(tmp_path, 4)]
    table = write_csv(tmp_path / "jobs.csv", rows)
    run(bundle, table, tmp_path / "whole", batch=4)
    run(bundle, table, tmp_path / "out", batch=4)
    before = times(tmp_path / "out")
    (tmp_path / "out" / "c002.npz").unlink()
    assert run(bundle, table, tmp_path / "out", batch=4).made_now == 1
    after = times(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {"c002.npz"}
    np.testing.assert_array_equal(frames_of(tmp_path / "out" / "c002.npz"), frames_of(tmp_path / "whole" / "c002.npz"))


def test_one_that_fails_in_a_batch_leaves_the_others(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{**row, "label": "Anger"} for row in make_rows(tmp_path, 3)]
    real = Pipeline.generate

    def failing(self: Pipeline, *args: Any, **more: Any) -> Any:
        if 1 in more["seed"]:
            raise EngineError("values that are not finite")
        return real(self, *args, **more)

    monkeypatch.setattr(Pipeline, "generate", failing)
    summary = run(bundle, write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out", batch=3)
    assert summary.failures == {"c001": "values that are not finite"}
    assert names(tmp_path / "out") == ["c000.npz", "c002.npz"]


# ------------------------------------------------------------------------------------------ resuming


def test_what_is_there_is_passed_over_and_what_has_changed_is_made(bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 6)
    table, out = write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out"
    run(bundle, table, out)
    before = times(out)
    assert run(bundle, table, out).made_now == 0
    os.utime(tmp_path / "p0.png", ns=(1, 1))  # e.g. copied: the content is the same
    assert run(bundle, table, out).made_now == 0
    assert times(out) == before
    write_picture(tmp_path / "p1.png", 77)
    rows[0]["label"], rows[2]["seed"] = "happiness", 99
    write_csv(table, [*rows, {"id": "new", "image": "p0.png", "label": "Anger", "seed": 1}])
    (out / "c003.npz").unlink()
    summary = run(bundle, table, out)
    changed = {name for name, at in times(out).items() if before.get(name) != at}
    assert changed == {"c000.npz", "c001.npz", "c002.npz", "c003.npz", "c005.npz", "new.npz"}
    assert summary.made_now == 6
    assert_right_clips(bundle, tmp_path, rows, out)


def test_another_bundle_makes_them_anew(bundle: Bundle, tmp_path: Path):
    table, out = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 2)), tmp_path / "out"
    run(bundle, table, out)
    from tests.fake_bundle import BODIES

    other = write_fake_bundle(tmp_path / "other", decode=BODIES["decode"].replace("half = Mul", "half = Add"))
    assert run(other, table, out).made_now == 2
    assert_right_clips(other, tmp_path, make_rows(tmp_path, 2), out)


def test_a_clip_whose_photograph_is_gone_is_kept(bundle: Bundle, tmp_path: Path):
    table, out = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 2)), tmp_path / "out"
    run(bundle, table, out)
    (tmp_path / "p0.png").unlink()
    summary = run(bundle, table, out)
    assert (summary.made, summary.made_now, summary.failed) == (2, 0, 0)


def test_a_clip_that_no_journal_knows_is_found(bundle: Bundle, tmp_path: Path):
    """A run wrote it, but was killed before it could record this."""
    rows = make_rows(tmp_path, 4)
    table, out = write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out"
    run(bundle, table, out)
    before = times(out)
    for path in (out / "journal").iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(lines[0] + lines[1][: len(lines[1]) // 2])
    assert run(bundle, table, out).made == 4
    assert times(out) == before
    (out / "c001.npz").write_bytes(b"something else")
    for path in (out / "journal").iterdir():
        path.unlink()
    run(bundle, table, out)
    assert_right_clips(bundle, tmp_path, rows, out)


def test_lines_that_are_no_records_are_passed_over(bundle: Bundle, tmp_path: Path):
    table, out = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 2)), tmp_path / "out"
    run(bundle, table, out)
    (path,) = (out / "journal").iterdir()
    (good, _) = path.read_text().splitlines()
    record = json.loads(good)
    odd = [
        "", "nonsense", "[]", "{}", '"x"', "null", "[" * 100_000, json.dumps({**record, "state": "perhaps"}),
        json.dumps({**record, "file": 3}), json.dumps({**record, "stamps": 3}), json.dumps({**record, "at": "x"}),
        json.dumps({**record, "more": 1}), json.dumps({**record, "stamps": [[1]]}),
    ]  # fmt: skip
    path.write_bytes("\n".join([good, *odd]).encode() + b"\n\xff\xfe")
    assert Journal(out).read().keys() == {record["id"]}
    assert run(bundle, table, out).made == 2


def test_a_run_survives_kill_after_kill(bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 160)
    table, out = write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out"
    command = [
        sys.executable, "-m", "tests.bulk.command", str(bundle.path), "--jobs", str(table), "-o", str(out), "-q",
        "--format", "npz", "--steps", "2", "--threads", "1", "--target", "onnxruntime",
    ]  # fmt: skip
    out.mkdir()
    before: dict[str, int] = {}
    for wanted in (3, 40, 90):
        # It stops before its end, however late the kill comes.
        environment = {**os.environ, "LAST": str(wanted + 50)}
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)
        while len(times(out)) < wanted and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was killed in the middle"
        assert before.items() <= times(out).items(), "nothing that was there is made again"
        before = times(out)
    summary = run(bundle, table, out)
    assert (summary.made, summary.left) == (160, 0)
    assert 0 < summary.made_now < 160
    assert before.items() <= times(out).items()
    assert_right_clips(bundle, tmp_path, rows[::5], out)
    assert len(names(out)) == 160
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "what kills leave is cleared away"


# ---------------------------------------------------------------------------------------- distribution


def test_shards_together_make_every_row_once(bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 10)
    table, out = write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out"
    found = [run(bundle, table, out, shard=Shard(index, 3)) for index in range(3)]
    assert [summary.made_now for summary in found] == [4, 3, 3]
    assert sorted(record.id for record in written(out)) == [row["id"] for row in rows]
    assert_right_clips(bundle, tmp_path, rows, out)
    assert run(bundle, table, out).made_now == 0
    summaries = sorted(path.name for path in out.glob("summary*.json"))
    assert summaries == ["summary-0-of-3.json", "summary-1-of-3.json", "summary-2-of-3.json", "summary.json"]


@pytest.mark.parametrize("text", ["", "3", "1/0", "4/4", "-1/4", "a/b", "1/4/2", "0.5/2"])
def test_a_shard_that_is_none(text: str):
    with pytest.raises(InputError, match="shard"):
        Shard.parse(text)


def test_processes_side_by_side(bundle: Bundle, tmp_path: Path):
    rows = make_rows(tmp_path, 8)
    killed: list[int] = []

    def kill_once(progress: BulkProgress) -> None:
        if progress.done == 2 and not killed:
            child = multiprocessing.active_children()[0]
            assert child.pid is not None
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    table, out = write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out"
    summary = run(bundle, table, out, workers=2, progress=kill_once)
    assert killed
    assert (summary.made, summary.failed) == (8, 0)
    assert sorted(record.id for record in written(out)) == [row["id"] for row in rows]
    assert str(os.getpid()) not in {record.worker.rpartition(":")[2] for record in written(out)}
    assert_right_clips(bundle, tmp_path, rows, out)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_that_kills_its_workers_is_given_up(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(workers, "_work", lethal.work)
    rows = make_rows(tmp_path, 5)
    rows.insert(4, {**rows[3], "id": "lethal"})
    rows = [{**row, "label": "Anger"} for row in rows]
    summary = run(bundle, write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out", workers=2, batch=batch)
    (sentence,) = summary.failures.values()
    assert "2 workers died at this row: the last one was ended by SIGKILL" in sentence
    assert summary.made == 5
    assert "a worker was ended by SIGKILL at" in caplog.text
    assert run(bundle, tmp_path / "jobs.csv", tmp_path / "out", workers=2).failed_now == 0, "not tried without request"


def test_workers_that_do_nothing_end_the_run(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "_work", lethal.die)
    table = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 3))
    with pytest.raises(EngineError, match="no worker does anything: each ended with status 7"):
        run(bundle, table, tmp_path / "out", workers=2)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["left"] == 3


def test_what_no_worker_can_do_ends_the_run(bundle: Bundle, tmp_path: Path):
    table = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 3))
    out = tmp_path / "out"
    for row in ("c000.npz", "c001.npz", "c002.npz"):
        (out / row).mkdir(parents=True)
    for count in (1, 2):
        with pytest.raises(LfdmExportError, match=r"c00\d.npz cannot be written: Is a directory"):
            run(bundle, table, out, workers=count)


# ----------------------------------------------------------------------------------- messages and summaries


def test_the_summary_counts_and_lists(bundle: Bundle, tmp_path: Path):
    rows = [*make_rows(tmp_path, 3), {"id": "bad", "image": "p0.png", "label": "x", "seed": 2**64 - 1}]
    summary = run(bundle, write_csv(tmp_path / "jobs.csv", rows), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = {
        "program": "lfdm-export", "bundle": "fake", "bundle_id": bundle.manifest.bundle_id, "target": "onnxruntime",
        "shard": "0/1", "jobs": 4, "made": 3, "failed": 1, "left": 0, "made_now": 3, "failed_now": 1,
        "table": summary.table,
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert list(told["failures"]) == ["bad"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert summary.table == "summary.parquet"
    table = parquet.read_table(tmp_path / "out" / "summary.parquet").to_pylist()
    assert [(row["id"], row["state"], row["file"]) for row in table[-2:]] == [
        ("c002", "made", "c002.npz"), ("bad", "failed", None),
    ]  # fmt: skip
    assert table[0]["seed"] == seed_of("c000")
    assert table[3]["seed"] == 2**64 - 1
    assert table[3]["error"].startswith("unknown label 'x'")


def test_without_pyarrow_the_summary_is_csv(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lfdm_export.bulk.summary.find_spec", lambda name: None)
    summary = run(bundle, write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 2)), tmp_path / "out")
    assert summary.table == "summary.csv"
    header, first, _ = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert header.startswith("id,state,file,error,image,label")
    assert first.startswith("c000,made,c000.npz,,")


def test_a_run_that_is_interrupted_says_what_is_left(bundle: Bundle, tmp_path: Path):
    def stop(progress: BulkProgress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    table = write_csv(tmp_path / "jobs.csv", make_rows(tmp_path, 5))
    with pytest.raises(KeyboardInterrupt):
        run(bundle, table, tmp_path / "out", progress=stop)
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (told["made"], told["left"]) == (2, 3)


def test_progress_in_words():
    def words(done: int, rate: float | None, failed: int = 0) -> str:
        return describe_progress(BulkProgress(1000, done - failed, failed, rate))

    assert words(0, None) == ""
    assert words(100, 0.2) == "12.0 clips/min, 1 h 15 min left"
    assert words(400, 20.0, 3) == "20.0 clips/s, 30 s left, 3 failed"
    assert words(0, 0.001) == "0.1 clips/min, 11 d 13 h left"
    assert words(910, 1.0) == "60.0 clips/min, 1 min 30 s left"


def test_options_are_checked():
    for name in ("workers", "batch"):
        with pytest.raises(InputError, match=f"{name} is 0, expected 1 or more"):
            replace(BulkOptions(), **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="npz holds neither panels"):
        JobSettings(format="npz", panels=True)


# ------------------------------------------------------------------------------------------ the command


def test_the_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [*make_rows(tmp_path, 2), {"id": "bad", "image": "p0.png", "label": "x"}]
    table = write_csv(tmp_path / "jobs.csv", rows)
    command = [str(bundle.path), "--jobs", str(table), "-o", str(tmp_path / "out"), "--format", "npz", "--steps", "2"]
    assert generate_main(command) == 1
    told = capsys.readouterr()
    assert "(2 made, 1 failed, of 3 rows)" in told.out
    assert "error: bad: unknown label 'x'" in told.err
    assert "1 of 3 rows failed; --retry-failed takes them up again" in told.err
    write_csv(table, rows[:2])
    assert generate_main([*command, "--shard", "1/2"]) == 0
    assert "(0 made now, 1 before, 0 failed, of 1 row)" in capsys.readouterr().out
    assert_right_clips(bundle, tmp_path, rows[:2], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "j.csv", "--image", "a.png"], "--image is of one clip"),
        (["--jobs", "j.csv", "--label", "a"], "--label is of one clip"),
        (["--jobs", "j.csv", "--seed", "1"], "--seed is of one clip"),
        (["--image", "a.png", "--label", "a", "--shard", "0/2"], "--shard is for --jobs"),
        (["--image", "a.png", "--label", "a", "--retry-failed"], "--retry-failed is for --jobs"),
        (["--label", "a"], "required: --image"),
        (["--image", "a.png"], "one of the arguments --label"),
    ],
)
def test_combinations_that_mean_nothing(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        generate_main(["bundle", "-o", "out", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_lines_of_progress_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    from lfdm_export.cli import bulk as command

    monkeypatch.setattr(command, "_LINE_INTERVAL", 0.0)
    with command.BulkBar(quiet=False) as bar:
        bar(BulkProgress(10, 3, 1, 0.1))
    assert capsys.readouterr().err == "lfdm-generate: 4 of 10 rows, 6.0 clips/min, 1 min 0 s left, 1 failed\n"
    with command.BulkBar(quiet=True) as bar:
        bar(BulkProgress(10, 3, 1, 0.1))
    assert capsys.readouterr().err == ""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest

from lfdm_export.bulk.job import Job, JobSettings, seed_of
from lfdm_export.bulk.sources import InFile, InTable
from lfdm_export.bulk.table import read_jobs
from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.sampling.options import SamplingOptions
from tests.bulk.tables import write_csv, write_jsonl, write_picture


def jobs_of(path: Path, defaults: JobSettings | None = None) -> tuple[Job, ...]:
    return read_jobs(str(path), defaults)


def fault(tmp_path: Path, **cells: object) -> str:
    (job,) = jobs_of(write_jsonl(tmp_path / "jobs.jsonl", [{"image": "a.png", "label": "x", **cells}]))
    return job.fault


ROWS: list[dict[str, Any]] = [
    {"id": "first", "image": "a.png", "label": "nod", "seed": 7, "steps": 5, "crop": "1,2,3,4", "panels": "true"},
    {"id": "b/second", "image": "/abs/b.png", "text": "hello", "sampler": "unipc", "guidance_scale": 1.5, "fps": 12.5},
    {"id": "third", "image": "c.png", "motion": "m/wave.motion", "scale": 2},
    {"id": "fourth", "image": "d.png", "embedding": "e.npy", "eta": 0.5, "format": "webp", "_note": "mine"},
]


def expected(folder: Path) -> list[Job]:
    def file(name: str) -> InFile:
        return InFile(str(folder / name))

    return [
        Job(
            "first", file("a.png"), value="nod", seed=7,
            settings=JobSettings(SamplingOptions(steps=5), crop=(1, 2, 3, 4), panels=True),
        ),
        Job(
            "b/second", file("/abs/b.png"), "text", "hello", seed=seed_of("b/second"),
            settings=JobSettings(SamplingOptions("unipc", steps=9, guidance_scale=1.5), fps=12.5),
        ),
        Job(
            "third", file("c.png"), "motion", moved_by=file("m/wave.motion"), seed=seed_of("third"),
            settings=JobSettings(scale=2),
        ),
        Job(
            "fourth", file("d.png"), "embedding", moved_by=file("e.npy"), seed=seed_of("fourth"),
            settings=JobSettings(SamplingOptions(steps=9, eta=0.5), format="webp"),
        ),
    ]  # fmt: skip


def test_csv_and_json_lines_say_the_same(tmp_path: Path):
    defaults = JobSettings(SamplingOptions(steps=9))
    assert list(jobs_of(write_csv(tmp_path / "jobs.csv", ROWS), defaults)) == expected(tmp_path)
    assert list(jobs_of(write_jsonl(tmp_path / "jobs.jsonl", ROWS), defaults)) == expected(tmp_path)


def test_parquet_says_the_same(tmp_path: Path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = list(dict.fromkeys(name for row in ROWS for name in row))
    table = pa.table({name: [row.get(name) for row in ROWS] for name in names})
    parquet.write_table(table, tmp_path / "jobs.parquet", row_group_size=3)
    assert list(jobs_of(tmp_path / "jobs.parquet", JobSettings(SamplingOptions(steps=9)))) == expected(tmp_path)


def test_parquet_keeps_pictures_and_embeddings_until_they_are_needed(tmp_path: Path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [write_picture(tmp_path / f"{i}.png", i).read_bytes() for i in range(5)]
    columns = {
        "plain": pictures,
        "datasets": [{"bytes": picture, "path": None} for picture in pictures],
    }
    for name, column in columns.items():
        table = pa.table({"image": column, "embedding": [[float(i), 0.5] for i in range(5)]})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        jobs = jobs_of(tmp_path / f"{name}.parquet")
        assert [job.image.read() for job in jobs] == pictures
        assert [job.moved_by.read() for job in jobs if job.moved_by] == [f"[{i}.0, 0.5]".encode() for i in range(5)]
        assert all(isinstance(job.image, InTable) for job in jobs)


def test_parquet_cells_may_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {"image": [b"a", b"b", b"c", None], "label": ["x", None, None, "y"], "embedding": [None, [1.5], None, [2.5]]}
    )
    parquet.write_table(table, tmp_path / "jobs.parquet", row_group_size=2)
    faults = [job.fault[:34] for job in jobs_of(tmp_path / "jobs.parquet")]
    assert faults == ["", "", "found none of label, text, embeddi", "found none of image and image_base"]
    read: list[Any] = []
    real = parquet.ParquetFile.read_row_group

    def recording(self: Any, part: int, columns: Any) -> Any:
        read.append((part, columns))
        return real(self, part, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", recording)
    jobs_of(tmp_path / "jobs.parquet")
    assert (0, ["image"]) not in read, "pictures that are all there are not read to know it"
    assert (1, ["image"]) in read


def test_json_lines_keep_pictures_until_they_are_needed(tmp_path: Path):
    pictures = [write_picture(tmp_path / f"{i}.png", i).read_bytes() for i in range(3)]
    rows = [{"image_base64": base64.b64encode(one).decode(), "embedding": [i, 2.5]} for i, one in enumerate(pictures)]
    path = write_jsonl(tmp_path / "jobs.jsonl", rows)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))  # blank lines are not counted
    jobs = jobs_of(path)
    assert [job.image.read() for job in jobs] == pictures
    assert [job.moved_by.read() for job in jobs if job.moved_by] == [f"[{i}, 2.5]".encode() for i in range(3)]
    assert jobs[2].image.name == f"{path}, row 3, image_base64"


def test_digests_are_those_of_runs_that_were_begun_before(tmp_path: Path):
    """Otherwise a resumed run would generate all its clips again."""
    row = {"id": "a", "image": "a.png", "label": "nod", "seed": 3, "sampler": "ddim", "steps": 5}
    rows = [
        {**row, "eta": 0.5, "guidance_scale": 1.5, "scale": 2},
        {"id": "b", "image": "a.png", "label": "nod", "fps": 12},
    ]
    digests = [job.digest("x")[:24] for job in jobs_of(write_jsonl(tmp_path / "jobs.jsonl", rows))]
    assert digests == ["df9f5c0d81f68e96e5303c56", "21e03a24e1dc3432110daf7b"]


def test_an_interval_of_guidance_is_for_all_rows(tmp_path: Path):
    inside = JobSettings(SamplingOptions(guidance_interval=(0.2, 0.8)))
    rows = [{"image": "a.png", "label": "l", "steps": 4}]
    (job,) = jobs_of(write_jsonl(tmp_path / "jobs.jsonl", rows), inside)
    assert job.settings.options == SamplingOptions(steps=4, guidance_interval=(0.2, 0.8))
    (plain,) = jobs_of(tmp_path / "jobs.jsonl")
    assert job.digest("x") != plain.digest("x")


def test_a_seed_comes_from_the_id(tmp_path: Path):
    rows = [{"id": "x", "image": "a.png", "label": "l"}, {"image": "a.png", "label": "l"}]
    first, second = jobs_of(write_jsonl(tmp_path / "jobs.jsonl", rows))
    assert first.seed == int(hashlib.sha256(b"x").hexdigest()[:8], 16)
    assert (second.id, second.seed) == ("row-000002", seed_of("row-000002"))


def test_jobs_survive_json(tmp_path: Path):
    for job in jobs_of(write_csv(tmp_path / "jobs.csv", ROWS)):
        assert from_plain(Job, to_plain(job), "job") == job


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"label": None}, "found none of label, text, embedding, motion, expected exactly one"),
        ({"text": "x"}, "found label and text of label"),
        ({"image": ""}, "found none of image and image_base64"),
        ({"image_base64": "AA=="}, "found image and image_base64"),
        ({"label": 3}, "label is int, expected text"),
        ({"seed": "x"}, "seed is 'x', expected a whole number"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"seed": -1}, "seed: found -1, expected 0 to 2^64 - 1"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"eta": "much"}, "eta is 'much', expected a number"),
        ({"sampler": "euler"}, "sampler: found 'euler', expected one of"),
        ({"crop": "1,2"}, "the crop is '1,2'"),
        ({"paste_back": "yes"}, "paste_back needs a crop"),
        ({"paste_back": "yes", "crop": "face", "format": "npz"}, "files hold the model's own frames"),
        ({"paste_back": "yes", "crop": "face", "scale": 2}, "leave scale out"),
        ({"format": "avi"}, "format is 'avi'"),
        ({"fps": 100}, "fps is 100.0, expected a number above 0 and at most 50 for gif"),
        ({"scale": 9}, "scale is 9"),
        ({"panels": "perhaps"}, "panels is 'perhaps', expected true or false"),
        ({"format": "motion", "panels": True}, "motion holds neither panels"),
        ({"label": None, "motion": "m", "seed": 3}, "a motion samples nothing, found seed"),
        ({"image": "a\0b"}, "null character"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_job_that_says_why(tmp_path: Path, cells: dict[str, object], message: str):
    assert message in fault(tmp_path, **cells)


def test_whole_numbers_of_spreadsheets(tmp_path: Path):
    path = tmp_path / "jobs.csv"
    path.write_text("\ufeffimage,label,seed,steps\na.png,nod,7.0,\n\na.png,nod,,5\n", encoding="utf-8")
    # In a CSV file, 7.0 is text, not an integer.
    assert [job.fault for job in jobs_of(path)] == ["seed is '7.0', expected a whole number", ""]
    assert fault(tmp_path, seed=7.0) == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("jobs.txt", "", "not a supported table of jobs, expected one of .csv"),
        ("jobs.csv", "", "has no column image"),
        ("jobs.csv", "image,label\n", "has no rows"),
        ("jobs.csv", "label\nx\n", "has no column image"),
        ("jobs.csv", "image,label,guidence_scale\n", "unknown column 'guidence_scale': did you mean 'guidance_scale'"),
        ("jobs.csv", "image,label\na,b,c\n", "row 1 has 3 cells, expected 2"),
        ("jobs.csv", "image,label\na,b\na\n", "row 2 has 1 cells, expected 2"),
        ("jobs.csv", 'image,label\n"a,b\n', "cannot be read: unexpected end of data"),
        ("jobs.csv", "id,image\nx,a\ny,a\nX,a\n", "the id 'X' is in rows 1 and 3"),
        ("jobs.csv", "id,image\n../x,a\n", "row 1 of the table of jobs: the id '../x' cannot name a file"),
        ("jobs.csv", "id,image\na/.b,a\n", "cannot name a file"),
        ("jobs.csv", "id,image\n/x,a\n", "cannot name a file"),
        ("jobs.csv", "id,image\nx.,a\n", "cannot name a file"),
        ("jobs.csv", f"id,image\n{'x' * 201},a\n", "cannot name a file"),
        ("jobs.jsonl", "{}\nnonsense\n", "row 2 is not JSON"),
        ("jobs.jsonl", "[1]\n", "row 1 is list, expected a JSON object"),
        ("jobs.jsonl", '{"image": "a", "lable": "x"}\n', "row 1 has the unknown column 'lable': did you mean 'label'"),
        ("jobs.jsonl", "[" * 100_000 + "\n", "row 1 is not JSON"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_an_error(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        jobs_of(tmp_path / name)
    assert message in str(caught.value)


def test_files_that_are_no_tables(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        jobs_of(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"image,label\n\xff,x\n")
    with pytest.raises(InputError, match="cannot be read: 'utf-8' codec"):
        jobs_of(tmp_path / "latin.csv")


def test_a_parquet_file_that_is_none(tmp_path: Path):
    pytest.importorskip("pyarrow")
    (tmp_path / "jobs.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        jobs_of(tmp_path / "jobs.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "jobs.parquet").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"reading jobs\.parquet needs the package 'pyarrow'.*\[bulk\]"):
        jobs_of(tmp_path / "jobs.parquet")

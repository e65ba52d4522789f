from __future__ import annotations

import base64
import dataclasses
import io
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lfdm_export.errors import BundleError, InputError
from lfdm_export.parity.report.charts import bar, step_chart
from lfdm_export.parity.report.checks import CHAIN, Check, Pictures, StepError, number, percent
from lfdm_export.parity.report.model import Report
from lfdm_export.parity.report.page import MAGNIFIED, page

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('x')</script>\"&"


def values(stage: str, subject: str, found: float, allowed: float = 1e-4, meaning: str = "") -> Check:
    return Check(
        stage,
        "values",
        subject,
        passed=found <= allowed,
        found=found,
        allowed=allowed,
        max_abs=2 * found,
        mean_abs=found / 10,
        scale=2.0,
        compared=100,
        meaning=meaning,
    )


CHECKS = (
    Check("encode", "interface", "names, dtypes, shapes", passed=True),
    Check("encode", "finite", "feature", passed=True, found=0.0, allowed=0.0, unit="values"),
    values("encode", "feature", 2e-6),
    Check("encode", "batch", "feature", passed=True, found=1e-7, allowed=1e-4),
    Check(CHAIN, "clip", "latent, largest error", passed=True, found=3e-5, allowed=1e-3),
    Check(CHAIN, "clip", "latent, mean error", passed=True, found=1e-6, allowed=5e-5),
    Check(CHAIN, "clip", "flow, mean error", passed=True, found=1e-3, unit="px"),
    Check(CHAIN, "clip", "frames, PSNR", passed=True, unit="dB", meaning="no difference at all"),
)
FAILURES = (
    values("decode", "frames", 3e-2, meaning="the graph is wrong"),
    values("decode", "warped", 1e-3, meaning="the graph is wrong"),
    Check("step", "interface", "names, dtypes, shapes", passed=False, meaning="its inputs are a, expected b"),
    Check("text", "finite", "text_embedding", passed=False, found=7.0, allowed=0.0, unit="values", meaning="NaN"),
)


def pictures() -> Pictures:
    rng = np.random.default_rng(0)
    found = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    difference = np.zeros((2, 8, 8, 3), np.float32)
    difference[0, 2, 3] = 0.5 / MAGNIFIED
    return Pictures((0, 3), found, found, difference, rng.integers(0, 256, (2, 8, 40, 3), np.uint8))


def make_report(**changes: Any) -> Report:
    report = Report(
        bundle="mug",
        precision="fp32",
        date="2026-01-31T12:34:56+00:00",
        engine="ONNX Runtime, CPU",
        reference="PyTorch, run again",
        seed=2**63,
        sampler="ddim, 2 steps",
        checks=CHECKS,
        steps=(StepError(900, 3e-5, 1e-6), StepError(450, 2e-5, 9e-7)),
        environment={"python": "3.11"},
        exported_with={"torch": "2.13"},
        provenance={"trained": False, "files": {"lfae": "a.pth"}, "list": [1, None]},
        labels=("anger", "fear"),
        geometry={"frames": 40},
        pictures=pictures(),
    )
    return dataclasses.replace(report, **changes)


FAILED = make_report(checks=(*CHECKS, *FAILURES), pictures=None)


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects attributes and text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + "\n"

    def images(self) -> dict[str, np.ndarray]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, data = str(attributes["src"]).partition(",")
                assert kind == "data:image/png;base64"
                found[str(attributes["alt"])] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        return found


def terminal(report: Report, width: int = 90) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ------------------------------------------------------------------------------------------- verdict


def test_the_verdict_follows_from_the_checks():
    report = make_report()
    assert report.passed
    assert report.verdict == "all 6 checks passed; nearest to its limit is chain latent, largest error, at 3%"
    assert not FAILED.passed
    assert FAILED.failures == FAILURES
    assert FAILED.verdict.startswith("4 of 10 checks failed, in decode, step, text:")
    assert make_report(checks=CHECKS[:1]).verdict == "all 1 checks passed"


def test_equal_failures_of_a_stage_are_joined():
    assert FAILED.explanations() == [
        (
            "decode",
            "frames found 0.03, allowed 1.0e-04 (300×); warped found 1.0e-03, allowed 1.0e-04 (10×)",
            "the graph is wrong",
        ),
        ("step", "names, dtypes, shapes", "its inputs are a, expected b"),
        ("text", "text_embedding found 7 values, allowed 0", "NaN"),
    ]


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "<1%"), (0.004, "<1%"), (0.126, "13%"), (1.5, "150%"), (3.14, "3.1×"), (36211, "36,211×")]
)
def test_percent(share: float, text: str):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (1.234e-7, "1.2e-07"), (0.1234, "0.123"), (130.0, "130"), (1e6, "1.0e+06")],
)
def test_number(value: float | None, text: str):
    assert number(value) == text


# --------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("report", [make_report(), FAILED], ids=["passed", "failed"])
def test_json_round_trip(report: Report):
    text = report.to_json()
    assert Report.from_json(text) == report
    plain = json.loads(text)
    assert plain["passed"] is report.passed
    assert plain["verdict"] == report.verdict
    assert "pictures" not in plain


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plain: plain.update(passed=False), "verdict is not that of its checks"),
        (lambda plain: plain["checks"][2].update(passed=False), "verdict is not that of its checks"),
        (lambda plain: plain.pop("verdict"), "not a report of lfdm-verify"),
        (lambda plain: plain.pop("checks"), "not a report of lfdm-verify .* lacks checks"),
        (lambda plain: plain.update(seed="1"), "seed is '1', expected int"),
    ],
)
def test_a_manipulated_report_is_refused(edit: Any, message: str):
    plain = json.loads(make_report().to_json())
    edit(plain)
    with pytest.raises(InputError, match=message):
        Report.from_json(json.dumps(plain))


@pytest.mark.parametrize("text", ["", "[]", "1", "{}", "{"])
def test_text_that_is_not_a_report_is_refused(text: str):
    with pytest.raises(InputError, match="not a report of lfdm-verify"):
        Report.from_json(text)


def test_both_files_are_written_and_replaced(tmp_path: Path):
    folder = tmp_path / "bundle" / "parity"
    assert make_report().write(folder) == folder / "report.html"
    assert FAILED.write(folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert Report.from_json((folder / "report.json").read_bytes()) == FAILED
    assert "Failed" in (folder / "report.html").read_text(encoding="utf-8")


def test_an_interrupted_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_report().write(tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(BundleError, match=r"No space left on device.*make the folder writable"):
        FAILED.write(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_target_that_is_not_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="the report cannot be written to"):
        make_report().write(tmp_path / "file" / "parity")


# ---------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize(
    "report",
    [make_report(), FAILED, make_report(steps=(), labels=(), provenance={}, checks=CHECKS[:1], pictures=None)],
    ids=["passed", "failed", "bare"],
)
def test_the_page_is_self_contained(report: Report):
    document = page(report)
    reader = Reader(document)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    assert "http" not in document
    assert "url(" not in document
    assert "prefers-color-scheme: dark" in document
    assert report.verdict[1:] in reader.words
    assert ("Passed" in reader.words) is report.passed
    assert ("Failed" in reader.words) is not report.passed


def test_the_pages_content():
    words = Reader(page(make_report())).words
    for part in (
        "mug",
        "2026-01-31 12:34 UTC",
        str(2**63),
        "feature",
        "2.0e-06",
        "anger",
        "files · lfae",
        "a.pth",
        "2.13",
    ):
        assert part in words
    assert "no difference at all" in words
    assert "1.0e-03 px" in words


def test_the_page_shows_failures():
    reader = Reader(page(FAILED))
    assert "frames found 0.03, allowed 1.0e-04 (300×)" in reader.words
    assert "Its inputs are a, expected b." in reader.words
    rows = [attributes.get("class") or "" for tag, attributes in reader.tags if tag == "tr"]
    assert sum("bad" in row for row in rows) == 4


def test_the_pages_pictures():
    images = Reader(page(make_report())).images()
    shown = pictures()
    for index, frame in enumerate(shown.frames):
        np.testing.assert_array_equal(images[f"PyTorch, frame {frame + 1}"], shown.expected[index])
        np.testing.assert_array_equal(images[f"export, frame {frame + 1}"], shown.found[index])
        np.testing.assert_array_equal(images[f"panels of frame {frame + 1}"], shown.panels[index])
    difference = images["difference, frame 1"]
    assert difference[2, 3].tolist() == [128, 128, 128]
    assert np.count_nonzero(difference) == 3


def test_untrusted_strings_are_escaped():
    report = make_report(
        bundle=EVIL,
        labels=(EVIL, "\ud800"),
        provenance={EVIL: {EVIL: EVIL}, "list": [EVIL]},
        exported_with={EVIL: EVIL},
        environment={EVIL: EVIL},
        checks=(*CHECKS, dataclasses.replace(FAILURES[0], meaning=EVIL, subject=EVIL)),
    )
    reader = Reader(page(report))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.words.count(EVIL) >= 7
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path):
    make_report(labels=("\ud800",)).write(tmp_path)
    assert Report.from_json((tmp_path / "report.json").read_bytes()).labels == ("\ud800",)


def test_long_strings_are_cut():
    assert len(page(make_report(labels=("x" * 10**6,) * 100, pictures=None))) < 100_000


# -------------------------------------------------------------------------------------------- charts


def bar_parts(check: Check) -> tuple[float, float]:
    """Length of the bar, place of the limit."""
    drawn = ET.fromstring(bar(check))
    rectangle = next(part for part in drawn if (part.get("class") or "").startswith("bar"))
    limit = next(part for part in drawn if part.get("class") == "limit")
    return float(str(rectangle.get("width"))), float(str(limit.get("x1")))


def test_bars_reach_the_limit_when_the_error_does():
    lengths = [bar_parts(values("a", "b", 1e-4 * share)) for share in (1e-9, 1e-3, 0.1, 1.0, 5.0, 1e6)]
    bars, limits = [length for length, _ in lengths], {limit for _, limit in lengths}
    assert len(limits) == 1
    limit = limits.pop()
    assert bars[0] == 0
    assert bars == sorted(bars)
    assert bars[3] == limit
    assert bars[4] > limit
    assert bars[5] == 300
    # Logarithmic: a factor of 10 is the same length everywhere.
    assert bars[2] - bars[1] == pytest.approx(2 * (bars[3] - bars[2]), abs=0.2)
    assert "over" in bar(values("a", "b", 2e-4))
    assert "over" not in bar(values("a", "b", 1e-5))
    assert bar(Check("a", "clip", "b", passed=True, found=1.0)) == ""


def points(chart: str, name: str) -> list[tuple[float, float]]:
    line = next(part for part in ET.fromstring(chart).iter("polyline") if part.get("class") == name)
    return [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]  # type: ignore[misc]


def test_the_chart_rises_with_the_error():
    steps = [StepError(900, 1e-5, 1e-6), StepError(500, 1e-4, 1e-6), StepError(100, 1e-3, 1e-5)]
    largest, mean = (points(step_chart(steps, 1e-3, 5e-5), name) for name in ("first", "second"))
    assert [x for x, _ in largest] == sorted(x for x, _ in largest)
    (_, low), (_, middle), (_, high) = largest
    assert low > middle > high, "SVG counts from the top"
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert mean[0][1] == mean[1][1] > mean[2][1]
    assert "t 500" in step_chart(steps, 1e-3, 5e-5)


@pytest.mark.parametrize(
    "steps",
    [
        [StepError(9, 0.0, 0.0)],
        [StepError(9, 1e-5, 1e-6), StepError(1, None, None)],
        [StepError(9, None, None)],
        [StepError(index, 1e-5, 1e-6) for index in range(1000)],
    ],
)
def test_charts_of_unusual_chains(steps: list[StepError]):
    for limits in ((1e-3, 5e-5), (None, None)):
        ET.fromstring(step_chart(steps, *limits))


# ------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits(width: int):
    for report in (make_report(), FAILED):
        lines = terminal(report, width).splitlines()
        assert max(map(len, lines)) <= width
        for name in ("encode", "feature", "2.0e-06", "latent, largest error"):
            assert any(name in line for line in lines)


def test_failures_stand_out():
    lines = terminal(FAILED, 200).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("✗")] == ["decode", "warped", "step", "text"]
    assert "✗ decode: frames found 0.03, allowed 1.0e-04 (300×); warped" in "\n".join(lines)
    assert lines[-1].startswith("✗ FAILED: 4 of 10 checks failed")
    assert "✗" not in terminal(make_report())


def test_the_table_ignores_markup_in_untrusted_strings():
    failed = dataclasses.replace(FAILURES[2], meaning="[red]its[/red] [/nothing]")
    assert "[red]its[/red] [/nothing]" in terminal(make_report(checks=(failed,)), 200)


def test_a_ratio_in_decibels_is_judged_from_below():
    check = Check(CHAIN, "clip", "frames, PSNR", passed=True, found=46.0, allowed=40.0, unit="dB", at_least=True)
    assert check.judged
    assert check.limit == "≥ 40"
    assert check.share == pytest.approx(0.5, abs=0.002), "6 dB are half of the error"
    worse = dataclasses.replace(check, found=34.0, passed=False)
    assert worse.share == pytest.approx(2, abs=0.01)

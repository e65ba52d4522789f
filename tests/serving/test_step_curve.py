"""The number of slots: from made-up curves, from a made-up clock, and from real steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfdm_export.batching.slots import BUDGET, choose_slots, measure_curve
from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli.serve import settle_slots
from lfdm_export.engines.compiled_cache import SIZE_VARIABLE
from lfdm_export.engines.pytorch.compiled import VARIABLE
from lfdm_export.errors import EngineError
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.serving import step_curve
from lfdm_export.serving.step_curve import SIZES, described, measured_slots, parse_curve
from lfdm_export.serving.triton.settings import ServingSettings
from tests.fake_bundle import fake_manifest, write_fake_bundle
from tests.torch_bundle import write_torch_bundle


@pytest.mark.parametrize(
    ("curve", "slots"),
    [
        # A CPU: a step of n clips takes n times as long, or nearly.
        ({1: 15.8, 2: 31.0, 4: 59.2, 8: 128.0, 16: 275.0}, 1),
        # A step takes the same for any number of clips.
        ({1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0, 16: 2.0}, 16),
        # Up to four clips it hardly takes longer, then in proportion.
        ({1: 2.0, 2: 2.1, 4: 2.4, 8: 4.7, 16: 9.4}, 4),
        # Twice the clips cost 1.9 times as much: eight make 18% more steps per second than one, two 5%.
        ({1: 1.0, 2: 1.9, 4: 3.6, 8: 6.8}, 4),
        # Large batches are slower.
        ({1: 1.0, 2: 1.2, 4: 5.0}, 2),
        ({1: 0.5}, 1),
    ],
)
def test_slots_are_as_many_as_pay(curve: dict[int, float], slots: int):
    assert choose_slots(curve) == slots
    assert choose_slots({size: 1000 * seconds for size, seconds in curve.items()}) == slots


class Steps:
    """Steps of a set duration on a clock of their own; the first of each size takes ten times as long."""

    def __init__(self, seconds: Callable[[int], float], *, most: int = 1 << 30) -> None:
        self.now, self.seconds, self.most = 0.0, seconds, most
        self.runs: list[int] = []

    def prepare(self, size: int) -> Callable[[], object] | None:
        self.now += 100  # compiling

        def step() -> None:
            self.now += self.seconds(size) * (1 if size in self.runs else 10)
            self.runs.append(size)

        return step if size <= self.most else None

    def measured(self) -> dict[int, float]:
        return measure_curve(self.prepare, SIZES, clock=lambda: self.now)


def test_a_curve_has_the_seconds_of_warm_steps():
    slower = Steps(lambda size: 0.3 * size**0.8)
    assert list(slower.measured()) == [1, 2, 4], "4 s at most, about"
    assert slower.measured() == pytest.approx({size: 0.3 * size**0.8 for size in (1, 2, 4)})
    quick = Steps(lambda size: 0.001)
    assert quick.measured() == pytest.approx(dict.fromkeys(SIZES, 0.001))
    assert quick.runs == [size for size in SIZES for _ in range(4)]


@pytest.mark.parametrize(("seconds", "last"), [((1, 2, 4, 8, 16), 2), ((1, 1.9, 3.4, 6.9, 5), 8), ((1, 3, 1, 1, 1), 2)])
def test_the_curve_ends_where_a_larger_batch_gains_nothing(seconds: tuple[float, ...], last: int):
    curve = dict(zip(SIZES, (0.01 * one for one in seconds), strict=True))
    assert list(Steps(lambda size: curve[size]).measured()) == [size for size in SIZES if size <= last]


def test_slow_steps_are_measured_for_one_clip_alone():
    slow = Steps(lambda size: BUDGET * size)
    assert slow.measured() == {1: BUDGET}
    assert choose_slots(slow.measured()) == 1


def test_the_curve_ends_where_the_memory_does():
    assert list(Steps(lambda size: 0.001, most=4).measured()) == [1, 2, 4]
    assert Steps(lambda size: 0.001, most=0).measured() == {}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(SIZE_VARIABLE, "1MB")
    return tmp_path / "cache"


def runner_of(bundle: Bundle, **options: Any) -> StageRunner:
    return StageRunner(bundle, **{"target": "onnxruntime", "threads": 1, "self_check": False, **options})


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sizes of each measurement, which takes made-up times."""
    made: list[list[int]] = []

    def measure(prepare: Any, sizes: list[int]) -> dict[int, float]:
        made.append(sizes)
        return {1: 1.0, 2: 1.0, 4: 4.0}

    monkeypatch.setattr(step_curve, "measure_curve", measure)
    return made


def test_a_curve_is_kept_for_its_bundle_and_engine(bundle: Bundle, cache: Path, measurements: list[list[int]]):
    for _ in range(2):
        assert measured_slots(runner_of(bundle), on_device=False) == (2, {1: 1.0, 2: 1.0, 4: 4.0})
    assert measurements == [list(SIZES)]
    measured_slots(runner_of(bundle, threads=2), on_device=False)
    other = write_fake_bundle(cache / "other", fake_manifest(with_text=True))
    measured_slots(runner_of(other), on_device=False)
    assert len(measurements) == 3


@pytest.mark.parametrize("damage", [b"", b"junk", b'{"1": 1.0}'])
def test_a_damaged_curve_is_measured_again(bundle: Bundle, cache: Path, measurements: list[list[int]], damage: bytes):
    measured_slots(runner_of(bundle), on_device=False)
    (kept,) = (cache / "lfdm-export" / "steps").iterdir()
    kept.write_bytes(damage)
    assert measured_slots(runner_of(bundle), on_device=False)[0] == 2
    assert len(measurements) == 2
    measured_slots(runner_of(bundle), on_device=False)
    assert len(measurements) == 2, "and kept again"


@pytest.mark.parametrize(
    "stored", [[], {}, {"1": 0}, {"1": -1.0}, {"1": "x"}, {"2": 1.0}, {"1": 1.0, "4": 1.0}, {"1": float("inf")}]
)
def test_what_is_no_curve_is_not_read(stored: Any):
    assert parse_curve(json.dumps(stored).encode(), [1, 2, 4]) is None
    assert parse_curve(None, [1, 2, 4]) is None
    assert parse_curve(b'{"1": 0.5, "2": 0.75}', [1, 2, 4]) == {1: 0.5, 2: 0.75}


def test_without_a_cache_it_is_measured_each_time(bundle: Bundle, measurements: list[list[int]]):
    for _ in range(2):
        measured_slots(runner_of(bundle), on_device=False)
    assert len(measurements) == 2


def test_no_memory_for_one_sample_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_curve, "measure_curve", lambda prepare, sizes: {})
    with pytest.raises(EngineError, match="no memory for a single sample"):
        measured_slots(runner_of(bundle), on_device=False)


def test_real_steps_are_measured(bundle: Bundle):
    settings, curve = settle_slots(bundle, ServingSettings(target="onnxruntime", threads=1, self_check=False))
    assert sorted(curve) == list(SIZES)[: len(curve)]
    assert settings.slots in curve
    assert described({1: 0.0158, 4: 0.0592}) == "15.8 ms for 1 clip, 59.2 ms for 4"


def test_real_steps_on_a_device_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "0")
    bundle = write_torch_bundle(tmp_path / "torch")
    settings, curve = settle_slots(bundle, ServingSettings(target="torch", threads=1, on_device=True, self_check=False))
    assert settings.slots in curve
    assert all(seconds > 0 for seconds in curve.values())

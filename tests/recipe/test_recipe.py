"""Recipes: parts are made in order, skipped when they are there, resumed to the same bits, made again after changes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lfdm_export import Bundle, load_model
from lfdm_export.checkpoints.model_folder import load_model_folder
from lfdm_export.cli import train_main
from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.evaluation.evaluate import Evaluation, Generation
from lfdm_export.evaluation.reconstruction import Reconstruction
from lfdm_export.files.atomic import claimed
from lfdm_export.files.json_codec import to_plain
from lfdm_export.recipe import run as running
from lfdm_export.recipe.card import card
from lfdm_export.recipe.characters64 import CHARACTERS64, RECIPES
from lfdm_export.recipe.parts import (
    BundlePart,
    DistillPart,
    DmPart,
    EvaluationPart,
    LfaePart,
    ModelPart,
    Part,
    Recipe,
    SchedulePart,
    Training,
)
from lfdm_export.recipe.record import RECORD, Entry, Record, digests
from lfdm_export.recipe.run import RecipeOutcome, run_recipe
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.tuned import TunedSampler
from lfdm_models.training.few_steps import chosen_times
from tests.models.test_training import CONFIG, FRAMES, QUICK, SIZE, Killed, run_settings


def training(steps: int, **changes: Any) -> Training:
    return Training(QUICK, run_settings(steps, **changes), pool=4)


PARTS: tuple[Part, ...] = (
    LfaePart("regions", training(3), learn="regions", equivariance=1.0),
    LfaePart("all", training(5), start="regions", from_first=True, camera_still=True),
    DmPart("dm", training(5), lfae="all", signal_std=0.05),
    # "last" would encode hundreds of clips first; the full test does.
    DistillPart("distilled", training(1), lfae="all", dm="dm", steps=2, learn="all"),
    ModelPart("model", lfae="all", dm="dm", distilled="distilled"),
)
TOY = Recipe("toy", 1, CONFIG, SIZE, FRAMES, PARTS)


def changed(name: str, **changes: Any) -> Recipe:
    """The toy recipe with other settings of a part."""
    parts = tuple(dataclasses.replace(part, **changes) if part.name == name else part for part in PARTS)
    return dataclasses.replace(TOY, parts=parts)


def make(folder: Path, recipe: Recipe = TOY, **options: Any) -> tuple[RecipeOutcome, list[str]]:
    """Make a recipe; also return what was said of its parts."""
    said: list[str] = []
    return run_recipe(recipe, folder, threads=1, device="cpu", tell=said.append, **options), said


def results(folder: Path) -> dict[str, str]:
    """SHA-256 of every result."""
    entries = Record(folder, TOY).entries
    return {
        f"{name}/{path}": sha
        for name, entry in entries.items()
        for path, sha in digests(folder / name, entry.files).items()
    }


def made(said: Sequence[str]) -> list[str]:
    return [sentence.partition(":")[0] for sentence in said if ": made" in sentence]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that nothing interrupted; read-only."""
    folder = tmp_path_factory.mktemp("recipe") / "toy"
    outcome, said = make(folder)
    assert outcome == RecipeOutcome()
    assert made(said) == [part.name for part in PARTS]
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_the_results_are_models(whole: Path):
    files = results(whole)
    assert {"regions/lfae.pth", "dm/dm.pth", "model/toy/model.json", "model/toy-2-steps/dm.safetensors"} <= set(files)
    model = load_model(whole / "all" / "lfae.pth", whole / "dm" / "dm.pth")
    shipped, few = (load_model_folder(whole / "model" / name) for name in ("toy", "toy-2-steps"))
    weights, stored = model.lfae.state_dict(), shipped.lfae.state_dict()
    assert all(torch.equal(weights[key], stored[key]) for key in weights)
    steps = few.provenance["few_steps"]
    assert isinstance(steps, dict)
    assert steps["times"] == list(chosen_times(2, CONFIG.dm.training_steps))


def test_sessions_say_steps_seconds_and_machine(whole: Path):
    record = json.loads((whole / RECORD).read_text())
    (session,) = record["parts"]["all"]["sessions"]
    assert (session["first_step"], session["last_step"], session["ended"]) == (0, 5, "done")
    assert session["seconds"] > 4 * session["seconds_per_step"] > 0
    assert session["cpu_seconds_per_step"] > 0
    assert session["device"] == "cpu"
    assert session["machine"]["threads"] == "1"
    assert record["parts"]["all"]["settings"]["training"]["run"]["steps"] == 5


def test_what_is_there_is_skipped(copy: Path):
    before = results(copy)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.pth")}
    outcome, said = make(copy)
    assert outcome == RecipeOutcome()
    assert said[:-1] == [f"{part.name}: is there" for part in PARTS]
    assert results(copy) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def forget(folder: Path, name: str) -> None:
    """Remove a part and its entry."""
    shutil.rmtree(folder / name)
    record = json.loads((folder / RECORD).read_text())
    del record["parts"][name]
    (folder / RECORD).write_text(json.dumps(record))


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Let the process die after a step of a part, without any word."""
    count = running._Meter.step

    def step_or_die(self: Any, done: int, total: int, losses: Any) -> None:
        count(self, done, total, losses)
        if self._part.name == name and done == step:
            raise Killed

    monkeypatch.setattr(running._Meter, "step", step_or_die)
    monkeypatch.setattr(running._Meter, "__exit__", lambda *_: None)


@pytest.mark.parametrize(("part", "step"), [("regions", 1), ("all", 3), ("dm", 4)])
def test_a_killed_part_ends_in_the_same_bits(
    copy: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, part: str, step: int
):
    forget(copy, part)
    with monkeypatch.context() as patch:
        kill_at(patch, part, step)
        with pytest.raises(Killed):
            make(copy)
    (killed,) = Record(copy, TOY).entries[part].sessions
    assert killed.ended == "killed"
    assert killed.last_step == step - step % 2  # the last checkpoint, every two steps
    _, said = make(copy)
    assert made(said) == [part]  # the later parts were made from the same bits
    sessions = Record(copy, TOY).entries[part].sessions
    assert [session.ended for session in sessions] == ["killed", "done"]
    assert sessions[1].first_step == killed.last_step
    assert results(copy) == results(whole)


def test_limited_time_ends_with_a_checkpoint_and_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    only = ("regions", "all")
    assert make(tmp_path, minutes=1e-9, only=only)[0] == RecipeOutcome("regions")  # over before anything begins
    stops: list[RecipeOutcome] = []
    while not stops or stops[-1].part is not None:
        # The time is over whenever it is asked for, but for the first time in a run: a step of a part can begin.
        asked = iter([False])
        monkeypatch.setattr(running._Runner, "passed", lambda _, asked=asked: next(asked, True))
        stops.append(make(tmp_path, minutes=1.0, only=only)[0])
        assert len(stops) < 40
    assert [(stop.part, stop.step) for stop in stops[:4]] == [("regions", 1), ("regions", 2), ("all", 0), ("all", 1)]
    found = results(tmp_path)
    assert found == {name: sha for name, sha in results(whole).items() if name.startswith(("regions", "all"))}


def test_a_changed_setting_makes_its_part_and_those_that_need_it_again(copy: Path, whole: Path):
    outcome, said = make(copy, changed("dm", training=training(4)))
    assert outcome == RecipeOutcome()
    assert made(said) == ["dm", "distilled", "model"]
    found, before = results(copy), results(whole)
    assert found["dm/dm.pth"] != before["dm/dm.pth"]
    assert found["all/lfae.pth"] == before["all/lfae.pth"]


def test_the_same_result_of_other_settings_leaves_the_later_parts(copy: Path):
    _, said = make(copy, changed("all", training=training(5, log_every=2)))
    assert made(said) == ["all"]


def test_a_new_version_makes_everything_again(copy: Path):
    _, said = make(copy, dataclasses.replace(TOY, version=2), only=["regions"])
    assert made(said) == ["regions"]


def test_a_damaged_result_is_made_again(copy: Path, whole: Path):
    with (copy / "regions" / "lfae.pth").open("r+b") as file:
        file.write(b"?")
    _, said = make(copy)
    assert made(said) == ["regions"]
    assert results(copy) == results(whole)


def test_only_some_parts(tmp_path: Path):
    outcome, said = make(tmp_path, only=["regions"])
    assert outcome == RecipeOutcome()
    assert made(said) == ["regions"]
    assert not (tmp_path / "all").exists()
    with pytest.raises(InputError, match=r"part 'dm' needs 'all', which is not there .* --only all dm"):
        make(tmp_path, only=["dm"])
    with pytest.raises(InputError, match="'toy' has no part 'vae'; choose from regions, all, dm"):
        make(tmp_path, only=["vae"])


def test_a_failed_part_is_named_and_the_earlier_ones_stay(tmp_path: Path):
    broken = changed("all", landmarks=1.0)
    with pytest.raises(LfdmExportError, match=r"^part 'all' of recipe 'toy' failed: landmarks are for .* set their"):
        make(tmp_path, broken)
    assert Record(tmp_path, broken).entries["all"].sessions[-1].ended == "failed"
    _, said = make(tmp_path, only=["regions", "all"])
    assert said[0] == "regions: is there"
    assert made(said) == ["all"]


def test_other_folders_are_refused(copy: Path, tmp_path: Path):
    with pytest.raises(InputError, match="is of recipe 'toy', not 'characters64'"):
        make(copy, CHARACTERS64)
    (tmp_path / "own" / "regions").mkdir(parents=True)
    with pytest.raises(LfdmExportError, match="regions was not made by a recipe; move it, or choose another folder"):
        make(tmp_path / "own")
    (copy / RECORD).write_text("{}")
    with pytest.raises(InputError, match=r"recipe.json cannot be read as a recipe's record: .*choose another folder"):
        make(copy)
    with (
        claimed(tmp_path / "own" / running._LOCK),
        pytest.raises(InputError, match=r"another process makes a recipe in .*wait for it"),
    ):
        make(tmp_path / "own")


# --- The declaration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ((PARTS[0], PARTS[0]), "two parts have the name 'regions'"),
        ((PARTS[1],), "'all' needs 'regions' before it, of kind 'lfae'; found no part"),
        ((PARTS[0], DmPart("x", training(1), lfae="regions", start="regions")), "of kind 'dm'; found lfae"),
    ],
)
def test_a_recipe_checks_its_parts(parts: tuple[Part, ...], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Recipe("x", 1, CONFIG, SIZE, FRAMES, parts)


def test_the_shipped_recipe_ends_with_the_model_and_its_measures():
    kinds = [part.kind for part in CHARACTERS64.parts]
    assert {"lfae", "dm", "schedule", "distill", "model", "evaluation"} <= set(kinds)
    seeds = [part.training.run.seed for part in CHARACTERS64.parts if isinstance(part, LfaePart | DmPart | DistillPart)]
    assert len(set(seeds)) == len(seeds)
    settings = [part.settings for part in CHARACTERS64.parts if isinstance(part, EvaluationPart)]
    assert SamplingOptions("tuned", 1) in settings[-1]


# --- The card ----------------------------------------------------------------------------------------


def test_the_card_has_measures_sizes_and_times(copy: Path):
    bundle = BundlePart("bundle", lfae="all", dm="dm")
    measures = EvaluationPart("measures", "bundle", (), clips=2)
    model = ModelPart("model", lfae="all", dm="dm")
    recipe = dataclasses.replace(TOY, parts=(*PARTS[:3], bundle, model, measures))
    generation = Generation(SamplingOptions("ddim", 10), 4, 0.75, {}, (), 0.125, 0.0625, 1.0)
    found = Reconstruction(4, 0.03, 0.04, 0.1, {"smile": 0.4, "nod": 0.2})
    evaluation = Evaluation(("nod",), (), "fp32", 0, "drawn characters", found, 1.0, 0.5, 0.001, (generation,))
    (copy / "measures").mkdir()
    (copy / "measures" / "evaluation.json").write_text(json.dumps(to_plain(evaluation)))
    record = Record(copy, recipe)
    for name in ("bundle", "measures"):
        record.entries[name] = Entry("key", {})
    written = card(recipe, record)
    assert "| L1 of reconstructed frames / copying the first frame | **0.300** |" in written
    assert "| by label | nod 0.20, smile 0.40 |" in written
    assert "| ddim | 10 | 75% | 0.12 | 0.062 | 4 |" in written
    size = (copy / "model" / "toy" / "dm.safetensors").stat().st_size
    assert f"| `toy/dm.safetensors` | {size / 1e6:.2f} |" in written
    (row,) = (line for line in written.splitlines() if line.startswith("| dm |"))
    (session,) = record.entries["dm"].sessions
    seconds = f"{session.seconds_per_step:.3f} | {session.cpu_seconds_per_step:.3f}"
    assert row == f"| dm | 5 | {seconds} | {session.seconds / 60:.1f} | 1 |"


@pytest.mark.full
def test_a_recipe_with_bundles_tables_and_measures(tmp_path: Path):
    """Every kind of part, on networks of the shipped model's layout."""
    lfae, dm = PARTS[1], PARTS[2]
    assert isinstance(lfae, LfaePart)
    recipe = dataclasses.replace(
        TOY,
        parts=(
            dataclasses.replace(lfae, start=None),
            dm,
            BundlePart("untuned", lfae="all", dm="dm"),
            SchedulePart("tuned", "untuned", (3,), conditions=8, clips=4, generations=1, candidates=4, seed=0),
            DistillPart("distilled", training(1), lfae="all", dm="dm", steps=2),
            ModelPart("model", lfae="all", dm="dm", tuned="tuned", distilled="distilled"),
            BundlePart("bundle", lfae="all", dm="dm", tuned="tuned"),
            BundlePart("few", lfae="all", dm="distilled", distilled=True),
            EvaluationPart("measures", "bundle", (SamplingOptions("tuned", 3), SamplingOptions("ddim", 5)), clips=1),
            EvaluationPart("few-measures", "few", (SamplingOptions("tuned", 2),), clips=1),
        ),
    )
    outcome, said = make(tmp_path, recipe)
    assert outcome == RecipeOutcome()
    assert made(said) == [part.name for part in recipe.parts]
    model = tmp_path / "model" / "toy"
    provenance = json.loads((model / "model.json").read_text())["provenance"]
    assert TunedSampler.load(model / "tuned.json").dm_sha256 == provenance["dm"]["sha256"]
    assert Bundle.open(tmp_path / "few" / "bundle").manifest.sampler.sampler == "tuned"
    written = (tmp_path / "card.md").read_text()
    assert re.search(r"^\| tuned \| 2 \| \d+% \|", written, re.MULTILINE)
    assert re.search(r"^\| measures \|  \|  \|  \| \d", written, re.MULTILINE)
    assert made(make(tmp_path, recipe)[1]) == []


# --- The command -------------------------------------------------------------------------------------


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "toy", TOY)


@pytest.mark.usefixtures("with_toy")
def test_the_command_lists_recipes_parts_and_states(copy: Path, capsys: pytest.CaptureFixture[str]):
    assert train_main(["recipe", "--list"]) == 0
    assert "toy  version 1, 5 parts, 14 training steps" in capsys.readouterr().out
    shutil.rmtree(copy / "distilled")
    assert train_main(["recipe", "toy", "--list", "--out", str(copy)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["all", "lfae", "5", "steps", "made", "needs", "regions"]
    assert lines[3] == ["distilled", "distill", "1", "steps", "not", "made", "needs", "all,", "dm"]
    assert train_main(["recipe", "toy", "--list"]) == 0
    assert "made" not in capsys.readouterr().out


@pytest.mark.usefixtures("with_toy")
def test_the_command_makes_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["recipe", "toy", "--out", str(tmp_path / "toy"), "--threads", "1", "--device", "cpu"]
    assert train_main([*words, "--only", "regions", "--minutes", "1e-9"]) == 130
    assert "stopped in part 'regions'; the same command continues" in capsys.readouterr().err
    assert train_main([*words, "--only", "regions"]) == 0
    assert "regions: made in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["vae"], "there is no recipe 'vae'; choose from characters64"),
        ([], "a recipe's name is missing; choose from characters64"),
        (["characters64"], "give it with --out"),
        (["characters64", "--out", "x", "--minutes", "0"], "expected numbers above 0"),
    ],
)
def test_wrong_words_get_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert train_main(["recipe", *words]) == 1
    assert sentence in capsys.readouterr().err

"""The tables of a model card, from a recipe's evaluations and its record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from lfdm_export.evaluation.evaluate import Evaluation
from lfdm_export.evaluation.report import JSON, table
from lfdm_export.files.json_codec import from_plain
from lfdm_export.recipe.parts import EvaluationPart, ModelPart, Recipe, steps_of
from lfdm_export.recipe.record import Record

_MEGABYTE = 1e6


def card(recipe: Recipe, record: Record) -> str:
    """Markdown: how good the model is, how large, and how it was made."""
    made_by = f"Made by `lfdm-train recipe {recipe.name}`, version {recipe.version}."
    sections = [f"# {recipe.name}", made_by, "## How good it is", *_quality(recipe, record)]
    sections += ["## Files", _files(recipe, record), "## How it was made", *_making(recipe, record)]
    return "\n\n".join(sections) + "\n"


def _quality(recipe: Recipe, record: Record) -> Iterable[str]:
    for part in recipe.parts:
        if not isinstance(part, EvaluationPart):
            continue
        path = record.folder / part.name / JSON
        found = from_plain(Evaluation, json.loads(path.read_bytes()), JSON)
        rebuilt = found.reconstruction
        labels = sorted(rebuilt.by_label.items(), key=lambda pair: pair[1])
        yield f"`{part.bundle}`, on {found.data}; seed {found.seed}, {found.precision}."
        yield _joined(
            [f"LFAE, {rebuilt.clips} clips", ""],
            [
                ["L1 of reconstructed frames / copying the first frame", f"**{rebuilt.ratio:.3f}**"],
                ["the same of the warped picture alone", f"{rebuilt.warped / rebuilt.copied:.3f}"],
                ["by label", ", ".join(f"{label} {ratio:.2f}" for label, ratio in labels)],
            ],
        )
        rows = [
            [
                str(one.setting.sampler),
                str(one.setting.steps),
                f"{one.accuracy:.0%}",
                f"{one.frechet:.2f}",
                f"{one.still:.3f}",
                str(one.clips),
            ]
            for one in found.generations
        ]
        real = ["real clips", "", f"{found.real_accuracy:.0%}", f"{found.real_frechet:.2f}", "", str(rebuilt.clips)]
        yield _joined(["sampler", "steps", "label recognized", "Fréchet", "L1 on still parts", "clips"], [*rows, real])


def _files(recipe: Recipe, record: Record) -> str:
    rows = [
        [f"`{name}`", f"{(record.folder / part.name / name).stat().st_size / _MEGABYTE:.2f}"]
        for part in recipe.parts
        if isinstance(part, ModelPart)
        for name in record.entries[part.name].files
    ]
    return _joined(["file", "MB"], rows)


def _making(recipe: Recipe, record: Record) -> Iterable[str]:
    rows, machines = [], set()
    for part in recipe.parts:
        sessions = record.entries[part.name].sessions
        machines |= {f"{one.machine['processor']}, {one.machine['threads']} threads, {one.device}" for one in sessions}
        timed = [one for one in sessions if one.seconds_per_step is not None and one.cpu_seconds_per_step is not None]
        wall, cpu = (
            f"{_mean([(getattr(one, name), one.last_step - one.first_step) for one in timed]):.3f}" if timed else ""
            for name in ("seconds_per_step", "cpu_seconds_per_step")
        )
        minutes = sum(one.seconds for one in sessions) / 60
        rows.append([part.name, str(steps_of(part) or ""), wall, cpu, f"{minutes:.1f}", str(len(sessions))])
    yield "\n".join(f"- {machine}" for machine in sorted(machines))
    yield _joined(["part", "steps", "s / step", "s of a core / step", "minutes", "sessions"], rows)


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return sum(value * count for value, count in weighted) / sum(count for _, count in weighted)


def _joined(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(header, rows))

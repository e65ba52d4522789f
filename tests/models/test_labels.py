from __future__ import annotations

import re
from pathlib import Path

import pytest

from lfdm_models.labels import DATASETS, REGION_PAD


def test_number_of_labels_and_pad():
    assert {name: len(labels) for name, labels in DATASETS.items()} == {"mug": 7, "mhad": 26, "natops": 24}
    assert REGION_PAD == {"mug": 3, "mhad": 0, "natops": 0}


@pytest.mark.parametrize("dataset", DATASETS)
def test_labels_are_those_of_the_specification(dataset: str, shared_dir: Path):
    text = (shared_dir / "spec" / "lfdm.md").read_text(encoding="utf-8")
    section = text[text.index("## 6. Text") : text.index("## 7.")]
    paragraph = re.search(rf"^{dataset.upper()}: (.*?)\.\n(?=[A-Z]+:|\n)", section, re.MULTILINE | re.DOTALL)
    assert paragraph, dataset
    written = re.split(r" · |, " if dataset == "mug" else r" ·\s", paragraph[1].replace(" ·\n", " · "))
    assert tuple(" ".join(label.split()) for label in written) == DATASETS[dataset]


@pytest.mark.parametrize("dataset", DATASETS)
def test_labels_differ_without_case(dataset: str):
    folded = {label.casefold() for label in DATASETS[dataset]}
    assert len(folded) == len(DATASETS[dataset])

"""Facts of the published data sets about models trained on them, for the commands and the Python interface."""

from __future__ import annotations

from dataclasses import dataclass

from lfdm_export.errors import InputError
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_models.labels import DATASETS, REGION_PAD

#: Text encoder of the published models, by its name on the Hugging Face hub.
PUBLISHED_ENCODER = "bert-base-cased"
#: Selects no text encoder where a data set would select one.
NO_ENCODER = "none"


@dataclass(frozen=True)
class DatasetFacts:
    """The facts of one data set.

    Attributes:
        labels: texts as given to the text encoder.
        preprocessing: rule for its pictures.
        region_pad: padding of the region predictor's last convolution, which weights do not show.
        text_encoder: name on the Hugging Face hub.
    """

    labels: tuple[str, ...]
    preprocessing: Preprocessing
    region_pad: int
    text_encoder: str = PUBLISHED_ENCODER


def dataset_facts(name: str) -> DatasetFacts:
    """The facts of "mug", "mhad" or "natops".

    Raises:
        InputError: the name is unknown.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    return DatasetFacts(DATASETS[name], Preprocessing.for_dataset(name), REGION_PAD[name])

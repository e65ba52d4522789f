"""What a published data set decides about a model trained on it: for the commands and the Python interface alike."""

from __future__ import annotations

from dataclasses import dataclass

from lfdm_export.errors import InputError
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_models.labels import DATASETS, REGION_PAD

#: The text encoder that the published models were trained with, by its name on the Hugging Face hub.
PUBLISHED_ENCODER = "bert-base-cased"
#: Names no text encoder, where a data set would bring one.
NO_ENCODER = "none"


@dataclass(frozen=True)
class DatasetFacts:
    """The facts of one data set.

    Attributes:
        labels: as the text encoder was given them.
        preprocessing: of its pictures.
        region_pad: padding of the region predictor's last convolution, which no weight tells.
        text_encoder: name on the Hugging Face hub.
    """

    labels: tuple[str, ...]
    preprocessing: Preprocessing
    region_pad: int
    text_encoder: str = PUBLISHED_ENCODER


def dataset_facts(name: str) -> DatasetFacts:
    """The facts of "mug", "mhad" or "natops".

    Raises:
        InputError: another name.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    return DatasetFacts(DATASETS[name], Preprocessing.for_dataset(name), REGION_PAD[name])

"""Recognizes bundles of drawn characters, the only data whose clips are drawn and classified here."""

from __future__ import annotations

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.wording import shortened
from lfdm_models.training.procedural import LABELS

# Names of this data in the provenance: of `lfdm-train --data`, and of the shipped model.
_DRAWN = ("procedural", "procedural characters")


def require_drawn_characters(bundle: Bundle) -> None:
    """Raise unless the model was trained on drawn characters, the only data that evaluation can generate and classify.

    Raises:
        InputError: the bundle's provenance names other data; or it names none, and the labels differ.
    """
    data = bundle.manifest.provenance.get("data")
    others = [label for label in bundle.labels if label not in LABELS]
    if data is not None and data not in _DRAWN:
        why = f"its model was trained on the data set {data!r}"
    elif others:
        why = f"its labels ({shortened(bundle.labels)}) are not theirs ({', '.join(LABELS)})"
    elif data is None and not bundle.labels:
        why = "neither labels nor provenance say that its model is of such"
    else:
        return
    raise InputError(
        f"{bundle.path} cannot be evaluated: this measures only drawn characters, and {why}; name its own data with "
        "--data"
    )

"""Which bundles are of drawn characters, which alone are drawn and judged here."""

from __future__ import annotations

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.wording import shortened
from lfdm_models.training.procedural import LABELS

# What provenance calls the data of models of drawn characters: `lfdm-train --data`, and the shipped model.
_DRAWN = ("procedural", "procedural characters")


def require_drawn_characters(bundle: Bundle) -> None:
    """Refuse a model that was trained on anything but drawn characters, which alone are drawn and judged here.

    Raises:
        InputError: the bundle's provenance names other data, or, where it names none, its labels are others.
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
        f"{bundle.path} cannot be evaluated: this measures drawn characters alone, and {why}; compare clips of its own "
        "data instead"
    )

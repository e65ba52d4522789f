"""What a server reports about itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from lfdm_export.client.faults import Fault
from lfdm_export.errors import ServerError
from lfdm_export.protocol.contract import CLIP_MODEL
from lfdm_export.protocol.model_facts import FACTS_PARAMETER, ModelFacts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Health of a server.

    Triton reports readiness even after a model's process has died: only a clip proves that clips can be generated.

    Attributes:
        live: whether the server answers.
        ready: whether the server reports that it is ready, with all models loaded.
        clips: whether the model `lfdm` reports that it is ready.
        version: version of Triton; "" if the server is not live.
    """

    live: bool
    ready: bool = False
    clips: bool = False
    version: str = ""


def not_up(fault: Fault) -> Health:
    """Convert a failed health request into a `Health`.

    Raises:
        LfdmExportError: waiting would not help.
    """
    if not fault.again and fault.code != "DEADLINE_EXCEEDED":
        raise fault.error from None
    logger.debug("not up: %s", fault.error)
    return Health(live=False)


def read_facts(response: Any, address: str) -> ModelFacts:
    """Read the model's facts from a `ModelConfigResponse`.

    Raises:
        ServerError: the response has none.
    """
    parameters = response.config.parameters
    if FACTS_PARAMETER not in parameters:
        raise ServerError(
            f"the model {CLIP_MODEL} at {address} does not say what it is (no parameter {FACTS_PARAMETER}); "
            "start the server with lfdm-serve, or fill its repository with lfdm-export --triton",
            "FAILED_PRECONDITION",
        )
    return ModelFacts.from_json(parameters[FACTS_PARAMETER].string_value)

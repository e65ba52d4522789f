"""What a server says of itself."""

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
    """What is up.

    Triton keeps its readiness even where a model's process has died: that `clips` are made is only known from one.

    Attributes:
        live: the server answers.
        ready: it says that it is ready, all models loaded.
        clips: the model `lfdm` says that it is ready.
        version: of Triton; "" where it is not live.
    """

    live: bool
    ready: bool = False
    clips: bool = False
    version: str = ""


def not_up(fault: Fault) -> Health:
    """What a failed look at a server's health means.

    Raises:
        LfdmExportError: waiting would not help.
    """
    if not fault.again and fault.code != "DEADLINE_EXCEEDED":
        raise fault.error from None
    logger.debug("not up: %s", fault.error)
    return Health(live=False)


def read_facts(response: Any, address: str) -> ModelFacts:
    """The facts of a `ModelConfigResponse`.

    Raises:
        ServerError: it has none.
    """
    parameters = response.config.parameters
    if FACTS_PARAMETER not in parameters:
        raise ServerError(
            f"the model {CLIP_MODEL} at {address} does not say what it is (no parameter {FACTS_PARAMETER}); "
            "start the server with lfdm-serve, or fill its repository with lfdm-export --triton",
            "FAILED_PRECONDITION",
        )
    return ModelFacts.from_json(parameters[FACTS_PARAMETER].string_value)

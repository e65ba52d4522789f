"""Dependencies send no telemetry, and leave no identifiers in the user's home folder.

Importing `lfdm_export` calls `turn_off`, which covers everything that the process or its children (the server's models
included) import later. OpenVINO reads no such variable: always import it through `import_openvino`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

#: Variables that turn telemetry off; each package reads its own when it is imported.
VARIABLES = {
    # ONNX Runtime from 1.29 on: a device ID and a database in the cache folder, reports on models and machine.
    "ORT_DISABLE_TELEMETRY": "1",
    # The client of the Hugging Face hub, which transformers, tokenizers and diffusers use.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Gradio, of which `lfdm-web` makes its page: versions, the machine's address, what is on the page.
    "GRADIO_ANALYTICS_ENABLED": "False",
}
#: The package through which OpenVINO reports; OpenVINO works without it.
_OPENVINO_REPORTER = "openvino_telemetry"


def turn_off() -> None:
    """Set the variables; one that the user has set keeps its value."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


def import_openvino() -> Any:
    """Import the module `openvino` as if the reporting package were not installed.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    if "openvino" in sys.modules or _OPENVINO_REPORTER in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[_OPENVINO_REPORTER] = None  # type: ignore[assignment]  # makes `import` fail for this name
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_OPENVINO_REPORTER]

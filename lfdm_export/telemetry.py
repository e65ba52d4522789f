"""Dependencies report to nobody, and leave no identifiers in the user's home.

Importing `lfdm_export` calls `turn_off`, so whatever it or its processes (the server's models among them) import later
is silent. OpenVINO knows no variable: it is imported through `import_openvino` alone.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

#: Variables that turn telemetry off, read when the package is imported.
VARIABLES = {
    # ONNX Runtime from 1.29 on: a device id and a database in the cache folder, reports of models and machine.
    "ORT_DISABLE_TELEMETRY": "1",
    # The client of the Hugging Face hub, which transformers, tokenizers and diffusers use.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Gradio, of which `lfdm-web` makes its page: versions, the machine's address, what is on the page.
    "GRADIO_ANALYTICS_ENABLED": "False",
}
#: The package through which OpenVINO reports; it does without where there is none.
_OPENVINO_REPORTER = "openvino_telemetry"


def turn_off() -> None:
    """Set the variables, but for those that the user has set: who wants to report may."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


def import_openvino() -> Any:
    """The module `openvino`, imported as if the package that reports were not installed.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    if "openvino" in sys.modules or _OPENVINO_REPORTER in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[_OPENVINO_REPORTER] = None  # type: ignore[assignment]  # how `import` is told that there is none
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_OPENVINO_REPORTER]

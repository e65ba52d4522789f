"""The key of an OpenVINO entry in `lfdm_export.engines.compiled_cache`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lfdm_export.machine import package_versions, processor_facts


def cache_key(graph: bytes, weights: Mapping[str, NDArray[np.uint8]], options: Mapping[str, object]) -> str:
    """SHA-256 of everything that determines the compiled code.

    Args:
        graph: the graph, or a digest of it.
        weights: files of weights, by name.
        options: options of the compiler.
    """
    digest = hashlib.sha256()
    facts = {
        "options": {name: str(value) for name, value in sorted(options.items())},
        "versions": package_versions(("openvino", "lfdm-export")),
        "processor": processor_facts(),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, data in sorted(weights.items()):
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data.data)
    digest.update(graph)
    return digest.hexdigest()

"""What the processor, and variables that limit it, let the tests run."""

from __future__ import annotations

import pytest

from lfdm_export.engines.openvino.target import OPENVINO
from lfdm_export.engines.targets import this_machine


def _needs_openvino(precision: str) -> pytest.MarkDecorator:
    reason = OPENVINO.lacking("run", precision, this_machine())
    return pytest.mark.skipif(bool(reason), reason=reason)


needs_openvino = _needs_openvino("fp32")
needs_openvino_int8 = _needs_openvino("int8")

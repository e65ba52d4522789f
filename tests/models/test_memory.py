"""Freed memory is kept for the next tensors, where the C library is glibc."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from pathlib import Path
import numpy
from lfdm_models.memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
block = numpy.ones(64 << 20, numpy.uint8)
held = resident() - before
del block
print((resident() - before) / held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0.9, 1.1), ("default", -0.1, 0.1)])
def test_a_freed_block_is_kept_only_on_request(how, least, most):
    """The default shows that the measurement tells the two apart."""
    found = subprocess.run([sys.executable, "-c", _PROGRAM, how], check=True, capture_output=True, text=True).stdout
    assert least <= float(found) <= most

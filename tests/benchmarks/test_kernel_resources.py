"""What the program for registers and spills reads of the assembler, and the table that it makes."""

from __future__ import annotations

from benchmarks.kernel_resources import Resources, lines, reported

SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'lfdm_x' for 'sm_90a'
ptxas info    : Function properties for lfdm_x
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}
ptxas info    : Compile time = 9.102 ms
"""


def test_registers_spills_and_shared_memory_are_read():
    said = SAID.format(stack=8, stores=12, loads=16, registers=64, shared=", 6144 bytes smem, 380 bytes cmem[0]")
    assert reported(said) == Resources(64, 28, 6144)
    assert reported(SAID.format(stack=0, stores=0, loads=0, registers=8, shared="")) == Resources(8, 0, 0)
    assert reported("nvcc fatal   : Unsupported gpu architecture") is None


def test_spills_stand_in_the_table():
    result = {
        "architectures": ["sm_80", "sm_120"],
        "launches": {"step": {"lfdm_x": 3, "other operators": 5}, "decode": {"other operators": 7}},
        "kernels": {
            "lfdm_x": {
                "sm_80": {"registers": 64, "spills": 28, "shared": 16},
                "sm_120": {"registers": 63, "spills": 0, "shared": 32},
            }
        },
    }
    table = lines(result)
    assert table[2] == "| `lfdm_x` | 3 | – | 64 (28) | 63 | 16/32 |"
    assert "| other operators | 5 | 7 |" in table[3]

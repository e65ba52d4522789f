"""Replaces itself by another program that ends with its parent and whose shared memory no other user can read.

Run as ``python -I -S launch.py PARENT PROGRAM ARGUMENT …``, not imported: the settings must hold before the program's
first instruction, and a fork of a process with threads may only start a program.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
import time

# Source: prctl(2), seccomp(2); linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h.
_PDEATHSIG, _NO_NEW_PRIVILEGES = 1, 38
#: SECCOMP_SET_MODE_FILTER, and SECCOMP_FILTER_FLAG_SPEC_ALLOW, without which older kernels slow the process down.
_SET_FILTER, _AT_FULL_SPEED = 1, 4
_ALLOW, _PRETEND = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with 0: "done"
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24  # offsets in struct seccomp_data
#: AUDIT_ARCH and the system call numbers of fchmod and seccomp.
_MACHINES = {"x86_64": (0xC000003E, 91, 317), "aarch64": (0xC00000B7, 52, 277)}


def keep_memory_private() -> bool:
    """Make `fchmod` to 0644 do nothing, here and in all descendants; returns whether this kernel supports that.

    Triton's Python backend creates its shared memory with the umask's mode, and then makes it readable for all users
    (Boost's `shared_memory_object`).
    """
    if platform.machine() not in _MACHINES:
        return False
    architecture, fchmod, seccomp = _MACHINES[platform.machine()]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, _ARCHITECTURE),
            (_EQUAL, 0, 5, architecture),
            (_LOAD, 0, 0, _NUMBER),
            (_EQUAL, 0, 3, fchmod),
            (_LOAD, 0, 0, _SECOND_ARGUMENT),
            (_EQUAL, 0, 1, 0o644),
            (_RETURN, 0, 0, _PRETEND),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    instructions = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return bool(libc.syscall(seccomp, _SET_FILTER, _AT_FULL_SPEED, ctypes.create_string_buffer(header)) == 0)


def leave_guard() -> None:
    """Fork a process that ends this process group as soon as this process has ended.

    Model processes check for that themselves, but not during a call that holds Python's lock.
    """
    program = os.getpid()
    if os.getpgrp() == program and os.fork() == 0:
        while os.getppid() == program:
            time.sleep(0.05)  # a server is started again when all its processes have ended
        os.killpg(program, signal.SIGKILL)


def main() -> None:
    """Arrange to end with the parent, keep files private, and execute the program."""
    parent, program, *arguments = sys.argv[1:]
    os.umask(0o077)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, int(signal.SIGKILL))
        keep_memory_private()
    if os.getppid() != int(parent):  # the parent has already ended
        sys.exit(1)
    leave_guard()
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()

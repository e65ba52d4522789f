"""Compiles a module with PyTorch for this machine."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import lfdm_export
import lfdm_models
from lfdm_export.engines.compiled_cache import CompiledCache
from lfdm_export.errors import EngineError, InputError
from lfdm_export.files.digests import json_digest
from lfdm_export.machine import package_versions, processor_facts
from lfdm_models.wording import first_line

logger = logging.getLogger(__name__)

#: Takes the inputs of a module, with exactly the shapes that it was compiled for, and returns its outputs.
Program: TypeAlias = Callable[..., tuple[Tensor, ...]]
#: Sets how the modules are compiled: one of `MODES`.
VARIABLE = "LFDM_TORCH_COMPILE"
#: "aot": ahead of time by AOTInductor, kept in the user cache, the default on a CPU and not available on a GPU,
#: where such a program has crashed the process (PyTorch 2.11, an H200); "jit": by torch.compile, traced again in each
#: process (Inductor has its own cache of kernels), the default on a GPU; "0": not compiled, slower, needs no compiler.
MODES = ("aot", "jit", "0")
# Maximum number of shapes per module and process; torch.compile gives up beyond it.
_MOST_SHAPES = 64
# The source code of the modules; other code may compile to another program.
_SOURCES = (
    (Path(lfdm_export.__file__).parent, ("ops", "rewrite")),
    (Path(lfdm_models.__file__).parent, ("",)),
)


def mode(device: torch.device) -> str:
    """One of `MODES`: from the environment, else the default of the device.

    Raises:
        InputError: the environment holds another value.
    """
    said = os.environ.get(VARIABLE, "jit" if device.type == "cuda" else "aot")
    if said not in MODES:
        raise InputError(f"{VARIABLE} is {said!r}, expected {', '.join(MODES)}")
    if (said, device.type) == ("aot", "cuda"):
        raise InputError(f"{VARIABLE} is 'aot', which has crashed on GPUs; expected 'jit' or '0' there")
    return said


def make_program(
    module: nn.Module,
    examples: Sequence[Tensor],
    *,
    name: str,
    identity: Mapping[str, object],
    cache: CompiledCache | None,
) -> Program:
    """Compile a module for inputs like the examples, or load the program from the cache.

    Args:
        module: in eval mode, on the device of the examples.
        examples: one per input; the program fixes their shapes and dtypes.
        name: name of the program, for messages and the cache.
        identity: what determines the program besides code, shapes, versions and machine, such as the weights.
        cache: the cache to use; None compiles each time.

    Returns:
        The program; see `MODES`.

    Raises:
        EngineError: PyTorch cannot compile the module here.
    """
    how = mode(examples[0].device)
    if how == "0":
        return _in_tuples(module)
    if how == "jit":
        return _by_torch_compile(module, name)
    key = _key(examples, {"name": name, **identity})
    blob = None if cache is None else cache.read(name, key)
    with tempfile.TemporaryDirectory(prefix="lfdm-export-") as folder:
        package = Path(folder) / f"{name}.pt2"
        if blob is not None:
            package.write_bytes(blob)
        else:
            logger.info("PyTorch compiles %s for this machine, once", name)
            _compile(module, tuple(examples), package, name)
            if cache is not None:
                cache.write(name, key, package.read_bytes())
        runner = torch._inductor.aoti_load_package(str(package))

    return _in_tuples(runner)


def _by_torch_compile(module: nn.Module, name: str) -> Program:
    # Full graph: a part that cannot be compiled is an error, as is one shape too many; neither may run slowly instead.
    function = _in_tuples(torch.compile(module, dynamic=False, fullgraph=True))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            try:
                return function(*inputs)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                raise _cannot_compile(name, error) from error

    return run


def _in_tuples(function: Callable[..., Any]) -> Program:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = function(*inputs)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    return run


def _compile(module: nn.Module, examples: tuple[Tensor, ...], package: Path, name: str) -> None:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its internals
            program = torch.export.export(module, examples, strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    except Exception as error:  # errors of compilers share no base
        raise _cannot_compile(name, error) from error


def _cannot_compile(name: str, error: Exception) -> EngineError:
    return EngineError(
        f"PyTorch cannot compile {name} here: {first_line(error)}; it needs a C++ compiler (Debian: apt-get install "
        f"g++) and, on a GPU, Triton, which comes with PyTorch for CUDA; {VARIABLE}=0 runs it uncompiled, slower"
    )


def _key(examples: Sequence[Tensor], identity: Mapping[str, object]) -> str:
    """SHA-256 of everything that determines the program."""
    facts: dict[str, Any] = {
        **{name: str(value) for name, value in sorted(identity.items())},
        "inputs": [(str(tensor.dtype), tuple(tensor.shape), tensor.stride()) for tensor in examples],
        "versions": package_versions(("lfdm-export", "torch")),
        "sources": _sources(),
        "processor": processor_facts(),
    }
    return json_digest(facts)


@functools.cache
def _sources() -> str:
    """SHA-256 of the code of the modules, so that a change of it never loads an older program."""
    digest = hashlib.sha256()
    for root, folders in _SOURCES:
        for folder in folders:
            files = (root / folder).rglob("*") if folder else root.glob("*.py")
            for path in sorted(path for path in files if path.suffix in (".py", ".cuh")):
                digest.update(f"{path.relative_to(root)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()

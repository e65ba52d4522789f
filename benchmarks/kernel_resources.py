"""Registers, spills and shared memory of our CUDA kernels by architecture, and their launches per step: no GPU needed.

    python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.json

Kernels and launches are those of one step (guidance 1) and one `decode` of the published size in fp16, as target torch
runs them: the modules run on the CPU on small pictures, which changes no launch, with kernels that only count. The
other operators are counted as PyTorch calls them, before torch.compile joins them. nvcc then builds each kernel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfdm_export.ops.cuda.source import Kernel, Launch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
#: Frames of the published clip, and the side of the small pictures.
FRAMES, SIDE = 40, 32
_USED = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)$",
    re.DOTALL | re.MULTILINE,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    Attributes:
        registers: registers per thread.
        spills: bytes of spilled registers per thread, stores and loads together.
        shared: bytes of shared memory per block.
    """

    registers: int
    spills: int
    shared: int


class Counting:
    """In place of the host build: notes which kernels are launched, and computes nothing."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    def run(self, name: str, launch: Launch[int], inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Count a launch."""
        del launch, inputs, outputs
        self.launches[name] += 1


def count_launches() -> tuple[dict[str, Counter[str]], list[Kernel]]:
    """Launches by stage: of our kernels by name, and "other operators"; and the kernels."""
    import torch

    from lfdm_export.engines.pytorch.interfaces import PictureDecode
    from lfdm_export.ops.cuda import dispatch, launcher
    from lfdm_export.rewrite.precision import channels_last, in_precision
    from lfdm_export.rewrite.stage_modules import stage_modules
    from lfdm_export.stages import Geometry, stage_specs
    from lfdm_models.config import DmConfig, LfaeConfig, LfdmConfig
    from lfdm_models.diffusion import Diffusion
    from lfdm_models.lfae import Lfae
    from lfdm_models.model import LfdmModel

    config = LfdmConfig(LfaeConfig(), DmConfig())
    model = LfdmModel(config, Lfae(config.lfae).eval(), Diffusion(config.dm).eval())
    modules = in_precision(stage_modules(model, FRAMES), torch.float16)
    channels_last(modules)
    geometry = Geometry(SIDE, SIDE // 4, FRAMES, FRAMES, (64, 128, 256), config.dm.width, config.dm.text_width)
    kernels: dict[str, Kernel] = {}
    real = launcher.launch

    def noted(kernel: Kernel, *arguments: Any) -> None:
        kernels[kernel.name] = kernel
        real(kernel, *arguments)

    found = {}
    operators = ("final_conv", "group_norm_silu", "linear_attention", "temporal_attention", "thresholded_step", "warp")
    for operator in operators:
        setattr(importlib.import_module(f"lfdm_export.ops.{operator}.gpu"), "launch", noted)  # noqa: B010
    for stage, run in (("step", modules["step"]), ("decode", PictureDecode(modules["decode"]))):  # type: ignore[arg-type]
        given = stage_specs(geometry)[stage].inputs
        inputs = [torch.zeros(one.concrete(batch=1), dtype=getattr(torch, one.dtype)) for one in given]
        if stage == "decode":  # the encoder's outputs have the dtype of the weights
            inputs[1:-1] = [skip.half().to(memory_format=torch.channels_last) for skip in inputs[1:-1]]
        counting = Counting()
        with torch.no_grad(), dispatch.standing_in(counting), _operators() as others:  # type: ignore[arg-type]
            run(*inputs)
        found[stage] = counting.launches + Counter({"other operators": others.count})
    return found, list(kernels.values())


def _operators() -> Any:
    """A context that counts the operators of PyTorch that compute: views and allocations launch nothing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, operator: Any, types: Any, arguments: Any = (), options: dict[str, Any] | None = None
        ) -> Any:
            result = operator(*arguments, **(options or {}))
            made = operator.namespace == "aten" and not operator.is_view and "empty" not in str(operator)
            self.count += int(made and not _same_memory(result, arguments))
            return result

    return Operators()


def _same_memory(result: Any, arguments: Sequence[Any]) -> bool:
    """Whether an operator such as `reshape` returned its input's memory unchanged."""
    import torch

    first = arguments[0] if arguments else None
    if not isinstance(result, torch.Tensor) or not isinstance(first, torch.Tensor):
        return False
    return result is not first and result.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def build(kernel: Kernel, architecture: str, folder: Path) -> Resources:
    """Build a kernel with nvcc, with the options of NVRTC.

    Raises:
        RuntimeError: nvcc fails, or reports nothing.
    """
    from lfdm_export.ops.cuda.nvrtc import OPTIONS
    from lfdm_export.ops.cuda.source import ROOT

    source = folder / f"{kernel.name}.cu"
    source.write_text(kernel.text, encoding="utf-8")
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", *OPTIONS, f"-I{ROOT}", str(source)]
    done = subprocess.run([*command, "-o", str(folder / "cubin")], capture_output=True, text=True, check=False)
    found = reported(done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"nvcc failed for {kernel.name} on {architecture}: {done.stderr[-500:]}")
    return found


def reported(text: str) -> Resources | None:
    """What the verbose assembler says of one kernel; None if it says nothing."""
    used = _USED.search(text)
    if used is None:
        return None
    shared = _SHARED.search(used[5])
    return Resources(int(used[4]), int(used[2]) + int(used[3]), int(shared[1]) if shared else 0)


def compiler() -> str:
    """The version of nvcc."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release \S+, V(\S+)", said)
    return found[1] if found else said


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a table in Markdown."""
    header = "| kernel | launches: step | decode | " + " | ".join(result["architectures"]) + " | shared, bytes |"
    table = [header, "|" + "---|" * (header.count("|") - 1)]
    for name, resources in result["kernels"].items():
        counts = [str(result["launches"][stage].get(name, "–")) for stage in ("step", "decode")]
        each = [f"{one['registers']}" + (f" ({one['spills']})" if one["spills"] else "") for one in resources.values()]
        shared = "/".join(str(size) for size in dict.fromkeys(one["shared"] for one in resources.values()))
        table.append(f"| `{name}` | {' | '.join([*counts, *each, shared])} |")
    others = [str(result["launches"][stage]["other operators"]) for stage in ("step", "decode")]
    return [*table, f"| other operators | {' | '.join(others)} |{' |' * (len(ARCHITECTURES) + 1)}"]


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    from lfdm_export.files.atomic import write_file
    from lfdm_export.ops.pictures.kernels import not_finite_kernel, pictures_kernel
    from lfdm_export.ops.thresholded_step.kernels import noise_kernel

    launches, kernels = count_launches()
    kernels += [noise_kernel(), pictures_kernel(), not_finite_kernel()]
    with tempfile.TemporaryDirectory() as folder:
        built = {one.name: {name: asdict(build(one, name, Path(folder))) for name in ARCHITECTURES} for one in kernels}
    result = {
        "date": date.today().isoformat(),
        "nvcc": compiler(),
        "architectures": ARCHITECTURES,
        "launches": launches,
        "kernels": built,
    }
    write_file(arguments.out, json.dumps(result, indent=1).encode())
    print("\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

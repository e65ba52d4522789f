"""Targets of the GPU suite's measurements, and whether they are met; times are multiples of the floor."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_floors import clip_floors
from benchmarks.gpu_records import Record

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """The target of a measurement.

    Attributes:
        bound: the value to reach.
        largest: whether `bound` is the largest acceptable value, not the smallest.
    """

    bound: float
    largest: bool = False

    def met(self, value: float) -> bool:
        """Whether a measured value meets the target."""
        return value <= self.bound if self.largest else value >= self.bound


_WARP_SPEED_UP = "WarpBlend, × PyTorch's operators"
_WARP_SHARE = "WarpBlend, share of copy bandwidth"
_CLIP = "clip end to end at batch 1, fp16 compiled, × floor"
#: Milliseconds, by the part that measures them.
_MILLISECONDS = {
    "ours-fp16-compiled": "clip end to end at batch 1, fp16 compiled, ms",
    "product-fp16": "clip end to end at batch 1, target torch in fp16, ms",
}
_MATRIX_SHARE = "share of the matrix rate at the best batch, fp16"
_PSNR = {"fp16": "PSNR of fp16 frames, dB", "bf16": "PSNR of bf16 frames, dB"}

TARGETS = {
    _WARP_SPEED_UP: Target(3.0),
    _WARP_SHARE: Target(0.6),
    _CLIP: Target(10.0, largest=True),
    **dict.fromkeys(_MILLISECONDS.values(), Target(30.0, largest=True)),
    _MATRIX_SHARE: Target(0.25),
    _PSNR["fp16"]: Target(40.0),
    _PSNR["bf16"]: Target(34.0),
}


def verdicts(result: Record) -> Record:
    """Measured value and verdict per target; "not measured" if there is no value, or in a trial run."""
    settings = result["settings"]
    trial = settings["device"] != "cuda" or settings["tiny"]
    found = {} if trial else _measured(_data(result))
    return {
        name: {
            "target": f"{'at most' if target.largest else 'at least'} {target.bound:g}",
            "measured": found.get(name, NOT_MEASURED),
            "met": target.met(found[name]) if name in found else NOT_MEASURED,
        }
        for name, target in TARGETS.items()
    }


def floors(result: Record) -> dict[str, float]:
    """Floors of "step", "decode" and "clip" in fp16, in seconds; empty if the GPU's rates or the work are unknown."""
    data = _data(result)
    ceilings, work = data.get("ceilings", {}), data.get("ours-fp16", {}).get("work", {})
    if not {"matrix_product", "copy"} <= ceilings.keys() or not {"step", "decode"} <= work.keys():
        return {}
    steps = 2 if result["settings"]["tiny"] else 10
    return clip_floors(ceilings, work, "fp16", steps)


def _data(result: Record) -> Record:
    return {name: part.get("data") or {} for name, part in result["parts"].items()}


def _measured(data: Record) -> dict[str, float]:
    found: dict[str, float] = {}
    ceilings = data.get("ceilings", {})
    # Whole maps of the decoder's sizes, all frames of a clip; the best of both layouts, the worst of sizes and types.
    whole = [one for name, one in data.get("warp", {}).items() if "40 frames" in name and "phase" not in name]
    forms = ("planar", "channels_last")
    if whole:
        found[_WARP_SPEED_UP] = min(max(one[form]["times_pytorch"] for form in forms) for one in whole)
        if "copy" in ceilings:
            slowest = min(max(one[form]["bytes_per_second"] for form in forms) for one in whole)
            found[_WARP_SHARE] = slowest / ceilings["copy"]["bytes_per_second"]
    floor = floors({"settings": {"tiny": False}, "parts": {name: {"data": one} for name, one in data.items()}})
    compiled = data.get("ours-fp16-compiled", {}).get("end_to_end")
    if floor and compiled:
        found[_CLIP] = compiled["median"] / floor["clip"]
    product = data.get("product-fp16", {}).get("1", {})
    for name, whole in (("ours-fp16-compiled", compiled), ("product-fp16", product.get("end_to_end"))):
        if whole:
            found[_MILLISECONDS[name]] = 1e3 * whole["median"]
    share = _matrix_share(data)
    if share is not None:
        found[_MATRIX_SHARE] = share
    for name, parts in {
        "fp16": ("ours-fp16-compiled", "ours-fp16"),
        "bf16": ("ours-bf16-compiled", "ours-bf16"),
    }.items():
        parities = [data.get(part, {}).get("parity") for part in parts]
        parities += [product] if name == "fp16" and "psnr" in product else []
        measured = [one["psnr"] for one in parities if isinstance(one, dict) and isinstance(one["psnr"], float)]
        if measured:
            found[_PSNR[name]] = min(measured)
    return found


def _matrix_share(data: Record) -> float | None:
    """A step's share of the rate of a large matrix product, at the best batch size."""
    rate = data.get("ceilings", {}).get("matrix_product", {}).get("fp16", {}).get("flops_per_second")
    flops = data.get("ours-fp16", {}).get("work", {}).get("step", {}).get("flops")
    batches = [*data.get("batches-fp16", {}).items(), *data.get("batches-fp16-compiled", {}).items()]
    if not (rate and flops and batches):
        return None
    share: float = max(int(batch) * flops / times["step"]["median"] for batch, times in batches) / rate
    return share

"""What the GPU suite's measurements are to show, and whether they do."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
#: What the measurements are to show: name -> smallest value.
TARGETS = {
    "WarpBlend, times PyTorch's operators": 3.0,
    "WarpBlend, share of copy bandwidth": 0.6,
    "clip at batch 1, times faithful eager float32": 8.0,
    "share of the matrix-product rate at the best batch": 0.4,
    "PSNR of fp16 frames, dB": 40.0,
    "PSNR of bf16 frames, dB": 34.0,
}
_NOT_MEASURED = "not measured"


def verdicts(result: Record) -> Record:
    """What was measured of each target, and whether it is met; "not measured" where it was not, or in a trial run."""
    data = {name: part.get("data") or {} for name, part in result["parts"].items()}
    trial = result["settings"]["device"] != "cuda" or result["settings"]["size"] != "full"
    found = {} if trial else _measured(data)
    return {
        name: {
            "target": target,
            "measured": found.get(name, _NOT_MEASURED),
            "met": found[name] >= target if name in found else _NOT_MEASURED,
        }
        for name, target in TARGETS.items()
    }


def _measured(data: Record) -> dict[str, float]:
    names = list(TARGETS)
    found: dict[str, float] = {}
    # Whole maps of the decoder's sizes, all frames of a clip; the better of both layouts, the worst of sizes and types.
    whole = [one for name, one in data.get("warp_speed", {}).items() if "40 frames" in name and "phase" not in name]
    forms = ("planar", "channels_last")
    if whole:
        found[names[0]] = min(max(one[form]["times_pytorch"] for form in forms) for one in whole)
        copy = data.get("ceilings", {}).get("copy", {}).get("bytes_a_second")
        if copy:
            found[names[1]] = min(max(one[form]["bytes_a_second"] for form in forms) for one in whole) / copy
    ways = {**data.get("clip", {}), **data.get("compiled", {})}
    ours = [one["clip"]["median"] for name, one in ways.items() if name.startswith("ours") and "clip" in one]
    faithful = ways.get("faithful fp32", {}).get("clip")
    if ours and faithful:
        found[names[2]] = faithful["median"] / min(ours)
    shares = []
    for dtype in ("fp16", "bf16"):
        ceiling = data.get("ceilings", {}).get("matrix_product", {}).get(dtype, {}).get("flops_a_second")
        by_batch = data.get("batches", {}).get(f"ours {dtype}", {}).values()
        shares += [one["flops_a_second"] / ceiling for one in by_batch if ceiling and "flops_a_second" in one]
    if shares:
        found[names[3]] = max(shares)
    for name, dtype in ((names[4], "fp16"), (names[5], "bf16")):
        psnr = data.get("parity", {}).get(dtype, {}).get("psnr")
        if psnr is not None:
            found[name] = psnr
    return found

"""Features of clips by a network that the user brings as a TorchScript file, such as I3D.

Source: Unterthiner et al., Towards Accurate Generative Models of Video (arXiv 1812.01717), for the distance of these
features (FVD); Carreira and Zisserman, Quo Vadis, Action Recognition? (arXiv 1705.07750), for I3D.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.files.digests import sha256_and_size
from lfdm_export.wording import one_line
from lfdm_models.training.devices import choose_device
from lfdm_models.training.settings import Device

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]

#: Pixels per side of the network's input.
SIDE = 224
# Arguments by which the common I3D file turns its own scaling off and returns logits, where `forward` has them.
_OPTIONS = {"rescale": False, "resize": False, "return_features": True}


@dataclass(frozen=True)
class VideoFeatures:
    """A network of the form (B, 3, T, 224, 224) float32 in [-1, 1] -> (B, F).

    Attributes:
        path: its file.
        sha256: SHA-256 of the file.
        network: the network, in eval mode.
        options: arguments of its `forward` besides the clips.
        device: where it runs.
    """

    path: Path
    sha256: str
    network: torch.jit.ScriptModule
    options: dict[str, bool]
    device: torch.device

    @classmethod
    def load(cls, path: Path, device: Device = "auto") -> VideoFeatures:
        """Load a TorchScript file. It holds code, which runs here: load only files that you trust.

        Raises:
            InputError: the file does not exist, is not TorchScript, or takes other arguments than clips and those of
                `i3d_torchscript.pt` (rescale, resize, return_features).
            lfdm_models.training.errors.TrainingError: the device is not available.
        """
        if not path.is_file():
            raise InputError(f"{path} does not exist; give the TorchScript file of I3D")
        where = choose_device(device)
        try:
            network = torch.jit.load(str(path), map_location=where).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(
                f"{path} cannot be read as TorchScript ({one_line(error, 120)}); give a file of torch.jit.save, "
                "not one of weights alone"
            ) from error
        _, clips, *others = network.forward.schema.arguments
        missing = [one.name for one in others if one.name not in _OPTIONS and not one.has_default_value()]
        if missing:
            raise InputError(
                f"forward of {path} also needs {', '.join(missing)}, expected ({clips.name}) alone or with "
                f"{', '.join(_OPTIONS)}; save it with these as constants"
            )
        options = {one.name: _OPTIONS[one.name] for one in others if one.name in _OPTIONS}
        return cls(path, sha256_and_size(path)[0], network, options, where)

    @torch.no_grad()
    def __call__(self, clips: UInt8Array) -> Float32Array:
        """Clips (B, T, H, W, 3) uint8, RGB -> features (B, F).

        Pictures are scaled to 224 x 224, bilinearly without corner alignment, and to [-1, 1].

        Raises:
            InputError: the network fails on such clips, or returns anything but finite (B, F).
        """
        batch, frames = clips.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(clips)).to(self.device).flatten(0, 1).permute(0, 3, 1, 2)
        scaled = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        values = (scaled / 127.5 - 1).unflatten(0, (batch, frames)).transpose(1, 2).contiguous()
        try:
            found = self.network(values, **self.options)
        except RuntimeError as error:
            # The last lines of TorchScript's report name the failed operator.
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
            raise InputError(
                f"{self.path} fails on clips of {frames} frames, {tuple(values.shape)} ({reason}); "
                "give a network for such clips"
            ) from error
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != batch:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(
                f"{self.path} returns {shape} for {batch} clips, expected one row of features per clip, ({batch}, F)"
            )
        if not torch.isfinite(found).all():
            raise InputError(f"{self.path} returns features that are not finite; it is not fit for these clips")
        features: Float32Array = found.float().cpu().numpy()
        return features

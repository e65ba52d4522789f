"""The convolutional part of VGG-19, under the names of torchvision's state dict.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks (arXiv 1409.1556), configuration E.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lfdm_models.stored_files import TorchFile
from lfdm_models.training.errors import TrainingError
from lfdm_models.wording import first_line

# Convolutions per block; 2x2 max-pooling separates the blocks.
_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
# ImageNet's mean and standard deviation of red, green and blue, with which the weights were trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Vgg19(nn.Module):
    """An image -> activations after the first convolution of each of the five blocks."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        channels = 3
        for index, (width, convolutions) in enumerate(_BLOCKS):
            # Only the first convolution of the last block is needed.
            for conv in range(convolutions if index < len(_BLOCKS) - 1 else 1):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
                if conv == 0:
                    self.taps.append(len(layers) - 1)
            if index < len(_BLOCKS) - 1:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vgg19:
        """Load torchvision's weights (``vgg19-….pth``) without the classifier in them.

        Args:
            path: a state dict of torch.save. No code in it is run.

        Raises:
            TrainingError: the file cannot be read, or is not a VGG-19.
        """
        network = cls()
        try:
            TorchFile(Path(path))  # checks the sizes in the file before torch allocates memory
            state = torch.load(Path(path), map_location="cpu", weights_only=True)
        except OSError as error:
            raise TrainingError(f"the weights of VGG-19 cannot be read: {path}: {error.strerror or error}") from error
        except Exception as error:  # torch raises many types for other files
            raise TrainingError(
                f"{path} is not a state dict of VGG-19 ({first_line(error)}); give torchvision's vgg19.pth"
            ) from error
        own = network.state_dict()
        found = {key: value for key, value in state.items() if key in own} if isinstance(state, dict) else {}
        wrong = [key for key, value in own.items() if key not in found or found[key].shape != value.shape]
        if wrong:
            raise TrainingError(
                f"{path} is not a state dict of VGG-19: {wrong[0]} is missing or of another shape; "
                "give torchvision's vgg19.pth"
            )
        network.load_state_dict(found)
        return network.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> five activations, or fewer if the image is too small for all poolings."""
        x = (image - self.mean) / self.std
        found = []
        for index, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d) and min(x.shape[-2:]) < 2:
                break
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found

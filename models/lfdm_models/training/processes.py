"""Processes that train together, each with its own examples: as many as ``accelerate launch`` starts.

Gradients are averaged over them in every step; all keep the same weights, and the first process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lfdm_models.training.devices import choose_device
from lfdm_models.training.errors import TrainingError


class Processes:
    """This process among those of a run.

    Attributes:
        count: number of processes.
        rank: index of this process, from 0.
        device: its device.
    """

    def __init__(self, device: str) -> None:
        """Connect to the other processes, if a launcher started this one.

        Args:
            device: "auto", "cpu" or "cuda"; each of several processes takes its own GPU.

        Raises:
            TrainingError: the device is not available, or there are several processes and accelerate is not installed.
        """
        self._accelerator: Any = None
        self.count, self.rank, self.device = 1, 0, choose_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return
        try:
            from accelerate import Accelerator
        except ImportError:
            raise TrainingError(
                "several processes were launched, which needs accelerate: pip install 'lfdm-export[multi-gpu]'"
            ) from None
        # The loop itself handles mixed precision.
        self._accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
        self.count, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        self.device = self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors on one device by their means over all processes."""
        if self._accelerator is None or not tensors:
            return
        flat = self._accelerator.reduce(torch.cat([tensor.flatten().float() for tensor in tensors]), reduction="mean")
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def any(self, here: bool) -> bool:
        """Whether `here` is true in any process."""
        if self._accelerator is None:
            return here
        flag = torch.tensor([float(here)], device=self.device)
        return bool(self._accelerator.reduce(flag, reduction="sum").item() > 0)

    def wait(self) -> None:
        """Wait for all processes."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

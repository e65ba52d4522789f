"""Networks compute where their weights are: a CUDA graph cannot record copies from the host."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfdm_models.attention import RelativePositionBias
from lfdm_models.model import LfdmModel


class OnMetaAlone(TorchDispatchMode):
    """Refuses operators that give tensors of another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(t.device.type == "meta" for t in tree_leaves(out) if isinstance(t, Tensor)), func
        return out


def test_a_clips_networks_take_nothing_from_the_host(small_model: LfdmModel) -> None:
    unet = copy.deepcopy(small_model.diffusion.denoise_fn).to("meta")
    generator = copy.deepcopy(small_model.lfae).to("meta").generator
    config = small_model.config
    with torch.device("meta"):
        image, latent = torch.empty(1, 3, 64, 64), torch.empty(1, 3, 4, 16, 16)
        text, timestep = torch.empty(1, config.dm.text_width), torch.empty(1, dtype=torch.int64)
    with OnMetaAlone(), torch.no_grad():
        *_, feature = generator.encode(image)
        noise = unet(latent, feature, text, timestep)
    assert noise.shape == latent.shape


@pytest.mark.parametrize("buckets", [4, 6, 16, 32, 128])
def test_buckets_are_those_of_the_published_formula(buckets: int) -> None:
    frames, half = 200, buckets // 2
    exact = half // 2
    size = torch.arange(frames)
    # In float32, as published: distance 16 of 32 buckets lands on 12.
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(4) * (half - exact)
    wanted = torch.where(size < exact, size, (exact + ratio.long()).clamp(max=half - 1))
    found = RelativePositionBias(buckets, 2).bucket(frames)
    assert torch.equal(found[:, 0], wanted)  # queries after the key
    assert torch.equal(found[0, 1:], wanted[1:] + half)  # keys after the query

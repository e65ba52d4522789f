"""The deployable modules of a model, one for each stage of `lfdm_export.stages`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfdm_export.ops.thresholded_step.reference import thresholded_step
from lfdm_export.rewrite.lfae import Decode, fold_batch_norms
from lfdm_export.rewrite.unet import DeployableUnet, context_half
from lfdm_models.lfae import Lfae, flow_to_latent
from lfdm_models.model import LfdmModel


class Encode(nn.Module):
    """Image -> skips, feature, and the UNet's response to the feature."""

    def __init__(self, folded: Lfae, init_conv: nn.Conv3d) -> None:
        super().__init__()
        self.generator = folded.generator
        self.context = context_half(init_conv)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) in [0, 1] -> skips (full size first), feature, context."""
        outputs = self.generator.encode(image.to(self.context.weight.dtype))
        return (*outputs, self.context(outputs[-1]))


class Denoise(nn.Module):
    """One evaluation of the UNet, with classifier-free guidance if the UNet is `guided`."""

    def __init__(self, unet: DeployableUnet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        noisy_latent: Tensor,
        context: Tensor,
        text_embedding: Tensor,
        timestep: Tensor,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """-> predicted noise (B, 3, T, h, w)."""
        predicted_noise: Tensor = self.unet(noisy_latent, context, text_embedding, timestep, guidance_scale)
        return predicted_noise


class Step(nn.Module):
    """One sampling step for either evaluation: UNet, thresholding, sampler update."""

    def __init__(self, denoise: Denoise) -> None:
        super().__init__()
        self.denoise = denoise

    def forward(self, noisy_latent: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            noisy_latent: (B, 3, T, h, w).
            inputs: the evaluation's other inputs, then history, noise and coefficients.

        Returns:
            Predicted noise and next latent, (B, 3, T, h, w) each, and next history (B, 2, 3, T, h, w). The
            stage `step` is the last two; the stage `denoise` computes the first.
        """
        *condition, history, noise, coefficients = inputs
        predicted = self.denoise(noisy_latent, *condition)
        return predicted, *thresholded_step(noisy_latent, predicted, history, noise, coefficients)


class EstimateMotion(nn.Module):
    """The LFAE's own motion estimation: two images -> the latent between them."""

    def __init__(self, folded: Lfae, *, residual_flow: bool) -> None:
        super().__init__()
        self.lfae = folded
        self.residual_flow = residual_flow

    def forward(self, image: Tensor, driving: Tensor) -> Tensor:
        """Source and driving image (B, 3, H, W) -> latent (B, 3, h, w)."""
        return flow_to_latent(self.lfae.estimate_motion(image, driving), residual_flow=self.residual_flow)


def stage_modules(model: LfdmModel, frames: int) -> dict[str, nn.Module]:
    """The deployable modules of `model` in eval mode, by stage name; `text` has its own encoder.

    The UNet's four stages share their weights.

    Args:
        model: both networks.
        frames: T.
    """
    with torch.no_grad():
        folded = fold_batch_norms(model.lfae)
        unet = model.diffusion.denoise_fn
        plain = Denoise(DeployableUnet(unet, frames))
        guided = Denoise(DeployableUnet(unet, frames, guided=True))
        residual = model.config.residual_flow
        modules: dict[str, nn.Module] = {
            "encode": Encode(folded, unet.init_conv),
            "denoise": plain,
            "denoise_guided": guided,
            "step": Step(plain),
            "step_guided": Step(guided),
            "decode": Decode(folded, residual_flow=residual),
            "estimate_motion": EstimateMotion(folded, residual_flow=residual),
        }
    return {name: module.eval() for name, module in modules.items()}

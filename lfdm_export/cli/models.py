"""The options that select a model, and the loading of this model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lfdm_models.labels import DATASETS

if TYPE_CHECKING:
    from lfdm_models.model import LfdmModel

#: The small trained model shipped with the package.
SHIPPED = "characters"
#: A small model with random weights, created on demand.
UNTRAINED = "untrained"


def add_model_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --lfae, --dm, --model, --dataset, --residual-flow and --region-pad."""
    group = parser.add_argument_group("model", purpose)
    group.add_argument("--lfae", metavar="FILE", help="LFAE checkpoint, .pth or .safetensors (RegionMM_*.pth)")
    group.add_argument("--dm", metavar="FILE", help="DM checkpoint, .pth or .safetensors (flowdiff_*.pth)")
    group.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        help=f"a model folder, {SHIPPED!r} (the shipped small trained model) or {UNTRAINED!r} (even smaller)",
    )
    group.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        help="data set of the training: sets labels, preprocessing and --region-pad",
    )
    group.add_argument("--residual-flow", action="store_true", help="the DM was trained on residual flow")
    group.add_argument(
        "--region-pad",
        type=int,
        metavar="N",
        help="padding of the region predictor's last convolution: 3 for MUG, 0 for MHAD and NATOPS",
    )


def check_model_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject invalid combinations: prints the usage and exits with status 2."""
    if (args.lfae is None) != (args.dm is None):
        parser.error("--lfae and --dm belong together: give both, or neither")
    if args.model is not None and args.lfae is not None:
        parser.error("give either --model, or --lfae and --dm")
    if args.lfae is None and (args.residual_flow or args.region_pad is not None):
        parser.error("--residual-flow and --region-pad are for --lfae and --dm; a model folder knows its own")


def open_model(args: argparse.Namespace) -> LfdmModel:
    """Load the selected model; by default, the shipped one.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    if args.lfae is not None:
        from lfdm_export.checkpoints.load import load_model

        return load_model(
            args.lfae,
            args.dm,
            dataset=args.dataset,
            residual_flow=args.residual_flow or None,
            region_pad=args.region_pad,
        )
    if args.model == UNTRAINED:
        from lfdm_models.demo import untrained_model

        return untrained_model()
    from lfdm_export.checkpoints.model_folder import load_model_folder
    from lfdm_models.demo import SHIPPED as SHIPPED_FOLDER

    return load_model_folder(SHIPPED_FOLDER if args.model in (None, SHIPPED) else args.model)

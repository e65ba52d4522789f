"""A tiny bundle for the target torch: random weights, written in a moment, without an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from lfdm_export.bundle.reader import MANIFEST, TORCH_WEIGHTS, Bundle, fingerprint
from lfdm_export.engines.pytorch.weights import write_weights
from lfdm_export.stages import stage_specs
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.model import LfdmModel
from tests.fake_bundle import CONFIG, GEOMETRY, fake_manifest, write_fake_bundle


def write_torch_bundle(target: Path) -> Bundle:
    """Write the bundle. Its graphs are those of the fake bundle: only the target torch runs it."""
    geometry = dataclasses.replace(GEOMETRY, context_channels=CONFIG.dm.width)
    manifest = fake_manifest()
    manifest = dataclasses.replace(manifest, geometry=geometry, stages=tuple(stage_specs(geometry).values()))
    bundle = write_fake_bundle(target, manifest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LfdmModel(CONFIG, Lfae(CONFIG.lfae).eval(), Diffusion(CONFIG.dm).eval())
    write_weights(model, bundle.path / TORCH_WEIGHTS)
    files = {**bundle.manifest.files, TORCH_WEIGHTS: fingerprint(bundle.path / TORCH_WEIGHTS)}
    changed = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return Bundle.open(bundle.path)

"""Outputs of the untouched PyTorch networks, stored in a bundle so that it can be verified without them.

`lfdm_export.reference.pytorch` makes a `Reference`; this module reads and writes it. NumPy only.

To keep the file small, an output of more than MAX_VALUES elements is thinned by `positions`. The encoder's outputs, as
inputs of other stages, are rounded to 256 levels *before* PyTorch receives them, so both sides use the rounded values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import TEXT_STAGE
from lfdm_export.errors import BundleError
from lfdm_export.files.arrays import read_arrays
from lfdm_export.reference.inputs import BATCH_SIZE, DRAWN, chain_table, draw_inputs
from lfdm_export.stages import BATCH, TOKENS, Geometry, StageSpec, TensorSpec
from lfdm_models.config import LfdmConfig
from lfdm_models.schedule import cosine_schedule

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]
Int64: TypeAlias = NDArray[np.int64]

#: Maximum number of values per output in a stored reference.
MAX_VALUES = 65_536
#: Tokens of each text for the stage `text`; longer texts are cut, shorter ones padded.
TOKEN_COUNT = 8
# Values of each drawn input that are stored, to detect a NumPy that draws others.
_PROBES = 16
_WHAT = "reference of a bundle"


@dataclass(frozen=True, eq=False)
class ChainReference:
    """One whole clip: DDIM, guidance 1, noise from `lfdm_export.sampling.noise.noise_for` the reference's seed.

    Attributes:
        image: (H, W, 3) uint8, the reference image.
        embedding: (text_width,) float32.
        latents: (S, 3, T, h, w) float32, after each step.
        frames, warped: (T, H, W, 3) uint8, the whole clip.
        kept: (K,) int64, indices of the frames that are also kept as float32.
        kept_frames, kept_warped: (K, 3, H, W) float32.
    """

    image: UInt8
    embedding: Float32
    latents: Float32
    frames: UInt8
    warped: UInt8
    kept: Int64
    kept_frames: Float32
    kept_warped: Float32


@dataclass(frozen=True, eq=False)
class Reference:
    """Inputs, and the outputs of PyTorch for them.

    Attributes:
        seed: seed of the drawn inputs, of the choice of elements, and of the chain.
        skips: encoder outputs by name, uint8, in units of `units`.
        units: (levels,) float32.
        stored: the other inputs that cannot be drawn: `context`, and tokens if there is a text encoder.
        outputs: by stage and output: values (n,) float32 at `positions`.
        probes: (inputs, 16) float32, some values of each drawn input, in the order of their names.
        chain: one whole clip.
    """

    seed: int
    skips: Mapping[str, UInt8] = field(repr=False)
    units: Float32 = field(repr=False)
    stored: Mapping[str, NDArray[Any]] = field(repr=False)
    outputs: Mapping[str, Mapping[str, Float32]] = field(repr=False)
    probes: Float32 = field(repr=False)
    chain: ChainReference = field(repr=False)

    def inputs(self, config: LfdmConfig, geometry: Geometry) -> dict[str, NDArray[Any]]:
        """Every stage input by tensor name, BATCH_SIZE samples each.

        Raises:
            BundleError: this NumPy draws other numbers than the NumPy that made the reference.
        """
        drawn = draw_inputs(config, geometry, self.seed)
        if not np.allclose(probes(drawn), self.probes, rtol=1e-5, atol=1e-6):
            raise BundleError(
                f"NumPy {np.__version__} draws other numbers than the NumPy that the reference was made with; "
                "install that version (see manifest.json), or verify against the model itself"
            )
        skips = {
            name: from_levels(levels, unit) for (name, levels), unit in zip(self.skips.items(), self.units, strict=True)
        }
        return {**drawn, **skips, **self.stored}

    def save(self, path: Path) -> None:
        """Write an .npz archive."""
        with path.open("wb") as file:
            np.savez_compressed(file, **self._arrays())  # type: ignore[arg-type]  # as in BundleWriter

    @classmethod
    def load(
        cls,
        path: Path,
        config: LfdmConfig,
        geometry: Geometry,
        stages: Mapping[str, StageSpec],
        provenance: Mapping[str, object],
    ) -> Reference:
        """Read the result of `save`.

        Args:
            path: the archive.
            config: architecture of the bundle's networks.
            geometry: sizes of its stages.
            stages: stages of the bundle.
            provenance: of its model.

        Raises:
            BundleError: the archive is damaged, or belongs to another bundle.
            InputError: the provenance is wrong.
        """
        arrays = read_arrays(path, _expected(config, geometry, stages, provenance), _WHAT)
        chain = {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith("chain/")}
        if not np.array_equal(chain["kept"], kept_frames(geometry.frames)):
            raise BundleError(f"{path}: chain/kept names other frames than this program does; export again")
        return cls(
            seed=int(arrays["seed"]),
            skips={t.name: arrays[f"skips/{t.name}"] for t in skip_specs(stages)},
            units=arrays["units"],
            stored={t.name: arrays[f"stored/{t.name}"] for t in stored_specs(stages)},
            outputs={
                stage: {t.name: arrays[f"outputs/{stage}/{t.name}"] for t in spec.outputs}
                for stage, spec in stages.items()
            },
            probes=arrays["probes"],
            chain=ChainReference(**chain),
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The archive's arrays by name."""
        outputs = {
            f"outputs/{stage}/{name}": values for stage, some in self.outputs.items() for name, values in some.items()
        }
        return {
            "seed": np.uint64(self.seed).reshape(()),
            "units": self.units,
            "probes": self.probes,
            **{f"skips/{name}": array for name, array in self.skips.items()},
            **{f"stored/{name}": array for name, array in self.stored.items()},
            **outputs,
            **{f"chain/{name}": array for name, array in vars(self.chain).items()},
        }


def from_levels(levels: UInt8, unit: np.float32) -> Float32:
    """A rounded encoder output in the form that both sides receive."""
    return levels.astype(np.float32) * unit


def positions(seed: int, name: str, size: int, count: int) -> Int64:
    """The elements of a flattened tensor that are kept: a random one from each of `count` equal intervals.

    The k-th is in floor(k size / count) … floor((k + 1) size / count) - 1, at the k-th word of
    ``Philox(key=[seed, crc32(name)])`` modulo the interval's length; the same on every machine.

    Args:
        seed: seed of the reference.
        name: name of the tensor, "STAGE/OUTPUT".
        size: elements of the tensor.
        count: elements to keep, at most `size`; all if equal.

    Returns:
        (count,) int64, increasing.
    """
    if count == size:
        return np.arange(size)
    edges = np.arange(count + 1) * size // count
    words = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], np.uint64)).random_raw(count)
    return edges[:-1] + (words % np.diff(edges).astype(np.uint64)).astype(np.int64)


def thin(seed: int, name: str, values: Float32, limit: int | None = MAX_VALUES) -> Float32:
    """The values of a tensor at `positions`, at most `limit` (None: all); (n,) float32."""
    flat = values.reshape(-1)
    return flat[positions(seed, name, flat.size, flat.size if limit is None else min(flat.size, limit))]


def probes(drawn: Mapping[str, NDArray[Any]]) -> Float32:
    """Some values of each drawn input, evenly spaced, as (inputs, 16) float32 in the order of their names."""
    rows = []
    for name in sorted(drawn):
        flat = drawn[name].reshape(-1)
        rows.append(flat[np.arange(_PROBES) * flat.size // _PROBES])
    return np.stack(rows).astype(np.float32)


def kept_frames(frames: int) -> Int64:
    """Indices of a chain's frames that are kept as float32: first, middle and last."""
    return np.unique(np.array([0, frames // 2, frames - 1], np.int64))


def _expected(
    config: LfdmConfig, g: Geometry, stages: Mapping[str, StageSpec], provenance: Mapping[str, object]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each array of the archive."""
    picture, kept = (g.image_size, g.image_size), len(kept_frames(g.frames))
    steps = chain_table(cosine_schedule(config.dm.training_steps), provenance).steps
    skips, stored = skip_specs(stages), stored_specs(stages)
    outputs = {(stage, t.name): math.prod(_shape(t)) for stage, spec in stages.items() for t in spec.outputs}
    return {
        "seed": ("uint64", ()),
        "units": ("float32", (len(skips),)),
        "probes": ("float32", (len(DRAWN), _PROBES)),
        **{f"skips/{t.name}": ("uint8", _shape(t)) for t in skips},
        **{f"stored/{t.name}": (t.dtype, _shape(t)) for t in stored},
        **{f"outputs/{stage}/{name}": ("float32", (min(n, MAX_VALUES),)) for (stage, name), n in outputs.items()},
        "chain/image": ("uint8", (*picture, 3)),
        "chain/embedding": ("float32", (g.text_width,)),
        "chain/latents": ("float32", (steps, 3, g.frames, g.latent_size, g.latent_size)),
        "chain/frames": ("uint8", (g.frames, *picture, 3)),
        "chain/warped": ("uint8", (g.frames, *picture, 3)),
        "chain/kept": ("int64", (kept,)),
        "chain/kept_frames": ("float32", (kept, 3, *picture)),
        "chain/kept_warped": ("float32", (kept, 3, *picture)),
    }


def skip_specs(stages: Mapping[str, StageSpec]) -> tuple[TensorSpec, ...]:
    """The encoder's outputs for the decoder, full size first, `feature` last."""
    *skips, _context = stages["encode"].outputs
    return tuple(skips)


def stored_specs(stages: Mapping[str, StageSpec]) -> tuple[TensorSpec, ...]:
    """The other stage inputs that cannot be drawn."""
    *_skips, context = stages["encode"].outputs
    return (context, *(stages[TEXT_STAGE].inputs if TEXT_STAGE in stages else ()))


def _shape(tensor: TensorSpec) -> tuple[int, ...]:
    return tensor.concrete(**{BATCH: BATCH_SIZE, TOKENS: TOKEN_COUNT})

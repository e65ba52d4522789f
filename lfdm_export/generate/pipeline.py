"""Make a clip from an image and a label with the engines of a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.engines.targets import AUTO
from lfdm_export.errors import InputError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.generate.arguments import common_batch, condition_name, find_noise, seed_count
from lfdm_export.generate.clip_cache import ClipCache
from lfdm_export.generate.conditions import embed_texts, find_conditions
from lfdm_export.generate.decoding import decode_chunks, decode_clip
from lfdm_export.generate.denoising import denoise, make_whole_clip
from lfdm_export.generate.driving import estimate_motion, prepare_footage
from lfdm_export.generate.encoded import Encoded, encode_images
from lfdm_export.generate.frame_choice import FrameChoice
from lfdm_export.generate.previews import Previews
from lfdm_export.generate.stage_runner import OnEstimate, StageRunner
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import Motion, as_motion
from lfdm_export.pictures.preprocess import ImageLike, prepare_images
from lfdm_export.progress import Progress
from lfdm_export.sampling.noise import NoiseSource
from lfdm_export.sampling.options import WHOLE, SamplingOptions
from lfdm_export.sampling.rows import SamplerTable
from lfdm_models.schedule import cosine_schedule

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]


class Pipeline:
    """Makes clips with a bundle.

    An engine is loaded when its stage is first needed, then kept. Use a pipeline from one thread at a time.

    Examples:
        >>> pipe = Pipeline("mug")
        >>> pipe.generate("face.jpg", label="happiness", seed=0).save("happiness.gif")
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: Device = "cpu",
        target: str = AUTO,
        self_check: bool = True,
        cache: ClipCache | str | os.PathLike[str] | None = None,
    ) -> None:
        """Use a bundle, or open its path as `open` does. ``stages`` runs single stages."""
        self.cache = cache if isinstance(cache, ClipCache | None) else ClipCache.at(cache)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.stages = StageRunner(self.bundle, threads=threads, device=device, target=target, self_check=self_check)

    def __repr__(self) -> str:
        return f"<Pipeline {str(self.bundle.path)!r}: {self.bundle.manifest.summary()}; {self.stages.state()}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, as for another process.

        Raises:
            TypeError: always.
        """
        raise TypeError("a Pipeline holds engines and cannot be pickled or copied; open the bundle in each process")

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: Device = "cpu",
        target: str = AUTO,
        self_check: bool = True,
        cache: ClipCache | str | os.PathLike[str] | None = None,
    ) -> Pipeline:
        """Open a bundle, or the path of one, whose files are then checked against their hashes.

        Args:
            bundle: a bundle or its folder.
            threads: threads per engine on a CPU; None uses all cores.
            device: device for ONNX Runtime: "cpu", "cuda", "tensorrt" or "tensorrt-rtx".
            target: a name in `lfdm_export.engines.targets.TARGETS`, or "auto": the first target that the bundle has
                plans or weights for and that runs here, else the fastest that runs its graphs on the CPU.
            self_check: before the first use of a target on this machine, compare it with the reference in the bundle
                (seconds); "auto" uses only targets that pass. Results are kept in the user cache folder.
            cache: a folder of clips, 4 GB at most. A clip made before by the same bundle and engine from the same
                picture with the same settings is read from it. None stores nothing.

        Raises:
            BundleError: the path holds no complete bundle.
            InputError: the target is unknown.
        """
        return cls(bundle, threads=threads, device=device, target=target, self_check=self_check, cache=cache)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        threads: int | None = None,
        device: Device = "cpu",
        target: str = AUTO,
        self_check: bool = True,
        cache: ClipCache | str | os.PathLike[str] | None = None,
    ) -> Pipeline:
        """Open a bundle from the Hugging Face Hub; `Bundle.from_pretrained` and `open` describe the arguments.

        Raises:
            InputError: the name, the revision or the target is not valid.
            BundleError: the bundle does not exist or is incomplete, access is denied, or there is neither a connection
                nor a local copy.
            MissingDependencyError: huggingface_hub is not installed.
        """
        bundle = Bundle.from_pretrained(name, revision=revision)
        return cls(bundle, threads=threads, device=device, target=target, self_check=self_check, cache=cache)

    def generate(
        self,
        image: ImageLike,
        *,
        crop: Crop | None = None,
        label: str | Sequence[str] | None = None,
        text: str | Sequence[str] | None = None,
        text_embedding: ArrayLike | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = WHOLE,
        seed: int | Sequence[int] | None = None,
        noise: Iterator[Float32] | None = None,
        frames: Sequence[int] | slice | None = None,
        progress: Progress | None = None,
        previews: Previews | None = None,
    ) -> Clip:
        """Make a clip in which `image` moves as the label says.

        Exactly one of `label`, `text` and `text_embedding` is required. A single value applies to every
        sample, so one image and seven labels make seven clips.

        Args:
            image: a path, a PIL image, (H,W,3) uint8, or (B,H,W,3) uint8 for a batch.
            crop: region cut out of the image first: "center", the largest square in its middle; "face", a square
                around the largest face; or (x, y, width, height) in pixels. None keeps the whole image and pads it to
                a square with black bars. `Clip.paste_back` puts the clip back into the whole image.
            label: a known label, or one per sample.
            text: free text, or one per sample; for bundles with a text encoder.
            text_embedding: (text_width,) or (B, text_width).
            sampler: a name in `lfdm_export.sampling.tables.SAMPLERS`, or "tuned" if the bundle has it; None for the
                default of the bundle.
            steps: sampling steps; None for the default.
            eta: share of fresh noise in DDIM, 0 … 1; None for the default.
            guidance_scale: 1 for the conditional prediction, 0 for the unconditional one, above 1 for
                more of the label; None for the default.
            guidance_interval: (low, high), shares of the schedule, 0 (no noise) … 1 (pure noise), in which guidance
                acts. Steps outside it use the conditional prediction alone, at half the cost.
            seed: one per sample; a single one gives sample i the seed ``seed + i``. The noise of a sample
                depends only on its seed. None draws one, which ``clip.seeds`` holds.
            noise: instead of a seed: float32 draws (B,3,T,h,w), first the start, then one per step that
                draws noise.
            frames: ascending positions of the frames to decode, from 0, or a slice such as ``slice(0, None, 4)``. The
                clip has only these frames, at equal distances with a rate that keeps its duration; the others are not
                decoded. None decodes all.
            progress: called as ``progress(stage, done, total)``.
            previews: previews during sampling. The steps then run one by one, even if an engine could make the whole
                clip in one call. None for no previews.

        Raises:
            InputError: an argument is not valid.
            EngineError: an engine cannot be loaded or fails.
        """
        options, table = self.resolve(SamplingOptions(sampler, steps, eta, guidance_scale, guidance_interval))
        prepared = self._prepare(image, crop)
        words, embeddings = find_conditions(self.stages, label, text, text_embedding)
        chosen = FrameChoice.of(frames, self.bundle.manifest.geometry.frames)
        batch = common_batch({"images": len(prepared), "labels": len(embeddings), "seeds": seed_count(seed)})
        settings = {
            **self._origin("generate"),
            **to_plain(options),
            "condition": condition_name(label, text, text_embedding),
            **chosen.facts(),
        }
        seeds, source = find_noise(seed, noise, batch, self._noise_shape())

        def make() -> Clip:
            rows = np.repeat(embeddings, batch // len(embeddings), axis=0)
            if seeds is not None and options.guidance_interval == WHOLE and previews is None:
                whole = make_whole_clip(
                    self.stages, prepared, rows, options.scale, table, seeds, progress, chosen.positions
                )
                if whole is not None:
                    return whole
            encoded = encode_images(self.stages, prepared, progress).repeat(batch)
            shown = None if previews is None else previews.on_estimate(self.stages, encoded, table.steps)
            latent = denoise(self.stages, encoded, rows, options, table, source, progress, shown)
            return decode_clip(self.stages, prepared, encoded, chosen.part(latent), progress)

        made_from = {**settings, "seeds": seeds, "frames": chosen.count, "batch": batch}
        return replace(
            make() if seeds is None else self._remembered(made_from, (prepared, embeddings), make),
            labels=None if words is None else words * (batch // len(words)),
            seeds=seeds,
            fps=chosen.rate(None),
            settings=settings,
        )

    def transfer_motion(
        self,
        image: ImageLike,
        driving_clip: str | os.PathLike[str] | UInt8,
        *,
        crop: Crop | None = None,
        fps: float | None = None,
        progress: Progress | None = None,
    ) -> Clip:
        """Make a clip in which `image` moves as another clip does, with the LFAE alone.

        The motion is absolute: the flow of each frame leads from `image` to that driving frame, so the result is best
        if the clip begins in a pose like that of the image. The clip has the duration of the driving clip.

        Args:
            image: a path, a PIL image or (H,W,3) uint8.
            driving_clip: a path, or (T,H,W,3) uint8; at most 10,000 frames at its own rate, or at `fps`. The frames of
                a file are scaled one by one as they are read.
            crop: region cut out of the image and of each frame first, as in `generate`. A crop in pixels applies to
                the image only; the frames are then cropped to their middle.
            fps: frames per second that the driving clip is resampled to; None keeps its own rate.
            progress: called as ``progress(stage, done, total)``.

        Raises:
            InputError: the image or the clip is not valid.
            EngineError: an engine cannot be loaded or fails.
        """
        self.bundle.require_drive("motion transfer")
        prepared = self._prepare(image, crop)
        if len(prepared) != 1:
            raise InputError(f"motion transfer takes one image, found a batch of {len(prepared)}; call it for each")
        footage = prepare_footage(driving_clip, fps, crop, self.bundle.manifest)
        driving = footage.frames

        def make() -> Clip:
            motion = estimate_motion(self.stages, prepared, driving, progress)
            encoded = encode_images(self.stages, prepared, progress)
            return decode_clip(self.stages, prepared, encoded, motion, progress)

        settings = self._origin("transfer_motion")
        made_from = {**settings, "frames": len(driving), "batch": 1}
        return replace(
            self._remembered(made_from, (prepared, driving), make),
            fps=footage.fps,
            settings=settings,
        )

    def animate(
        self,
        image: ImageLike,
        motion: Motion | str | os.PathLike[str],
        *,
        crop: Crop | None = None,
        frames: Sequence[int] | slice | None = None,
        progress: Progress | None = None,
    ) -> Clip:
        """Make a clip in which `image` moves as in an earlier clip: decode its latent, without sampling.

        With the picture of that clip, the same bundle and the same engine, the frames are bit-identical.

        Args:
            image: a path, a PIL image, (H,W,3) uint8, or (B,H,W,3) uint8 for a batch, which all move in the same way.
            motion: ``clip.motion`` of a clip of one sample, or the path of a ``.motion`` file from ``clip.save``.
            crop: region cut out of the image first, as in `generate`.
            frames: positions in the motion of the frames to decode, as in `generate`.
            progress: called as ``progress(stage, done, total)``.

        Raises:
            InputError: the image, the motion or a position is not valid, or the motion is from a model of other sizes.
            EngineError: an engine cannot be loaded or fails.
        """
        motion = as_motion(motion)
        geometry, config = self.bundle.manifest.geometry, self.bundle.manifest.config
        motion.require_fit(geometry.latent_size, geometry.frames, residual_flow=config.residual_flow)
        prepared = self._prepare(image, crop)
        chosen = FrameChoice.of(frames, motion.latent.shape[1])
        latent = np.repeat(chosen.part(motion.latent[None]), len(prepared), axis=0)
        origin = {**self._origin("animate"), **chosen.facts()}
        made_from = {**origin, "frames": latent.shape[2], "batch": len(prepared)}
        made = dict(motion.settings)
        word, seed = made.pop("text", made.pop("label", None)), made.pop("seed", None)

        def make() -> Clip:
            encoded = encode_images(self.stages, prepared, progress)
            return decode_clip(self.stages, prepared, encoded, latent, progress)

        return replace(
            self._remembered(made_from, (prepared, latent), make),
            labels=(word,) * len(prepared) if isinstance(word, str) else None,
            seeds=(seed,) * len(prepared) if isinstance(seed, int) else None,
            fps=chosen.rate(motion.fps),
            settings={**made, **origin, "motion_bundle_id": made.get("bundle_id")},
        )

    def encode(self, image: ImageLike) -> Encoded:
        """Encode one image, or a batch (B,H,W,3) uint8.

        Raises:
            InputError: the image is not valid.
            EngineError: the engine cannot be loaded or fails.
        """
        return encode_images(self.stages, self._prepare(image), None)

    def embed_text(self, texts: Sequence[str]) -> Float32:
        """Embed free texts as (B, text_width) float32.

        Raises:
            InputError: the bundle has no text encoder, or a text is not valid.
        """
        return embed_texts(self.stages, texts)

    def sample(
        self,
        encoded: Encoded,
        embedding: ArrayLike,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = WHOLE,
        seed: int | Sequence[int] | None = None,
        noise: Iterator[Float32] | None = None,
        progress: Progress | None = None,
        on_estimate: OnEstimate | None = None,
    ) -> Float32:
        """Denoise. `generate` describes the sampling arguments.

        Args:
            encoded: encoder results for B images.
            embedding: (text_width,) or (B, text_width).
            sampler: name of the sampler.
            steps: number of sampling steps.
            eta: share of fresh noise in DDIM.
            guidance_scale: scale of classifier-free guidance.
            guidance_interval: (low, high), where guidance acts.
            seed: one per sample, or a single one; None draws one, which is not reported.
            noise: instead of a seed.
            progress: called as ``progress("denoise", steps done, steps)``.
            on_estimate: see `lfdm_export.generate.stage_runner.StageRunner.sample`.

        Returns:
            The latent (B, 3, T, h, w) float32.

        Raises:
            InputError: an argument is not valid.
            EngineError: an engine cannot be loaded, fails, or returns values that are not finite.
        """
        options, table = self.resolve(SamplingOptions(sampler, steps, eta, guidance_scale, guidance_interval))
        _, source = find_noise(seed, noise, len(encoded.image), self._noise_shape())
        return denoise(self.stages, encoded, embedding, options, table, source, progress, on_estimate)

    def run_table(
        self,
        encoded: Encoded,
        embedding: ArrayLike,
        table: SamplerTable,
        source: NoiseSource,
        *,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = WHOLE,
        progress: Progress | None = None,
        on_estimate: OnEstimate | None = None,
    ) -> Float32:
        """Denoise with any table and any source of noise (B, 3, T, h, w), as `sample` does.

        Raises:
            InputError: an argument is not valid.
            EngineError: an engine cannot be loaded, fails, or returns values that are not finite.
        """
        options = SamplingOptions(guidance_scale=guidance_scale, guidance_interval=guidance_interval)
        options = options.over(self.bundle.manifest.sampler)
        return denoise(self.stages, encoded, embedding, options, table, source, progress, on_estimate)

    def sampler_table(
        self, sampler: str | None = None, steps: int | None = None, eta: float | None = None
    ) -> SamplerTable:
        """The sampler that these arguments select; the defaults of the bundle apply to its default sampler only.

        Raises:
            InputError: the sampler is unknown, or does not support these steps or this eta.
        """
        return self.resolve(SamplingOptions(sampler, steps, eta))[1]

    def resolve(self, options: SamplingOptions) -> tuple[SamplingOptions, SamplerTable]:
        """Fill in the defaults of the bundle; return the options and the sampler that they select.

        Raises:
            InputError: the bundle has no such sampler, or it does not support these steps or this eta.
        """
        manifest = self.bundle.manifest
        meant = options.over(manifest.sampler)
        table = meant.table(cosine_schedule(manifest.config.dm.training_steps), manifest.tuned)
        return replace(meant, steps=table.steps), table

    def decode(self, encoded: Encoded, latent: Float32, *, progress: Progress | None = None) -> tuple[Float32, Float32]:
        """Decode a latent.

        Args:
            encoded: encoder results for B images.
            latent: (B, 3, T, h, w) float32, with any number of frames T.
            progress: called as ``progress("decode", frames done, T)``.

        Returns:
            Frames and warped images, both (B, 3, T, H, W) float32 in [0, 1].

        Raises:
            InputError: the latent has another shape or dtype, or is not finite.
            EngineError: the engine cannot be loaded or fails.
        """
        size = self.bundle.manifest.geometry.image_size
        shape = (*latent.shape[:3], size, size)
        frames, warped = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for start, some_frames, some_warped in decode_chunks(self.stages, encoded, latent, progress):
            part = slice(start, start + some_frames.shape[2])
            frames[:, :, part], warped[:, :, part] = some_frames, some_warped
        return frames, warped

    def _prepare(self, image: ImageLike, crop: Crop | None = None) -> UInt8:
        """Convert any image to (B, H, W, 3) uint8, as the model requires."""
        manifest = self.bundle.manifest
        return prepare_images(image, manifest.geometry.image_size, manifest.preprocessing, crop=crop)

    def _origin(self, made_by: str) -> dict[str, object]:
        """What the metadata of a clip say about the bundle."""
        manifest = self.bundle.manifest
        return {
            "made_by": made_by,
            "bundle": self.bundle.name,
            "bundle_id": manifest.bundle_id,
            "precision": manifest.precision,
        }

    def _noise_shape(self) -> tuple[int, int, int, int]:
        """Shape (3, T, h, w) of the noise of a sample."""
        geometry = self.bundle.manifest.geometry
        return 3, geometry.frames, geometry.latent_size, geometry.latent_size

    def _remembered(
        self, made_from: Mapping[str, object], arrays: Sequence[NDArray[np.generic]], make: Callable[[], Clip]
    ) -> Clip:
        """The clip of `ClipCache.get_or_make`; without a cache, the result of `make`."""
        return make() if self.cache is None else self.cache.get_or_make(self.stages, made_from, arrays, make)

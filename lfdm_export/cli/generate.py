"""``lfdm-generate``: bundle and photograph -> clip."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfdm_export.cli.bulk import add_bulk_options, check_bulk_options, generate_in_bulk
from lfdm_export.cli.console import Bars, add_common_options, input_file, make_parser, output_file, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.making import Making
from lfdm_export.cli.photograph import add_crop_options, check_crop_options, read_pipe, say_bars, settle_crop
from lfdm_export.cli.planned import (
    PlannedClip,
    example_name,
    frames_of,
    inputs_of,
    options_of,
    planned_clips,
    positions_of,
    seeds_of,
    wants_many,
)
from lfdm_export.cli.plans import add_target_option
from lfdm_export.cli.remote import add_remote_options, check_remote_options, generate_remotely
from lfdm_export.errors import InputError
from lfdm_export.files.places import refuse_inputs
from lfdm_export.pictures.clip import Clip, rehearse_saving
from lfdm_export.pictures.clip_files import FORMATS
from lfdm_export.sampling.tuned import sampler_names
from lfdm_models.pictures.formats import FORMAT_NAMES

if TYPE_CHECKING:
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_export.stages import Geometry

PROGRAM = "lfdm-generate"
_EXAMPLES = """\
  lfdm-generate characters --image drawing.png --label nod --out nod.gif
  lfdm-generate mug --image face.jpg --label happiness --out happiness.gif
  lfdm-generate mug --image face.jpg --label fear --sampler unipc --steps 8 --seed 3 -o fear.mp4
  lfdm-generate mug --image face.jpg --label anger --guidance 2 --panels -o anger.gif
  lfdm-generate mug --image party.jpg --crop face --paste-back --label happiness -o party.mp4
  lfdm-generate mug --image face.jpg --drive laughing.mp4 -o laughing.gif
  lfdm-generate mug --image face.jpg --label anger fear --seeds 1-4 --format gif -o clips/
  lfdm-generate mug --image face.jpg --label happiness -o happy.motion
  lfdm-generate mug --image other.jpg --motion happy.motion -o other.gif
  lfdm-generate mug --image face.jpg --label happiness --stride 4 -o quick.gif
  lfdm-generate mug --jobs jobs.csv -o clips/ --workers 4
  lfdm-generate --url localhost:8001 --image face.jpg --label happiness -o happiness.gif
"""
#: Options of sampling, which are invalid with an existing motion.
_SAMPLING = ("seed", "seeds", "steps", "sampler", "eta", "guidance", "guidance_interval")
# Limits of a batch: clips, and values (frames times rows times columns of the latents).
_LARGEST_BATCH, _BATCH_VALUES = 8, 4 * 40 * 32 * 32
_STAGES = {"estimate_motion": "estimate motion"}


@orderly()
def generate_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-generate``; returns the exit status (see `lfdm_export.cli`)."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("drive", "motion"):
        if getattr(args, name) is not None and any(getattr(args, option) is not None for option in _SAMPLING):
            options = ", ".join("--" + option.replace("_", "-") for option in _SAMPLING)
            parser.error(f"--{name} samples nothing: leave out {options}")
    if args.stride is not None and args.stride < 1:
        parser.error(f"--stride is {args.stride}, expected a number of frames from 1")
    if args.drive is not None and frames_of(args) is not None:
        parser.error("--drive takes its frames from CLIP: leave out --frames and --stride, or give --fps")
    check_bulk_options(parser, args)
    check_crop_options(parser, args)
    if args.bundle is None and args.url is None and len(args.label or ()) > 1:
        args.bundle = args.label.pop()  # for the order: lfdm-generate --label nod BUNDLE
    check_remote_options(parser, args)
    return run(PROGRAM, args, lambda: _generate(args) if args.jobs is None else generate_in_bulk(args))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        PROGRAM, "Make a clip of a photograph that moves as a label, a text or a clip says.", _EXAMPLES
    )
    parser.add_argument(
        "bundle",
        nargs="?",
        metavar="BUNDLE",
        help="a folder, org/name on the Hugging Face hub, or characters: the shipped model; not with --url",
    )
    parser.add_argument(
        "--image", type=input_file, metavar="PHOTO", help=f"reference image: {FORMAT_NAMES}; - for stdin"
    )
    add_crop_options(parser)
    parser.add_argument(
        "-o",
        "--out",
        type=output_file,
        metavar="FILE",
        help=f"file of the clip: .{', .'.join(FORMATS)}, or FOLDER/; - for stdout, with --format",
    )
    _add_motion_options(parser)
    _add_sampling_options(parser)
    _add_clip_options(parser)
    add_bulk_options(parser)
    add_remote_options(parser)
    add_common_options(parser)
    return parser


def _add_motion_options(parser: argparse.ArgumentParser) -> None:
    motion = parser.add_argument_group("motion (one of these)").add_mutually_exclusive_group()
    motion.add_argument(
        "--label", nargs="+", action="extend", metavar="LABEL", help="labels of the bundle; one clip per label"
    )
    motion.add_argument("--text", help="free text; requires a bundle with a text encoder")
    motion.add_argument("--embedding", type=input_file, metavar="FILE.npy", help="a text embedding")
    motion.add_argument("--drive", type=input_file, metavar="CLIP", help="clip whose motion is transferred")
    motion.add_argument("--motion", type=input_file, metavar="FILE", help="motion of an earlier clip, saved as .motion")
    motion.add_argument("--labels-all", action="store_true", help="one clip per label of the bundle")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling (default: that of the bundle)")
    seed = sampling.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=int, metavar="N", help="seed of the noise (default: random)")
    seed.add_argument(
        "--seeds", type=seeds_of, nargs="+", action="extend", metavar="N|N-M", help="one clip per seed and label"
    )
    sampling.add_argument("--steps", type=int, metavar="S", help="sampling steps")
    sampling.add_argument("--sampler", choices=sampler_names())
    sampling.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1")
    sampling.add_argument(
        "--guidance", type=float, metavar="SCALE", help="guidance scale; 1: as trained; above 1: stronger label"
    )
    sampling.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="interval of the schedule with guidance, from 0 to 1 (pure noise) (default: 0 1)",
    )


def _add_clip_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("clip")
    output.add_argument("--format", choices=FORMATS, help="file format (default: by the file name extension)")
    output.add_argument(
        "--fps",
        type=float,
        help="frames per second (default: 10; with --drive the rate of CLIP, or the rate it is resampled to)",
    )
    output.add_argument(
        "--scale", type=int, default=1, metavar="N", help="enlarge the frames N times, 1 to 8 (default: 1)"
    )
    frames = output.add_mutually_exclusive_group()
    frames.add_argument(
        "--frames",
        type=positions_of,
        nargs="+",
        action="extend",
        metavar="N|N-M",
        help="decode only these frames, counted from 0 (default: all)",
    )
    frames.add_argument(
        "--stride", type=int, metavar="N", help="decode only every N-th frame; the clip keeps its duration"
    )
    output.add_argument(
        "--panels",
        action="store_true",
        help="show source, clip, warped image, deformed grid and occlusion map side by side, with titles",
    )
    output.add_argument("--cache", metavar="DIR", help="cache clips in this folder (4 GB at most), and reuse them")
    output.add_argument("--threads", type=int, metavar="N", help="threads per engine (default: all cores)")
    add_target_option(output)


def _generate(args: argparse.Namespace) -> int:
    # Checked before minutes of sampling: an output that is not writable, or would replace an input, fails at once.
    if not wants_many(args):
        refuse_inputs(args.out, inputs_of(args))
    rehearse_saving(
        example_name(args),
        format=args.format,
        panels=args.panels,
        fps=args.fps,
        scale=args.scale,
        pasted=args.paste_back,
    )
    read_pipe(args)
    settle_crop(args)
    if args.url is not None:
        return generate_remotely(args)
    from lfdm_export.generate.pipeline import Pipeline

    pipeline = Pipeline.open(args.bundle, threads=args.threads, target=args.target, cache=args.cache)
    with Bars(quiet=args.quiet, names=_STAGES) as progress:
        making = Making(args, planned_clips(args, pipeline.bundle.labels))
        # A batch of 1, because the key of a cached clip must not depend on the other clips of the command.
        batch = 1 if args.cache else batch_size(pipeline.bundle.manifest.geometry)
        parts = [making.wanted[start : start + batch] for start in range(0, len(making.wanted), batch)]
        for done, part in enumerate(parts):
            if len(parts) > 1:
                progress("clips", done * batch, len(making.wanted))
            _make(pipeline, args, part, making, progress)
    facts: dict[str, object] = {}
    if args.drive is None and args.motion is None and making.made:
        options, _ = pipeline.resolve(options_of(args))
        facts = {"sampler": options.sampler, "steps": options.steps}
    if making.made:
        facts["target"] = pipeline.stages.target
    status = making.finish(PROGRAM, facts)
    if not making.made:
        return status
    say_bars(args, pipeline.bundle.manifest.preprocessing)
    say(args, f"target  {pipeline.stages.target}: {pipeline.stages.choice.reason}")
    if pipeline.bundle.manifest.provenance.get("trained") is False:
        say(args, "the model's weights are untrained: the clip shows that it runs, not what a trained one does")
    return status


def batch_size(geometry: Geometry) -> int:
    """Return the clips per batch: as many as need little memory beside the engines."""
    return max(1, min(_LARGEST_BATCH, _BATCH_VALUES // (geometry.frames * geometry.latent_size**2)))


def _make(
    pipeline: Pipeline, args: argparse.Namespace, part: Sequence[PlannedClip], making: Making, progress: Bars
) -> None:
    """Generate clips as a batch; if the batch fails, one by one, so that one clip does not fail the others."""
    if len(making.wanted) > 1:
        part = [planned for planned in part if _label_is_known(pipeline, planned, making)]
    if len(part) > 1:
        try:
            clip = _clip(pipeline, args, progress, part)
        except Exception:
            if args.debug:
                raise
        else:
            for index, planned in enumerate(part):
                making.attempt(planned, functools.partial(clip.sample, index))
            return
    for planned in part:
        making.attempt(planned, functools.partial(_clip, pipeline, args, progress, [planned]))


def _label_is_known(pipeline: Pipeline, planned: PlannedClip, making: Making) -> bool:
    try:
        if planned.label is not None:
            pipeline.bundle.label_index(planned.label)
    except InputError as error:
        making.fail(planned, error)
        return False
    return True


def _clip(pipeline: Pipeline, args: argparse.Namespace, progress: Bars, part: Sequence[PlannedClip]) -> Clip:
    if args.drive is not None:
        return pipeline.transfer_motion(args.image, args.drive, crop=args.crop, fps=args.fps, progress=progress)
    if args.motion is not None:
        return pipeline.animate(args.image, args.motion, crop=args.crop, frames=frames_of(args), progress=progress)
    embedding = None
    if args.embedding is not None:
        from lfdm_export.generate.arguments import load_embedding

        embedding = load_embedding(args.embedding)
    labels, seeds = [planned.label for planned in part], [planned.seed for planned in part if planned.seed is not None]
    one = len(part) == 1
    return pipeline.generate(
        args.image,
        crop=args.crop,
        label=labels[0] if one or labels[0] is None else [label for label in labels if label is not None],
        text=args.text,
        text_embedding=embedding,
        seed=seeds[0] if one else seeds,
        frames=frames_of(args),
        progress=progress,
        **options_of(args).given(),
    )

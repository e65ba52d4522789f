"""``lfdm-generate``: bundle and photograph -> clip."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfdm_export.cli.console import OK, Bars, add_common_options, make_parser, run, say
from lfdm_export.cli.ending import orderly
from lfdm_export.cli.plans import add_target_option
from lfdm_export.cli.remote import add_remote_options, check_remote_options, generate_remotely
from lfdm_export.clip import Clip, rehearse_saving
from lfdm_export.files.places import refuse_inputs
from lfdm_export.media import FORMATS
from lfdm_export.sampling import SAMPLERS

if TYPE_CHECKING:
    from lfdm_export.pipeline import Pipeline

PROGRAM = "lfdm-generate"
_EXAMPLES = """\
  lfdm-generate mug --image face.jpg --label happiness --out happiness.gif
  lfdm-generate mug --image face.jpg --label fear --sampler unipc --steps 8 --seed 3 -o fear.mp4
  lfdm-generate mug --image face.jpg --label anger --guidance 2 --panels -o anger.gif
  lfdm-generate mug --image face.jpg --drive laughing.mp4 -o laughing.gif
  lfdm-generate --url localhost:8001 --image face.jpg --label happiness -o happiness.gif
"""
#: Options of sampling, which a motion transfer has none of.
_SAMPLING = ("seed", "steps", "sampler", "eta", "guidance")
_STAGES = {"estimate_motion": "estimate motion"}


@orderly()
def generate_main(argv: Sequence[str] | None = None) -> int:
    """Run ``lfdm-generate``; returns the exit status (see `lfdm_export.cli`)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.drive is not None and any(getattr(args, name) is not None for name in _SAMPLING):
        parser.error(f"--drive samples nothing: leave out {', '.join('--' + name for name in _SAMPLING)}")
    check_remote_options(parser, args)
    return run(PROGRAM, args, lambda: _generate(args))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        PROGRAM, "Make a clip of a photograph that moves as a label, a text or a clip says.", _EXAMPLES
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="folder that lfdm-export wrote; not with --url")
    parser.add_argument("--image", required=True, metavar="PHOTO", help="the photograph")
    parser.add_argument(
        "-o", "--out", required=True, metavar="FILE", help=f"the clip: .{', .'.join(FORMATS)}, or FOLDER/"
    )
    motion = parser.add_argument_group("motion (one of these)").add_mutually_exclusive_group(required=True)
    motion.add_argument("--label", help="one of the bundle's labels")
    motion.add_argument("--text", help="free text, if the bundle has a text encoder")
    motion.add_argument("--embedding", metavar="FILE.npy", help="a text embedding")
    motion.add_argument("--drive", metavar="CLIP", help="a clip whose motion is transferred")
    sampling = parser.add_argument_group("sampling (the bundle's defaults where not given)")
    sampling.add_argument("--seed", type=int, metavar="N", help="of the noise (0)")
    sampling.add_argument("--steps", type=int, metavar="S", help="sampling steps")
    sampling.add_argument("--sampler", choices=tuple(SAMPLERS))
    sampling.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1")
    sampling.add_argument("--guidance", type=float, metavar="SCALE", help="1: as trained; above 1: more of the label")
    output = parser.add_argument_group("clip")
    output.add_argument("--format", choices=FORMATS, help="in place of the file's ending")
    output.add_argument("--fps", type=float, default=10.0, help="frames a second (%(default)g)")
    output.add_argument(
        "--panels",
        action="store_true",
        help="show source, clip, warped image, deformed grid and occlusion side by side",
    )
    output.add_argument("--threads", type=int, metavar="N", help="threads (all cores)")
    add_target_option(output)
    add_remote_options(parser)
    add_common_options(parser)
    return parser


def _generate(args: argparse.Namespace) -> int:
    # Before minutes of sampling: a clip that could not be written, or would replace an input, shows at once.
    inputs = {"--image": args.image, "--drive": args.drive, "--embedding": args.embedding, "BUNDLE": args.bundle}
    refuse_inputs(args.out, inputs)
    rehearse_saving(args.out, format=args.format, panels=args.panels, fps=args.fps)
    if args.url is not None:
        return generate_remotely(args)
    from lfdm_export.pipeline import Pipeline

    pipeline = Pipeline.open(args.bundle, threads=args.threads, target=args.target)
    with Bars(quiet=args.quiet, names=_STAGES) as progress:
        clip = _clip(pipeline, args, progress)
        paths = clip.save(args.out, format=args.format, panels=args.panels, fps=args.fps)
    for path in paths:
        say(args, f"clip  {path}")
    say(args, f"target  {pipeline.stages.target}: {pipeline.stages.choice.reason}")
    if pipeline.bundle.manifest.provenance.get("trained") is False:
        say(args, "the model's weights are untrained: the clip shows that it runs, not what a trained one does")
    return OK


def _clip(pipeline: Pipeline, args: argparse.Namespace, progress: Bars) -> Clip:
    if args.drive is not None:
        return pipeline.transfer_motion(args.image, args.drive, progress=progress)
    embedding = None
    if args.embedding is not None:
        from lfdm_export.conditions import load_embedding

        embedding = load_embedding(args.embedding)
    return pipeline.generate(
        args.image,
        label=args.label,
        text=args.text,
        text_embedding=embedding,
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        guidance_scale=args.guidance,
        seed=args.seed,
        progress=progress,
    )

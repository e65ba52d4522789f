"""Adapts the decoder of a trained LFAE to one person, from a handful of pictures or clips.

Only what decodes is trained (`lfdm_models.training.lfae.DECODER`). Motion, encoder and all statistics of batch norm
keep their bits, so the result goes with the same DM.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 4.3, where the decoder is fine-tuned on a new domain; its authors'
answer in issue 11 of github.com/nihaomiao/CVPR23_LFDM: freeze encoder and flow predictor, with a small learning rate.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lfdm_models.config import LfaeConfig
from lfdm_models.training.data import ColorJitter
from lfdm_models.training.devices import choose_device
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.files import write_whole
from lfdm_models.training.lfae import LfaeStage, load_lfae, plain
from lfdm_models.training.loop import Outcome, ReportProgress, no_report, train
from lfdm_models.training.losses import PerceptualLoss, PyramidLoss
from lfdm_models.training.person import Person, PersonPairs, Quality, divide, rebuilt_quality
from lfdm_models.training.settings import OptimizerSettings, RunSettings
from lfdm_models.training.vgg import Vgg19

#: File of the quality before and after, in the folder of the run.
QUALITY = "quality.json"


@dataclass(frozen=True)
class Adapted:
    """Result of `learn_decoder`.

    Attributes:
        outcome: the run.
        before, after: how well start and result rebuild the same frames.
        held_out: whether these frames were not learned from.
    """

    outcome: Outcome
    before: Quality
    after: Quality
    held_out: bool

    def table(self) -> str:
        """Quality before and after, as Markdown."""
        frames = "held-out frames" if self.held_out else "frames of what was learned from"
        rows = [f"| {frames} | L1 | PSNR, dB |", "|---|---|---|"]
        for name, found in (("before", self.before), ("after", self.after)):
            rows.append(f"| {found.frames}, {name} | {found.l1:.5f} | {found.psnr:.2f} |")
        return "\n".join(rows)


def learn_decoder(
    config: LfaeConfig,
    start: Path,
    person: Person,
    optimizer: OptimizerSettings,
    run: RunSettings,
    folder: Path,
    *,
    vgg: Path | None = None,
    hold_out: float = 0.2,
    jitter: bool = True,
    resume: bool = False,
    progress: ReportProgress = no_report,
) -> Adapted:
    """Train the decoder of an LFAE, and measure it before and after.

    Args:
        config: architecture of the LFAE.
        start: its checkpoint.
        person: pictures and clips of one person.
        optimizer: settings of the optimizer.
        run: number of steps, batch size, device, precision, and what is saved when.
        folder: folder of the run, with the result as ``lfae.pth`` in the released layout, and `QUALITY`.
        vgg: weights of VGG-19 for the perceptual loss; None for the pyramid loss.
        hold_out: share of pictures and frames that are measured and not learned from.
        jitter: whether colors are changed at random, alike in both frames of a pair.
        resume: continue from the state in `folder`, if there is one.
        progress: called after every step.

    Raises:
        TrainingError: the weights are not available, there is too little to hold out, the folder has a run that is not
            to be or cannot be resumed, or the loss is not finite.
    """
    learned, measured = divide(person, hold_out)
    device = choose_device(run.device)
    lfae, facts = load_lfae(start, config)
    if facts.get("config", plain(config)) != plain(config):
        raise TrainingError(f"{start} was trained as {facts['config']}, not as {plain(config)}; name its size and data")
    before = rebuilt_quality(lfae.to(device), measured)
    stage = LfaeStage(
        lfae,
        PerceptualLoss(Vgg19.load(vgg)) if vgg is not None else PyramidLoss(),
        learn="decoder",
        examples={"person": learned.describe(), "hold out": hold_out, "jitter": jitter},
    )
    examples = PersonPairs(learned, run.seed, ColorJitter() if jitter else None)
    outcome = train(stage, examples, optimizer, run, folder, resume=resume, progress=progress)
    result, _ = load_lfae(outcome.checkpoint, config)
    adapted = Adapted(outcome, before, rebuilt_quality(result.to(device), measured), measured.held_out)
    content = {
        "before": asdict(adapted.before),
        "after": asdict(adapted.after),
        "held out": measured.held_out,
        "step": outcome.step,
    }
    write_whole(folder / QUALITY, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
    return adapted

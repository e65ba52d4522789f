"""The training loop of both stages.

All randomness in step n depends only on the seed and n. No random state has to be saved, and a killed run continues
from its last checkpoint bit for bit as it would have without the interruption.

    RUN/training.pt     everything that the next step needs
    RUN/lfae.pth        or dm.pth: the checkpoint in the released layout, written after it
    RUN/previews/       occasional GIFs
    RUN/logs/           for TensorBoard, where it is installed

``accelerate launch`` starts several processes that train together: see `lfdm_models.training.processes`.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lfdm_models.training.data import Examples, batches
from lfdm_models.training.devices import choose_precision, generator, matmul_precision
from lfdm_models.training.ema import Ema
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.files import load, save
from lfdm_models.training.logs import Logs
from lfdm_models.training.processes import Processes
from lfdm_models.training.settings import OptimizerSettings, Precision, RunSettings

logger = logging.getLogger(__name__)

STATE = "training.pt"
_FORMAT = {"format": "lfdm-training", "version": 1}
#: (steps done, all steps, losses by name) after every step.
ReportProgress = Callable[[int, int, Mapping[str, float]], None]


class StopTraining(Exception):
    """Raised by `ReportProgress`: the run ends after this step, with a checkpoint, as at a signal."""


class Stage(Protocol):
    """The LFAE or the DM in training."""

    @property
    def name(self) -> str:
        """Name of the checkpoint without its ending."""
        ...

    @property
    def gpu_precision(self) -> Precision:
        """The precision for "auto" on a GPU."""
        ...

    @property
    def network(self) -> nn.Module:
        """The network with the weights that the optimizer changes."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that must be the same when a run is resumed, in plain values."""
        ...

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        ...

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Losses by name; the optimizer minimizes their sum."""
        ...

    def checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The checkpoint in the released layout, for weights of the network."""
        ...

    def preview(self, weights: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Write a picture of the network's current results."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        checkpoint: the file in the released layout.
        step: number of steps done.
        finished: all steps are done; False if the run was stopped by a signal.
        losses: losses of the last step.
        signal: number of the signal that stopped the run; 0 for none.
    """

    checkpoint: Path
    step: int
    finished: bool
    losses: dict[str, float]
    signal: int = 0


class _State:
    """The state that changes in training."""

    def __init__(self, stage: Stage, optimizer: OptimizerSettings, run: RunSettings, device: torch.device) -> None:
        self.step = 0
        self.network = stage.network
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        # foreach: the same formula for all tensors on any device, so the bits do not depend on the choice.
        self.adam = torch.optim.Adam(parameters, lr=optimizer.learning_rate, betas=optimizer.betas, foreach=True)
        self.ema = Ema(self.network, run.ema)
        self.device = device

    def capture(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **_FORMAT,
            "facts": dict(facts),
            "step": self.step,
            "network": self.network.state_dict(),
            "ema": self.ema.weights,
            "optimizer": self.adam.state_dict(),
        }

    def restore(self, path: Path, facts: Mapping[str, Any]) -> None:
        content = load(path, "the state of a training run")
        if {key: content.get(key) for key in _FORMAT} != _FORMAT:
            raise TrainingError(f"{path} is not the state of a training run, or of another version; start a new run")
        different = [key for key in facts if content["facts"].get(key) != facts[key]]
        if different:
            key = different[0]
            raise TrainingError(
                f"{path} was trained with {key} = {content['facts'].get(key)}, this run has {facts[key]}; "
                "give the same settings, or another folder"
            )
        self.network.load_state_dict(content["network"])
        self.adam.load_state_dict(content["optimizer"])
        for key, value in content["ema"].items():
            self.ema.weights[key].copy_(value)
        self.step = int(content["step"])


def no_report(*_: object) -> None:
    """Report nothing."""


def train(
    stage: Stage,
    examples: Examples,
    optimizer: OptimizerSettings,
    run: RunSettings,
    folder: Path,
    *,
    resume: bool = False,
    progress: ReportProgress = no_report,
) -> Outcome:
    """Train until all steps are done, or until the step in which SIGINT, SIGTERM or SIGHUP arrives.

    `progress` may end it too, by raising `StopTraining`.

    Args:
        stage: the LFAE or the DM.
        examples: training examples.
        optimizer: settings of the optimizer.
        run: settings of the run.
        folder: folder of the run, with the files in this module's docstring.
        resume: continue from the folder's state, if there is one. The number of steps may differ; step sizes follow it.
        progress: called after every step.

    Raises:
        TrainingError: the folder has a run and `resume` is False, or it cannot be resumed, or the loss is not finite.
    """
    processes = Processes(run.device)
    device = processes.device
    facts = {**stage.facts, **_facts(optimizer, run, processes.count)}
    if (folder / STATE).exists() and not resume:
        raise TrainingError(f"{folder} holds a training run already; resume it, or choose another folder")
    stage.to(device)
    state = _State(stage, optimizer, run, device)
    if (folder / STATE).exists():
        state.restore(folder / STATE, facts)
        logger.info("resuming %s after step %d", folder, state.step)
    losses: dict[str, float] = {}
    precision = choose_precision(run.precision, stage.gpu_precision, device)
    data = batches(
        examples,
        run.batch_size,
        start=state.step * run.accumulate * run.batch_size * processes.count,
        workers=run.workers,
        part=processes.rank,
        parts=processes.count,
        pin_memory=device.type == "cuda",
    )
    with (
        _stop_requests() as received,
        Logs(folder / "logs", events=processes.first) as logs,
        matmul_precision(precision),
    ):
        stopped = False
        while state.step < run.steps and not processes.any(stopped or bool(received)):
            losses = _step(stage, state, data, optimizer, run, precision, processes)
            done = state.step
            if not processes.first:
                continue
            if run.log_every and done % run.log_every == 0:
                logs.write(done, {**losses, "learning rate": optimizer.rate(done - 1, run.steps)})
            if run.checkpoint_every and done % run.checkpoint_every == 0 and done < run.steps:
                _write(stage, state, facts, folder)
            if run.preview_every and done % run.preview_every == 0:
                stage.preview(state.ema.weights, folder / "previews", done)
            try:
                progress(done, run.steps, losses)
            except StopTraining:
                stopped = True
        path = folder / f"{stage.name}.pth"
        if processes.first:
            _write(stage, state, facts, folder)
        processes.wait()  # until the files are written
    return Outcome(path, state.step, state.step >= run.steps, losses, received[0] if received else 0)


def _step(
    stage: Stage,
    state: _State,
    data: Iterator[dict[str, Tensor]],
    optimizer: OptimizerSettings,
    run: RunSettings,
    precision: Precision,
    processes: Processes,
) -> dict[str, float]:
    """Run one step of the optimizer; returns the mean losses of its forward passes over all processes."""
    device = state.device
    stage.network.train()
    state.adam.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for part in range(run.accumulate):
        batch = {key: value.to(device, non_blocking=True) for key, value in next(data).items()}
        number = (state.step * run.accumulate + part) * processes.count + processes.rank
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = stage.losses(batch, generator(run.seed, number, device))
        total = torch.stack(list(losses.values())).sum()
        if processes.any(not bool(torch.isfinite(total))):
            raise TrainingError(
                f"the loss of step {state.step + 1} is {total.item()}: the training diverged; "
                "go back to an older checkpoint with a smaller learning rate, or clip gradients"
            )
        (total / run.accumulate).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float() / run.accumulate
    parameters = state.adam.param_groups[0]["params"]
    processes.average([parameter.grad for parameter in parameters if parameter.grad is not None])
    # Batch norm's statistics: like the weights, they must be the same in all processes.
    processes.average([buffer for buffer in stage.network.buffers() if buffer.is_floating_point()])
    processes.average(list(sums.values()))
    norm = nn.utils.clip_grad_norm_(parameters, optimizer.clip_norm or float("inf"), foreach=True)
    if torch.isfinite(norm):
        state.adam.param_groups[0]["lr"] = optimizer.rate(state.step, run.steps)
        state.adam.step()
        state.ema.update(state.network, state.step)
    else:
        logger.warning("step %d: the gradient is not finite; the step is skipped", state.step + 1)
    state.step += 1
    return {name: value.item() for name, value in sums.items()} | {"gradient norm": float(norm)}


def _write(stage: Stage, state: _State, facts: Mapping[str, Any], folder: Path) -> Path:
    """Write the state first: a run killed between the two files resumes from it and writes the other again."""
    save(folder / STATE, state.capture(facts))
    path = folder / f"{stage.name}.pth"
    on_cpu = {key: value.detach().cpu() for key, value in state.ema.weights.items()}
    content = stage.checkpoint(on_cpu)
    save(path, {**content, "example": state.step * int(facts["batch size"]), "epoch": 0, "step": state.step})
    return path


def _facts(optimizer: OptimizerSettings, run: RunSettings, processes: int) -> dict[str, Any]:
    """Settings that affect the weights, as plain values."""
    return {
        "batch size": run.batch_size * run.accumulate * processes,
        **({"processes": processes} if processes > 1 else {}),
        "accumulate": run.accumulate,
        "seed": run.seed,
        "ema": run.ema,
        "optimiser": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(optimizer).items()},
    }


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the numbers of stop signals; a second one has its default effect.

    The signals are SIGINT, SIGTERM and SIGHUP; ignored ones (nohup) stay ignored.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, _: FrameType | None) -> None:
        logger.warning("stop requested: finishing the current step")
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            found = getattr(signal, name, None)
            if found is not None and signal.getsignal(found) != signal.SIG_IGN:
                before[found] = signal.signal(found, ask)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

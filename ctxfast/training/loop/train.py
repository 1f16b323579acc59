# SPDX-License-Identifier: Apache-2.0
"""The training loop: one for every task, on one device or many, killed and resumed without a trace.

Why our own: what a run gives depends on nothing but its configuration, because batches and random numbers are pure
functions of the step. Trainer libraries draw both from running generators, whose state they would have to save in every
worker; here going on needs the parameters, the optimiser and the number of the step.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._core import capability, transfer
from ..._core.extras import need
from ..._core.reading import reading
from .checkpoints import RunDirectory
from .config import LoopConfig
from .optimizers import BertAdam, Lamb, share_of_rate
from .parallel import Group, Spread, join
from .signals import Stop
from .task import Task, Tick

_FORMAT = 2
_LOG = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is NaN or infinite."""


@dataclass
class Report:
    """What a run came to.

    Attributes:
        directory: the run's.
        step: optimiser steps done in all.
        resumed: the step it went on from; 0 for a fresh start.
        figures: those of the last evaluation.
        best: step and figures of the best evaluation, if ``LoopConfig.best`` is set.
        seconds: time of this process in the loop, and of earlier ones in ``seconds_before``.
        log: every line of log.jsonl.
    """

    directory: Path
    step: int
    resumed: int
    figures: dict[str, float]
    best: dict[str, Any] | None
    seconds: float
    seconds_before: float
    log: list[dict[str, Any]] = field(default_factory=list)


def stream(seed: int, step: int, rank: int) -> int:
    """Seed of all that a process draws in a step: a pure function, so that a break changes nothing.

    torch's generator of the CPU looks at the low 32 bits only, so each of them depends on all three numbers.
    """
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def check_amp(amp: str, device: torch.device) -> None:
    """Refuse a half precision that a device does not train in.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise ValueError("ctxfast.training: amp is 'fp16' on a CPU; expected 'bf16' or 'no' there.")


def usual_amp(device: torch.device) -> str:
    """The half precision that a device is fastest with, where it costs no care: "bf16" or "no"."""
    has_it = device.type == "cuda" and capability.compute_capability(device.index) >= (8, 0)
    return "bf16" if has_it else "no"


def _parts(value: Any) -> dict[str, Any]:
    """A loss or its weight by the names of its parts."""
    return value if isinstance(value, dict) else {"loss": value}


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return transfer.to_device(batch, device)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(part, device) for part in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{part.name: moved(getattr(batch, part.name), device) for part in fields(batch)})
    return batch


def make_optimizer(config: LoopConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The configured optimiser over groups of parameters."""
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("ctxfast.training: the model has no parameter that requires a gradient; nothing to train.")
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.eps is not None:
        common["eps"] = config.eps
    if config.optimizer == "adagrad":
        # One pass over parameter, gradient and sum; torch has it for whole parameters on a CPU.
        parameters = [value for group in groups for value in group["params"]]
        is_fused = device.type == "cpu" and not any(hasattr(value, "device_mesh") for value in parameters)
        more: dict[str, Any] = {"initial_accumulator_value": config.initial_accumulator, "fused": is_fused or None}
        return torch.optim.Adagrad(groups, **more, **common)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, fused=True, **common)
    return {"bert_adam": BertAdam, "lamb": Lamb}[config.optimizer](groups, betas=config.betas, **common)


def train(
    task: Task,
    config: LoopConfig,
    directory: str | Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    show: Callable[[int, int, dict[str, float]], None] | None = None,
    tick: Callable[[Tick], None] | None = None,
) -> Report:
    """Train a task, leave its model in ``directory/final`` and, if asked for, the best one in ``directory/best``.

    Started again with the same configuration, a killed run goes on from its last checkpoint; on one device the outcome
    is the same, bit for bit, as without the break. In one process, Ctrl-C and SIGTERM end a run after the step it is
    in, with a checkpoint; a second one ends it at once.

    Args:
        task: what to train. Its model may be on any device.
        config: how.
        directory: of the run: config.json, log.jsonl, checkpoint-STEP.pt, best/, final/.
        resume: go on with a run that the directory holds.
        overwrite: start anew whatever it holds.
        settings: what else the outcome depends on (data, model options), as plain values: kept in config.json and
            compared when a run goes on.
        notes: sentences on the data, for the log: {"step": 0, "kind": "note", "note": ...}.
        show: called with step, steps and figures at every report and evaluation, in process 0. Without it they go to
            the logger "ctxfast.training.loop.train", as information.
        tick: called after every step, in process 0.

    Returns:
        A ``Report``.

    Raises:
        ValueError: a directory of another configuration; fp16 on a CPU; nothing to train.
        RuntimeError: the directory is in use; no GPU where one is asked for.
        TrainingDiverged: loss or gradients are not finite. Checkpoints of before stay.
    """
    group = join(config.parallel, config.device)
    check_amp(config.amp, group.device)
    loop = {**asdict(config), "parallel": group.kind, "ranks": group.ranks}
    if group.is_first:
        try:
            run = RunDirectory(directory, {"loop": loop, "settings": dict(settings or {})}, resume, overwrite)
            problem = None
        except (OSError, RuntimeError, ValueError) as error:
            run, problem = None, error
    else:
        run = problem = None
    if (problem := group.first(problem)) is not None:  # everyone stops, not only the first
        raise problem
    try:
        return _Run(task, config, group, run, Path(directory), show, tick, notes).go()
    finally:
        if run is not None:
            run.close()


def board_writer(config: LoopConfig) -> Any:
    """The class that writes for TensorBoard; None if it is not wanted.

    Raises:
        RuntimeError: it is wanted and not installed.
    """
    if not config.tensorboard:
        return None
    need("ctxfast.training", "tensorboard", "its files", None)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _log(step: int, steps: int, figures: dict[str, float]) -> None:
    _LOG.info("step %d of %d: %s", step, steps, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


class _Run:
    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        group: Group,
        run: RunDirectory | None,
        directory: Path,
        show: Callable[[int, int, dict[str, float]], None] | None,
        tick: Callable[[Tick], None] | None,
        notes: Sequence[str],
    ) -> None:
        self.notes = notes
        self.task, self.config, self.group, self.run, self.directory = task, config, group, run, directory
        self.show = (show or _log) if group.is_first else None
        self.tick = tick if group.is_first else None
        task.model.to(group.device)
        self.spread = Spread(task.model, group)
        self.parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(config, task.parameter_groups(config.weight_decay), group.device)
        self.rates = [part["lr"] for part in self.optimizer.param_groups]
        self.share = share_of_rate(config.schedule, config.warmup_steps, config.steps)
        self.scaler = torch.amp.GradScaler("cuda") if config.amp == "fp16" else None
        self.step = self.resumed = 0
        self.best: dict[str, Any] | None = None
        self.figures: dict[str, float] = {}
        self.seconds_before = 0.0
        self.sums: dict[str, Tensor] = {}
        self.sum_weights: dict[str, float] = {}
        self.size = 0  # tokens or words of this process since the last report
        self.parts: list[str] = []
        self.is_sound = torch.ones((), dtype=torch.bool, device=group.device)

    def go(self) -> Report:
        config = self.config
        self._load()
        self.start = time.monotonic()
        self.logged = (self.step, self.start)
        board = self._board()
        # Processes would have to agree on the step; several are left to torchrun and their checkpoints.
        stop = Stop(self.group.ranks == 1)
        try:
            with stop, ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
                first = self.step * config.accumulate
                coming = ahead.submit(self._batch, first) if self.step < config.steps else None
                self.task.model.train()
                while self.step < config.steps:
                    micro = []
                    for place in range(config.accumulate):
                        number = self.step * config.accumulate + place
                        assert coming is not None  # there are steps left
                        micro.append(coming.result())
                        coming = ahead.submit(self._batch, number + 1)
                    self._one_step(micro)
                    self.step += 1
                    self._count(sum(map(self.task.size, micro)))
                    is_last = self.step == config.steps
                    if self.step % config.log_every == 0 or is_last:
                        self._report(board)
                    if is_last or (config.eval_every and self.step % config.eval_every == 0):
                        self._evaluate(board)
                    if self.step % config.save_every == 0 or is_last or stop.asked:
                        self._save()
                    if stop.asked:
                        break
                if coming is not None:
                    coming.cancel()
            if self.step < config.steps:
                stop.give_way()
            # It appears as a whole: where it is, the run was finished before.
            if not self.group.first((self.directory / "final").exists()):
                self._place("final")
        finally:
            if board is not None:
                board.close()
        log = self.run.read_log() if self.run is not None else []
        seconds = time.monotonic() - self.start
        return Report(
            self.directory, self.step, self.resumed, self.figures, self.best, seconds, self.seconds_before, log
        )

    def _batch(self, number: int) -> Any:
        return self.task.batch(number, self.group.rank, self.group.ranks)

    def _one_step(self, micro: list[Any]) -> None:
        config, group = self.config, self.group
        for part, rate in zip(self.optimizer.param_groups, self.rates):
            part["lr"] = rate * self.share(self.step)
        torch.manual_seed(stream(config.seed, self.step, group.rank))
        weights = [_parts(self.task.weight(batch)) for batch in micro]
        self.parts = names = list(weights[0])
        own = torch.tensor([sum(weight[name] for weight in weights) for name in names], dtype=torch.float64)
        if group.ranks > 1:
            own = group.add(own.to(group.device))
        own.clamp_(min=1e-12)
        # A GPU is not waited for; numbers of the CPU are read.
        totals = dict(zip(names, own.tolist() if own.is_cpu else own.unbind(0)))
        for place, (batch, weight) in enumerate(zip(micro, weights)):
            with self.spread.local(place + 1 < len(micro)):
                amp = torch.bfloat16 if config.amp == "bf16" else torch.float16
                with torch.autocast(group.device.type, amp, enabled=config.amp != "no"):
                    loss, figures = self.task.loss(self.spread.model, moved(batch, group.device))
                # DDP and FSDP divide by the number of processes.
                parts = _parts(loss)
                scaled: Any = sum(part * (weight[name] * group.ranks / totals[name]) for name, part in parts.items())
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            self.is_sound &= torch.isfinite(scaled.detach())
            for name, value in {**parts, **figures}.items():
                share = weight.get(name, weight[names[0]])
                value, before = value.detach().double() * share, self.sums.get(name)
                self.sums[name] = value if before is None else before + value
                self.sum_weights[name] = self.sum_weights.get(name, 0.0) + share
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.spread.clip(self.parameters, config.max_grad_norm)
        if self.scaler is None:
            self.is_sound &= torch.isfinite(norm)
            # On a CPU looking costs nothing; on a GPU it would wait for the device, so it is left to the next report.
            if group.device.type == "cpu":
                self._check_sound()
            self.optimizer.step()
        else:  # gradients that overflowed are skipped, and the scale is lowered
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _count(self, size: int) -> None:
        self.size += size
        if self.tick is not None:
            loss = self._mean_loss() if self.group.device.type == "cpu" else None
            self.tick(Tick(self.step, self.config.steps, size * self.group.ranks, self.task.unit, loss))

    def _mean_loss(self) -> float:
        names = ["loss"] if "loss" in self.sums else self.parts
        return sum(self.sums[name].item() / max(self.sum_weights[name], 1e-12) for name in names)

    def _check_sound(self) -> None:
        if not self.group.any(not self.is_sound.item()):
            return
        kept = self.run.checkpoints() if self.run is not None else []
        way = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written before"
        raise TrainingDiverged(
            f"ctxfast.training: the loss or a gradient is not finite at step {self.step + 1} or just before; {way}. "
            "Try a lower learning rate, a longer warm-up or amp='bf16' in place of 'fp16', in a new directory."
        )

    def _report(self, board: Any) -> None:
        self._check_sound()
        names = sorted(self.sums, key=lambda name: (name != "loss", name))
        sums = torch.stack([self.sums[name] for name in names])
        weights = sums.new_tensor([self.sum_weights[name] for name in names])
        values = self.group.add(torch.stack([sums, weights])).tolist()
        figures = {name: value / max(weight, 1e-12) for name, value, weight in zip(names, *values)}
        if "loss" not in figures:
            figures = {"loss": sum(figures[name] for name in self.parts), **figures}
        now = time.monotonic()
        figures["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        figures["steps_per_second"] = (self.step - self.logged[0]) / max(now - self.logged[1], 1e-9)
        size = self.group.total(self.size)
        if size:
            figures[f"{self.task.unit}_per_second"] = size / max(now - self.logged[1], 1e-9)
        self.logged = (self.step, now)
        self.sums, self.sum_weights, self.size = {}, {}, 0
        self._write(figures, "train", board)

    def _evaluate(self, board: Any) -> None:
        self._check_sound()  # on a GPU a broken model must not become the best one
        self.task.model.eval()
        with torch.no_grad():
            self.figures = {name: float(value) for name, value in self.task.evaluate(self.spread.plain).items()}
        self.task.model.train()
        if self.figures:
            self._write(self.figures, "eval", board)
        self.logged, self.size = (self.step, time.monotonic()), 0  # evaluation is no part of the steps' time
        if self.config.best is None:
            return
        name = self.config.best.removeprefix("-")
        if name not in self.figures:
            raise ValueError(
                f"ctxfast.training: best is {self.config.best!r}; expected one of the figures of evaluation, "
                f"{', '.join(self.figures) or 'of which there are none'}."
            )
        sign = -1 if self.config.best.startswith("-") else 1
        value, before = self.figures[name], math.nan if self.best is None else self.best["figures"][name]
        # A figure may be no number, such as a mean of nothing; any number is better.
        if self.best is None or sign * value > sign * before or (math.isnan(before) and not math.isnan(value)):
            self.best = {"step": self.step, "figures": self.figures}
            self._place("best")

    def _write(self, figures: dict[str, float], kind: str, board: Any) -> None:
        if self.run is not None:
            self.run.log({"step": self.step, "kind": kind, **figures})
        if board is not None:
            for name, value in figures.items():
                board.add_scalar(f"{kind}/{name}", value, self.step)
        if self.show is not None:
            self.show(self.step, self.config.steps, figures)

    def _board(self) -> Any:
        writer = board_writer(self.config)
        if writer is None or not self.group.is_first:
            return None
        return writer(str(self.directory / "tensorboard"), purge_step=self.step + 1)

    def _place(self, name: str) -> None:
        whole = self.spread.whole()
        if self.run is not None:
            own, self.task.model = self.task.model, whole
            try:
                self.run.place_model(name, self._save_model)
            finally:
                self.task.model = own
        self.group.wait()

    def _save_model(self, folder: Path) -> None:
        self.task.save(folder)
        text = json.dumps({"step": self.step, "figures": self.figures}, indent=1)
        (folder / "training.json").write_text(text + "\n", encoding="utf-8")

    def _save(self) -> None:
        self._check_sound()
        model, optimizer = self.spread.state(self.optimizer)
        # On the CPU: another process would put them on this one's GPU.
        own = {"task": self.task.state_dict(), "sums": self.sums, "sum_weights": self.sum_weights}
        own = moved(own, torch.device("cpu"))
        states = self.group.all(own)
        if self.run is not None:
            state = {
                "format": _FORMAT,
                "step": self.step,
                "model": model,
                "optimizer": optimizer,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "ranks": states,
                "figures": self.figures,
                "best": self.best,
                "seconds": self.seconds_before + time.monotonic() - self.start,
            }
            self.run.save(self.step, state, self.config.keep)
        self.group.wait()

    def _load(self) -> None:
        state = problem = None
        if self.run is not None:
            try:
                state = self.run.latest()
            except ValueError as error:
                problem = error
        state, problem = self.group.first((state, problem))
        if problem is not None:
            raise problem
        if self.run is not None:  # also where no checkpoint was reached: what was reported will be again
            self.run.cut_log(0 if state is None else state["step"])
            self.run.prune(self.config.keep)
            known = [entry.get("note") for entry in self.run.read_log()]
            for note in self.notes:
                if note not in known:
                    self.run.log({"step": 0, "kind": "note", "note": note})
        if state is None:
            return
        if state["format"] != _FORMAT:
            raise ValueError(
                f"ctxfast.training: the checkpoint in {self.directory} has format {state['format']}; "
                f"expected {_FORMAT}. It was written by another version of ctxfast."
            )
        with reading(self.directory / f"checkpoint-{state['step']:08d}.pt", "ctxfast.training", "checkpoint"):
            self.spread.load(self.optimizer, state["model"], state["optimizer"])
            if self.scaler is not None:
                self.scaler.load_state_dict(state["scaler"])
            own = state["ranks"][self.group.rank]
            self.task.load_state_dict(own["task"])
            self.sums, self.sum_weights = moved(own["sums"], self.group.device), own["sum_weights"]
        self.step = self.resumed = state["step"]
        self.figures, self.best = state["figures"], state["best"]
        self.seconds_before = state["seconds"]

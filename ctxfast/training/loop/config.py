# SPDX-License-Identifier: Apache-2.0
"""How a task is trained, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .parallel import PARALLEL

AMP = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "bert_adam", "lamb", "adagrad")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class LoopConfig:
    """How a task is trained.

    Args:
        steps: optimiser steps in all.
        learning_rate: the highest.
        accumulate: micro-batches of a step.
        warmup_steps: steps over which the rate rises from 0.
        schedule: after that "linear" or "cosine" down to 0, or "constant".
        optimizer: "adamw", "bert_adam" (no bias correction), "lamb", "adagrad".
        weight_decay: not for biases and normalisation.
        betas: of the moments (not for "adagrad").
        eps: None for the optimiser's own: 1e-8 adamw, 1e-6 bert_adam and lamb, 1e-10 adagrad.
        initial_accumulator: "adagrad": where the sum of squares starts.
        max_grad_norm: all gradients together are scaled down to it; None for no limit.
        amp: "no", "bf16" or "fp16" (GPU; with loss scaling): torch.autocast.
        seed: of dropout and whatever a step draws.
        log_every, eval_every, save_every: steps between reports, evaluations (None: at the end) and checkpoints.
        keep: checkpoints that are kept.
        best: figure of ``evaluate`` whose best model is kept, "-" before it if less is better, e.g. "f1" or "-loss".
        parallel: "auto" (DDP under torchrun), "no", "ddp", "fsdp2".
        device: "auto", "cpu", "cuda".
        tensorboard: write ``tensorboard/`` too.

    Raises:
        ValueError: a value out of range or unknown.
    """

    steps: int
    learning_rate: float
    accumulate: int = 1
    warmup_steps: int = 0
    schedule: str = "linear"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    initial_accumulator: float = 0.0
    max_grad_norm: float | None = 1.0
    amp: str = "no"
    seed: int = 0
    log_every: int = 50
    eval_every: int | None = None
    save_every: int = 1000
    keep: int = 2
    best: str | None = None
    parallel: str = "auto"
    device: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        who = "ctxfast.training.LoopConfig"
        for name in ("steps", "accumulate", "log_every", "eval_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{who}: {name} is {value}; expected 1 or more.")
        choices = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "amp": AMP, "parallel": PARALLEL}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{who}: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        for name in ("learning_rate", "max_grad_norm", "eps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{who}: {name} is {value}; expected a number above 0.")
        for name in ("weight_decay", "initial_accumulator"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{who}: {name} is {value}; expected 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{who}: betas is {self.betas}; expected two numbers of 0 <= b < 1.")
        if self.optimizer == "lamb" and not self.weight_decay:
            raise ValueError(
                f"{who}: weight_decay is 0 with optimizer 'lamb', which scales the tensors that decay and no others; "
                "expected more than 0, or optimizer 'adamw'."
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"{who}: seed is {self.seed}; expected 0 to 2**63 - 1.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"{who}: warmup_steps is {self.warmup_steps}; expected 0 to steps = {self.steps}.")

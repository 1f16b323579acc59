# SPDX-License-Identifier: Apache-2.0
"""What the training loop asks of a task, and what it tells while it works on one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from .optimizers import parameter_groups

# Of a mean loss, or of each part of one.
Weight = float | dict[str, float]


class Task(Protocol):
    """What is trained, on what, and how it is judged. ``BaseTask`` has the defaults."""

    model: nn.Module
    unit: str  # what ``size`` counts: "tokens" or "words"

    def batch(self, step: int, rank: int, ranks: int) -> Any:
        """Micro-batch ``step`` (counted over all epochs) of one of ``ranks`` processes, on the CPU, in nested
        dataclasses, dicts, lists and tuples. A pure function; it runs in a thread beside the step before."""
        ...

    def weight(self, batch: Any) -> Weight:
        """What its mean loss counts for among the micro-batches and processes of a step, e.g. labelled tokens; for a
        loss of several parts, that of each by its name."""
        ...

    def size(self, batch: Any) -> int:
        """How many tokens, or words, a batch holds, padding not counted; 0 if nothing is to be said of it."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor | dict[str, Tensor], dict[str, Tensor]]:
        """Mean loss of a batch, or the means of its parts, whose sum is trained; and figures to report (means over what
        the first part is a mean over). Calls ``model``, not ``self.model``, once."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures. Every process calls it and gets the same."""
        ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimiser; a group's own ``lr`` replaces the configured one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What batches and losses remember of this process's past beside the parameters: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, directory: Path) -> None:
        """Write the finished model, ``self.model``, in its own format."""
        ...


class BaseTask:
    """The defaults of ``Task``: equal weights, nothing held out, nothing remembered."""

    model: nn.Module
    unit = "tokens"

    def weight(self, batch: Any) -> Weight:
        return 1.0

    def size(self, batch: Any) -> int:
        return 0

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return parameter_groups(self.model, weight_decay)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


@dataclass(frozen=True)
class Tick:
    """A step that was just done.

    Attributes:
        step, steps: its number, from 1, and how many there are in all.
        size: tokens or words that all processes have read in it; 0 where the task does not tell.
        unit: what they are.
        loss: the mean since the last report, of this process; None on a GPU, which is not waited for.
    """

    step: int
    steps: int
    size: int
    unit: str
    loss: float | None

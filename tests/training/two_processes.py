# SPDX-License-Identifier: Apache-2.0
"""Run under torchrun by test_loop: a training in two processes, broken off and resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from ctxfast.training.loop.batches import Batches
from ctxfast.training.loop.parallel import join
from ctxfast.training.loop.task import BaseTask
from ctxfast.training.loop.train import LoopConfig, train


class Halves(BaseTask):
    """A few layers, so that there is something to shard; batches in order, so that halves make a whole."""

    def __init__(self, batch_size: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(48, 6, generator=draw)
        self.y = self.x.sum(1, keepdim=True).tanh()
        torch.manual_seed(2)
        self.model = _Stack()
        self.batches = Batches(48, batch_size, is_shuffled=False)
        self.seen = 0
        self.dies_after: int | None = None

    def batch(self, step: int, rank: int, ranks: int) -> tuple:
        rows = self.batches(step, rank, ranks)
        return self.x[rows], self.y[rows]

    def weight(self, batch: tuple) -> float:
        return len(batch[0])

    def loss(self, model: nn.Module, batch: tuple) -> tuple[torch.Tensor, dict]:
        if self.seen == self.dies_after:
            raise KeyboardInterrupt
        self.seen += 1
        return (model(batch[0]) - batch[1]).square().mean(), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"error": (model(self.x) - self.y).square().mean().item()}

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]

    def save(self, directory: Path) -> None:
        torch.save(self.model.state_dict(), directory / "model.pt")


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def loop(kind: str) -> LoopConfig:
    return LoopConfig(
        steps=12,
        learning_rate=0.05,
        accumulate=2,
        save_every=5,
        eval_every=6,
        best="-error",
        parallel=kind,
        device="cpu",
    )


if __name__ == "__main__":
    kind, directory = sys.argv[1], Path(sys.argv[2])
    broken = Halves(batch_size=4)
    broken.dies_after = 14  # in step 8, after the checkpoint of step 5
    try:
        train(broken, loop(kind), directory)
        raise AssertionError("it was to break off")
    except KeyboardInterrupt:
        pass
    report = train(Halves(batch_size=4), loop(kind), directory)
    assert report.resumed == 5 and report.step == 12, report
    join(kind, "cpu").leave()  # whoever ends first must not take the other down

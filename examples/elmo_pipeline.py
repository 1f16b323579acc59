# SPDX-License-Identifier: Apache-2.0
"""An AllenNLP-style pipeline on ELMo: token indexer, ``Elmo``, a classifier; the reference path and the kernels.

    python examples/elmo_pipeline.py --options options.json --weights weights.hdf5

AllenNLP's own ``Elmo`` object is made faster in place by ``ctxfast.swap_in(model)``; where AllenNLP does not install
any more, ``ctxfast.Elmo`` has its constructor, its results and its parameter names, as used here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import ctxfast
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import random_weights, save_weights

SENTENCES = [
    ("the boat drifted toward the grassy bank below the bridge".split(), 0),
    ("he paid the cheque into his account at the bank".split(), 1),
    ("a steep muddy bank kept the flood out of the fields".split(), 0),
    ("the central bank lent money to the failing lender".split(), 1),
] * 4


class Classifier(nn.Module):
    """ELMo's mixed layers, their mean over a sentence, a linear layer."""

    def __init__(self, options: Path, weights: Path) -> None:
        super().__init__()
        self.elmo = ctxfast.Elmo(options, weights, num_output_representations=1, dropout=0.0)
        self.out = nn.Linear(self.elmo.get_output_dim(), 2)

    def forward(self, character_ids: torch.Tensor) -> torch.Tensor:
        found = self.elmo(character_ids)
        vectors, mask = found["elmo_representations"][0], found["mask"]
        return self.out(vectors.sum(1) / mask.sum(1, keepdim=True))


def train(options: Path, weights: Path, steps: int) -> tuple[float, list[float]]:
    """Seconds and losses: the biLM is frozen, its mix and the classifier learn."""
    torch.manual_seed(0)
    model = Classifier(options, weights).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = ctxfast.batch_to_ids([words for words, _ in SENTENCES])
    labels = torch.tensor([label for _, label in SENTENCES])
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        model.elmo.reset_states()
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return time.perf_counter() - start, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--options", type=Path, help="options.json")
    parser.add_argument("--weights", type=Path, help="HDF5 weights; without both, random ones of the small size")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.options is None or args.weights is None:
            args.options, args.weights = Path(folder) / "options.json", Path(folder) / "weights.hdf5"
            config = ElmoConfig.preset("small")
            save_weights(random_weights(config), config, args.options, args.weights)
        with ctxfast.use_impl("reference"):
            before, plain = train(args.options, args.weights, args.steps)
        after, fast = train(args.options, args.weights, args.steps)
    difference = max(abs(one - other) for one, other in zip(plain, fast))
    print(f"loss {fast[0]:.3f} to {fast[-1]:.3f}")
    print(f"before {before:.2f} s, after {after:.2f} s ({before / after:.2f}x), largest difference {difference:.1e}")


if __name__ == "__main__":
    main()

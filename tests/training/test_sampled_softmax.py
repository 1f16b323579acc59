# SPDX-License-Identifier: Apache-2.0
"""The sampled softmax of the biLM: what is drawn, its loss and its gradients."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctxfast.training.pretraining import sampled_softmax
from ctxfast.training.pretraining.sampled_softmax import log_uniform_negatives, sampled_softmax_loss


def test_negatives_are_log_uniform() -> None:
    draw, size, count = np.random.default_rng(1), 1000, 50
    seen, all_tries = np.zeros(size), []
    for _ in range(2000):
        words, tries = log_uniform_negatives(draw, count, size)
        assert len(set(words.tolist())) == count and words.min() >= 0 and words.max() < size and tries >= count
        seen[words] += 1
        all_tries.append(tries)
    k = np.arange(size)
    chance = np.log((k + 2) / (k + 1)) / math.log(size + 1)
    expected = np.mean([-np.expm1(tries * np.log1p(-chance)) for tries in all_tries], axis=0) * 2000
    assert np.abs(seen - expected).max() < 5 * np.sqrt(expected.max())
    assert np.corrcoef(seen, expected)[0, 1] > 0.99
    with pytest.raises(ValueError, match="negatives is 5; expected 1 to 4"):
        log_uniform_negatives(draw, 5, 5)


def test_negatives_may_be_nearly_all_words() -> None:
    drawn, size, count = [], 8200, 8192

    class Recorded:
        def __init__(self) -> None:
            self.draw = np.random.default_rng(0)

        def random(self, number: int) -> np.ndarray:
            drawn.append(self.draw.random(number))
            return drawn[-1]

    start = time.process_time()
    words, tries = log_uniform_negatives(Recorded(), count, size)
    assert time.process_time() - start < 0.15  # 0.25 s where every round sorts all that came before
    line = np.minimum(np.exp(np.concatenate(drawn) * math.log(size + 1)).astype(np.int64) - 1, size - 1)
    _, first = np.unique(line, return_index=True)
    order = np.sort(first)[:count]
    assert np.array_equal(words, line[order]) and tries == order[-1] + 1


def test_sampled_softmax_against_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    size, count, rows, width = 40, 12, 9, 6
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight, bias = torch.randn(size, width, generator=generator), torch.randn(size, generator=generator)
    words, tries = log_uniform_negatives(np.random.default_rng(0), count, size)
    targets = torch.randint(size, (rows,), generator=generator)
    targets[0] = int(words[0])  # drawn by accident
    loss = sampled_softmax_loss(hidden, weight, bias, targets, torch.from_numpy(words), torch.tensor(tries))

    def corrected(row: int, word: int) -> float:
        p = math.log((word + 2) / (word + 1)) / math.log(size + 1)
        expected = 1 - (1 - p) ** tries
        return (hidden[row].double() @ weight[word].double() + bias[word]).item() - math.log(expected)

    total = 0.0
    for row, target in enumerate(targets.tolist()):
        logits = [corrected(row, target)] + [corrected(row, word) for word in words.tolist() if word != target]
        total += math.log(sum(math.exp(value) for value in logits)) - logits[0]
    assert loss.item() == pytest.approx(total / rows, rel=1e-5)
    loss.backward()
    assert hidden.grad.isfinite().all()


def test_sampled_softmax_comes_close_to_the_full_one() -> None:
    generator = torch.Generator().manual_seed(0)
    size, rows = 500, 64
    hidden, weight = torch.randn(rows, 8, generator=generator), 0.5 * torch.randn(size, 8, generator=generator)
    targets = (torch.rand(rows, generator=generator) ** 3 * size).long()
    full = F.cross_entropy(hidden @ weight.T, targets).item()
    draw, losses = np.random.default_rng(0), []
    for _ in range(50):
        words, tries = log_uniform_negatives(draw, 300, size)
        found = sampled_softmax_loss(
            hidden, weight, torch.zeros(size), targets, torch.from_numpy(words), torch.tensor(tries)
        )
        losses.append(found.item())
    # The softmax's sum is estimated, and counts the target whole: near the full loss, not equal to it.
    assert abs(np.mean(losses) - full) < 0.15 * full


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, count", [(1, 3), (70, 200), (700, 200)])
def test_gradients_of_the_sampled_softmax(monkeypatch, dtype: torch.dtype, rows: int, count: int) -> None:
    """Against autograd's of the formula, over several blocks and strips of rows."""
    monkeypatch.setattr(sampled_softmax, "_rows_at_once", lambda hidden, negatives: (256, 64))
    generator = torch.Generator().manual_seed(rows)
    size, width = 300, 16
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight, bias = 0.3 * torch.randn(size, width, generator=generator), torch.randn(size, generator=generator)
    drawn, tries = log_uniform_negatives(np.random.default_rng(1), count, size)
    negatives, tries = torch.from_numpy(drawn), torch.tensor(tries)
    targets = torch.randint(size, (rows,), generator=generator)
    targets[0] = negatives[0]

    def formula(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def correction(words: Tensor) -> Tensor:
            chance = torch.log((words.double() + 2) / (words.double() + 1)) / math.log(size + 1)
            return torch.log(1 - (1 - chance) ** tries)

        own, sampled = weight.to(hidden.dtype)[targets], weight.to(hidden.dtype)[negatives]
        true = (hidden.double() * own.double()).sum(1) + bias[targets] - correction(targets)
        others = hidden.double() @ sampled.double().t() + bias[negatives] - correction(negatives)
        others = others.masked_fill(negatives == targets[:, None], -torch.inf)
        return (torch.logsumexp(torch.cat([others, true[:, None]], 1), 1) - true).mean()

    found, expected = [], []
    for function, kept in ((formula, expected), (sampled_softmax_loss, found)):
        leaves = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
        more = (targets, negatives, tries) if function is sampled_softmax_loss else ()
        loss = function(*leaves, *more)
        (loss * 3).backward()
        kept += [loss.detach().double(), *(leaf.grad.double() for leaf in leaves)]
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for got, right in zip(found, expected):
        assert (got - right).norm() <= error * right.norm()

# SPDX-License-Identifier: Apache-2.0
"""Training curves beside Hugging Face's, half precision beside Hugging Face's, and ragged shapes of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor

from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.heads import BertForMaskedLM, BertForSequenceClassification
from ctxfast.models.bert.modeling import Bert

SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32,
)  # fmt: skip
STEPS = 200
RATES = {"MaskedLM": 3e-3, "SequenceClassification": 1e-3}  # in which a tiny model learns its task in so many steps


def _batches(seed: int, task: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, mask and labels of texts that can be learned: a text has the ten words of one of five topics.

    The task is to find hidden words ("MaskedLM"), or the topic, which half of the words are of.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(STEPS):
        topics = torch.randint(0, 5, (12, 1), generator=generator)
        ids = 10 + 10 * topics + torch.randint(0, 10, (12, 16), generator=generator)
        lengths = torch.randint(4, 17, (12, 1), generator=generator)
        mask = (torch.arange(16) < lengths).long()
        chosen = torch.rand(12, 16, generator=generator) < (0.2 if task == "MaskedLM" else 0.5)
        if task == "MaskedLM":
            chosen &= mask.bool()
            labels, shown = torch.where(chosen, ids, -100), torch.where(chosen, 4, ids)
        else:
            labels = topics[:, 0]
            shown = torch.where(chosen, torch.randint(10, 60, (12, 16), generator=generator), ids)
        batches.append((shown * mask, mask, labels))
    return batches


def _curve(model: torch.nn.Module, task: str, seed: int, dropout_seed: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[task])
    torch.manual_seed(dropout_seed)
    losses = []
    for ids, mask, labels in _batches(seed, task):
        if not (labels != -100).any():
            continue
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _models(task: str, dropout: float, seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    config = BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=5)
    theirs_config = transformers.BertConfig.from_dict(config.to_dict())
    theirs_config._attn_implementation = "eager"
    torch.manual_seed(seed)
    theirs = getattr(transformers, f"BertFor{task}")(theirs_config)
    ours = {"MaskedLM": BertForMaskedLM, "SequenceClassification": BertForSequenceClassification}[task](config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow if task == "MaskedLM" else ()) for task in RATES]
)
def test_loss_curve_without_dropout_is_hugging_faces(task: str) -> None:
    ours, theirs = _models(task, 0.0)
    mine, want = (torch.tensor(_curve(model, task, 1, 0)) for model in (ours, theirs))
    assert len(want) > 190 and want[-20:].mean() < want[:20].mean() - 0.5  # it learns
    # Rounding differences grow along a training run; at first they are rounding.
    assert (mine - want)[:20].abs().max() < 1e-5
    assert (mine - want).abs().max() < 0.05
    assert abs(mine[-50:].mean() - want[-50:].mean()) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("task", RATES)
def test_loss_curve_with_dropout_is_within_seed_noise(task: str) -> None:
    ours, theirs = _models(task, 0.1)
    ends = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        ends[name] = torch.tensor(
            [sum(_curve(copy.deepcopy(model), task, 1, dropout_seed)[-50:]) / 50 for dropout_seed in (1, 2, 3)]
        )
    noise = torch.stack(tuple(ends.values())).std(dim=1).max()
    assert abs(ends["ours"].mean() - ends["theirs"].mean()) < 3 * noise + 0.02, ends


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        ("cpu", torch.float16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_half_precision_errs_no_more_than_hugging_face(device: str, dtype: torch.dtype) -> None:
    sizes = dict(vocab_size=200, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024)
    config = transformers.BertConfig(**sizes, initializer_range=0.05)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = transformers.BertModel(config).eval()
    ours = Bert(BertConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(1, 200, (16, 48))
    mask = (torch.arange(48) < torch.randint(3, 49, (16, 1))).long()
    real = mask.bool()
    with torch.no_grad():
        # The oracle starts from the weights that half precision holds.
        oracle = copy.deepcopy(theirs).to(dtype).double()(ids, attention_mask=mask).last_hidden_state[real]
        errors = {}
        for name, model in (("ours", ours), ("theirs", theirs)):
            half = copy.deepcopy(model).to(device, dtype)
            got = half(ids.to(device), attention_mask=mask.to(device)).last_hidden_state.cpu()[real]
            errors[name] = float((got.double() - oracle).square().mean().sqrt())
    assert errors["ours"] <= 1.05 * errors["theirs"], errors


def test_ragged_shapes_of_every_kind() -> None:
    """A text's result is that of the text alone, whatever lengths stand beside it; empty rows give zeros."""
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": 512}
    model = Bert(BertConfig(**sizes, initializer_range=0.1)).eval()
    around = [0, 1, 2, 63, 64, 65, 127, 128, 129, 511, 512]
    generator = torch.Generator().manual_seed(0)
    shapes = [around, [0], [0, 0, 0], [1] * 1000, [2, 0] * 100, [512], list(range(40))]
    for _ in range(6):
        picks = torch.randint(
            0, len(around), (int(torch.randint(1, 12, (), generator=generator)),), generator=generator
        )
        shapes.append([around[i] for i in picks.tolist()])
    for lengths in shapes:
        width = max(max(lengths), 1)
        ids = torch.randint(1, 60, (len(lengths), width), generator=generator)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            out = model(ids, mask)
            assert out.packing.total == sum(lengths)
            assert not out.last_hidden_state[~mask].any() and torch.isfinite(out.last_hidden_state).all()
            for row in {0, len(lengths) // 2, len(lengths) - 1}:
                if lengths[row] == 0:
                    assert not out.pooler_output[row].any()
                    continue
                alone = model(ids[row : row + 1, : lengths[row]])
                torch.testing.assert_close(
                    out.last_hidden_state[row, : lengths[row]], alone.last_hidden_state[0], atol=2e-5, rtol=0
                )
                torch.testing.assert_close(out.pooler_output[row], alone.pooler_output[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_dropout_is_as_strong_as_hugging_faces() -> None:
    """How far it moves each hidden state and the pooled one on average: a place with other dropout would show."""
    torch.manual_seed(0)
    options = dict(SIZES, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, initializer_range=0.2)
    theirs = transformers.BertModel(transformers.BertConfig(**options))
    ours = Bert(BertConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    ids, mask = torch.randint(0, 60, (24, 20)), torch.arange(20) < torch.randint(5, 21, (24, 1))

    def states(model: torch.nn.Module) -> list[Tensor]:
        found = model(ids, attention_mask=mask, output_hidden_states=True)
        return [*(state[mask] for state in found.hidden_states), found.pooler_output]

    moved = []
    for model in (theirs, ours):
        still = states(model.eval())
        model.train()
        sums = [torch.zeros(()) for _ in still]
        for _ in range(60):
            sums = [total + (one - two).square().mean() for total, one, two in zip(sums, states(model), still)]
        moved.append(torch.stack(sums))
    # Six seeds differ by 1.5 % at most; attention dropout of 0.2 on one side by 6 %.
    torch.testing.assert_close(moved[1], moved[0], rtol=0.03, atol=0)

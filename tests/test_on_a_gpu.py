# SPDX-License-Identifier: Apache-2.0
"""Whole paths of a user on a GPU: swapped models, ``Embedder``, a training run, compiled models. On a CPU the same
tests run too: what they say of a GPU is then only that it is asked the right thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from support.tiny_models import tiny_bert, tiny_elmo
from torch import Tensor, nn

import ctxfast
from ctxfast.embedding.embedder import Embedder
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.heads import BertForMaskedLM
from ctxfast.training.loop.task import BaseTask
from ctxfast.training.loop.train import LoopConfig, train

every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
# Heads of 32 and rows of 64: sizes that the kernels of a GPU take in tiles.
WIDE = dict(hidden_size=64, intermediate_size=128)
TEXTS = ["anna went to paris", "bob", "carla saw the sea with deniz and a boat from new york", "", "the the the"]


def _near(one: Tensor, two: Tensor, dtype: torch.dtype = torch.float32) -> None:
    limit = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    largest = float(two.abs().max()) if two.numel() else 0.0
    torch.testing.assert_close(one.float(), two.float(), rtol=0, atol=limit * max(1.0, largest))


# swapped models


@every_device
@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_encoders(device: str, kind: str, dtype: torch.dtype) -> None:
    """Op by op, at the capture and in replays; then restored, with the weights it had."""
    options = WIDE if kind == "Bert" else {}
    other, model = (tiny_model(kind, **options).to(device, dtype) for _ in range(2))
    ids, mask = IDS.to(device), MASK.to(device)
    report = ctxfast.swap_in(model, strict=True)
    assert report
    real = mask.bool()
    with torch.no_grad():
        right = other.double()(ids, attention_mask=mask).last_hidden_state[real]
        results = [model(ids, attention_mask=mask).last_hidden_state[real] for _ in range(4)]
    for result in results:
        assert result.dtype == dtype and result.device.type == device
        _near(result, right, dtype)
    assert torch.equal(results[2], results[3])
    ctxfast.restore(model)
    for (name, one), two in zip(model.state_dict().items(), other.to(dtype).state_dict().values()):
        assert torch.equal(one, two), name


@every_device
def test_swapped_encoders_train(device: str) -> None:
    other, model = (tiny_model("Bert", "ForMaskedLM", **WIDE).to(device).train() for _ in range(2))
    ctxfast.swap_in(model, strict=True)
    ids, mask = IDS.to(device), MASK.to(device)
    labels = torch.where(mask.bool(), ids, -100)
    for each in (other, model):
        each(ids, attention_mask=mask, labels=labels).loss.backward()
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters()):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            _near(one.grad, two.grad)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_swapped_tagger(device: str, dtype: torch.dtype) -> None:
    """A packed biLSTM of a size that the persistent kernels take."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(48, 128, num_layers=2, bidirectional=True, batch_first=True)).to(device, dtype).eval()
    x, lengths = torch.randn(9, 7, 48).to(device, dtype), torch.tensor([7, 1, 3, 7, 2, 6, 5, 4, 7])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    with torch.no_grad():
        plain = model(packed)
        ctxfast.swap_in(model, strict=True)
        swapped = model(packed)
    _near(swapped[0].data, plain[0].data, dtype)
    for one, two in zip(swapped[1], plain[1]):
        _near(one, two, dtype)


# Embedder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@every_device
@pytest.mark.parametrize("options", [{}, dict(layers="all"), dict(level="sentence")], ids=lambda value: str(value))
def test_embedder_of_bert(device: str, options: dict[str, Any], bert: Path) -> None:
    """Several batches, each size twice and more, as one batch on references in float32 has it."""
    embedder = Embedder(bert, device=device, batch_tokens=16)
    texts = TEXTS * 3
    found = embedder(texts, **options)
    with ctxfast.use_impl("reference"):
        right = Embedder(bert, device="cpu")(texts, **options)
    assert len(found) == len(right) == len(texts)
    for one, two in zip(found, right):
        assert one.shape == two.shape and one.dtype == two.dtype
        # On a GPU it may compute in half precision.
        _near(torch.as_tensor(one), torch.as_tensor(two), torch.float16 if device == "cuda" else torch.float32)


@every_device
def test_embedder_of_elmo(device: str, tmp_path: Path) -> None:
    folder = tiny_elmo(tmp_path / "elmo")
    found = Embedder(folder, device=device, batch_tokens=16)([text.split() for text in TEXTS * 2], layers="all")
    right = Embedder(folder, device="cpu", batch_tokens=16)([text.split() for text in TEXTS * 2], layers="all")
    for one, two in zip(found, right):
        assert one.shape == two.shape
        _near(torch.as_tensor(one), torch.as_tensor(two), torch.float16 if device == "cuda" else torch.float32)


# training


class _MaskedWords(BaseTask):
    """A tiny BERT that learns which word stands behind a mask: the same batches in every run."""

    def __init__(self, dropout: float) -> None:
        torch.manual_seed(3)
        self.model = BertForMaskedLM(
            BertConfig(
                vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                initializer_range=0.1,
            )
        )  # fmt: skip
        self.losses: list[float] = []

    def batch(self, step: int, rank: int, ranks: int) -> dict[str, Tensor]:
        sample = torch.Generator().manual_seed(step % 4)
        ids = torch.randint(5, 50, (6, 12), generator=sample)
        mask = (torch.arange(12) < torch.randint(3, 13, (6, 1), generator=sample)).long()
        chosen = (torch.rand(ids.shape, generator=sample) < 0.3) & mask.bool()
        chosen[:, 0] = True
        return dict(
            input_ids=torch.where(chosen, 4, ids), attention_mask=mask, labels=torch.where(chosen, ids, -100)
        )  # fmt: skip

    def weight(self, batch: dict[str, Tensor]) -> float:
        return int((batch["labels"] != -100).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss, {}

    def save(self, directory: Path) -> None:
        torch.save(self.model.state_dict(), directory / "model.pt")


def _run(folder: Path, device: str, dropout: float = 0.0, **options: Any) -> list[float]:
    task = _MaskedWords(dropout)
    config = LoopConfig(
        steps=24, learning_rate=3e-3, device=device, parallel="no", log_every=8, save_every=100, **options
    )
    train(task, config, folder)
    assert next(task.model.parameters()).device.type == device
    return task.losses


@every_device
@pytest.mark.parametrize("optimizer", ["adamw", "bert_adam", "lamb"])
def test_training_runs_as_on_references(device: str, optimizer: str, tmp_path: Path) -> None:
    found = _run(tmp_path / "found", device, optimizer=optimizer)
    with ctxfast.use_impl("reference"):
        right = _run(tmp_path / "right", device, optimizer=optimizer)
    assert found[-1] < found[0]
    # Steps amplify what the first ones differ by.
    torch.testing.assert_close(torch.tensor(found[:8]), torch.tensor(right[:8]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(right), rtol=2e-2, atol=2e-2)


@every_device
def test_training_in_half_precision_with_dropout_learns_and_repeats(device: str, tmp_path: Path) -> None:
    runs = [_run(tmp_path / str(i), device, dropout=0.1, amp="bf16") for i in range(2)]
    assert runs[0] == runs[1]
    exact = _run(tmp_path / "exact", device, dropout=0.0)
    assert sum(runs[0][-4:]) < sum(runs[0][:4])
    torch.testing.assert_close(torch.tensor(runs[0][:2]), torch.tensor(exact[:2]), rtol=0.15, atol=0.1)


# torch.compile


@every_device
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])  # inductor also compiles what stands between the ops
def test_a_compiled_model(device: str, backend: str) -> None:
    """One graph without a mask, forward and backward, by sizes that vary."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
    model = ctxfast.Bert(BertConfig(**sizes, **WIDE, initializer_range=0.1)).to(device).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 5), (3, 7)):
        ids = torch.randint(5, 50, shape, device=device)
        with torch.no_grad():
            right = model(ids)
            found = compiled(ids)
        _near(found.last_hidden_state, right.last_hidden_state)
        _near(found.pooler_output, right.pooler_output)
    right = torch.autograd.grad(model(ids).pooler_output.sum(), model.embeddings.word_embeddings.weight)
    found = torch.autograd.grad(compiled(ids).pooler_output.sum(), model.embeddings.word_embeddings.weight)
    _near(found[0], right[0])

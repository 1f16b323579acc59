# SPDX-License-Identifier: Apache-2.0
"""Copies between host and GPU that nobody waits for, on the CPU with a stand-in for torch.cuda."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.fake_cuda import Event, FakeCuda
from support.fake_encoder import FakeEncoder, vectors
from torch import Tensor

import ctxfast
from ctxfast._core import checks, transfer
from ctxfast.embedding.embedder import Embedder
from ctxfast.models.bert.config import BertConfig
from ctxfast.packing import Packing

CONFIG = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """CPU tensors pass for a GPU's."""
    fake = FakeCuda()
    monkeypatch.setattr(transfer, "cuda", fake)
    monkeypatch.setattr(transfer, "is_gpus", lambda device: True)
    monkeypatch.setattr(torch, "empty", lambda *args, own=torch.empty, pin_memory=False, **kw: own(*args, **kw))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: fake.log.append(("pinned", tuple(self.shape))) or self)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: fake.log.append(("kept for", stream)))
    return fake


def test_results_are_copied_beside_the_next_batch(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch's copy waits for its own computation on a stream of its own, and is waited for after the next batch
    was started."""
    embedder = Embedder(FakeEncoder(), batch_tokens=3)
    own, computed = embedder.encoder.encode, []

    def encode(batch: Sequence, selection: object) -> Tensor:
        assert cuda.current_stream() is cuda.defaults[0]
        computed.append(len(cuda.log))
        return own(batch, selection)

    monkeypatch.setattr(embedder.encoder, "encode", encode)
    copy = Tensor.copy_

    def copied(self: Tensor, other: Tensor, **options: object) -> Tensor:
        cuda.log.append(("copy", cuda.current_stream()))
        return copy(self, other)

    monkeypatch.setattr(Tensor, "copy_", copied)
    texts = [["a", "b"], ["c"], ["d", "e", "f"], ["g", "h"]]
    found = embedder(texts)
    for text, one in zip(texts, found, strict=True):
        np.testing.assert_array_equal(one, vectors(text)[-1])
    (side,) = cuda.streams
    copies = [at for at, (what, stream) in enumerate(cuda.log) if what == "copy" and stream is side]
    finished = [at for at, (what, _) in enumerate(cuda.log) if what == "synchronize"]
    assert len(copies) == len(finished) == len(computed) >= 3
    assert cuda.waits == [(side, cuda.defaults[0])] * len(copies)
    assert [what for what, stream in cuda.log if stream is side].count("kept for") == len(copies)
    for number in range(len(computed) - 1):
        assert copies[number] < finished[number] and computed[number + 1] < finished[number]
    assert isinstance(Event, type) and pickle.loads(pickle.dumps(embedder._to_host))._streams == {}


def test_lengths_go_to_a_device_through_pinned_memory(cuda: FakeCuda) -> None:
    packing = Packing.from_lengths((3, 0, 5), 6)
    assert sorted(shape for what, shape in cuda.log) == [(4,), (8,)]
    mask = torch.arange(6) < torch.tensor([[3], [0], [5]])
    other = Packing.from_mask(mask)
    assert torch.equal(packing.indices, other.indices) and torch.equal(packing.cu_seqlens, other.cu_seqlens)


@pytest.fixture
def bert() -> ctxfast.Bert:
    torch.manual_seed(0)
    return ctxfast.Bert(CONFIG).eval()


IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", ["zero", "keep"])
@pytest.mark.parametrize("lengths", [(3, 1, 5), [6, 6, 6], torch.tensor([2, 0, 6]), np.array([4, 4, 4])])
@torch.no_grad()
def test_lengths_in_place_of_a_mask(bert: ctxfast.Bert, lengths: Sequence[int], padding: str) -> None:
    mask = (torch.arange(6) < torch.as_tensor(lengths)[:, None]).long()
    found, expected = bert(IDS, lengths=lengths, padding=padding), bert(IDS, mask, padding=padding)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert found.packing.lengths == expected.packing.lengths


def test_lengths_reach_a_model_under_its_head() -> None:
    torch.manual_seed(0)
    model = ctxfast.BertForTokenClassification(CONFIG).eval()
    mask = (torch.arange(6) < torch.tensor([[3], [1], [5]])).long()
    with torch.no_grad():
        assert torch.equal(model(IDS, lengths=(3, 1, 5)).logits, model(IDS, mask).logits)


@pytest.mark.parametrize(
    "lengths, mask, message",
    [
        ((3, 1), None, "lengths has 2 entries; expected 3"),
        ((3, 1, 7), None, "lengths holds 7; expected values in 0..6"),
        ((3, 1, 5), torch.ones(3, 6), "lengths and attention_mask are both given"),
    ],
)
def test_wrong_lengths(bert: ctxfast.Bert, lengths: Sequence[int], mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert(IDS, mask, lengths=lengths)


def test_nothing_about_lengths_is_read_back(
    bert: ctxfast.Bert, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)  # as on a GPU
    with torch.no_grad():
        expected = bert(IDS, lengths=(3, 1, 5)).last_hidden_state
        for name in ("tolist", "item", "__bool__", "__int__", "cpu", "numpy"):
            monkeypatch.setattr(Tensor, name, lambda self, name=name: pytest.fail(f"{name} of {tuple(self.shape)}"))
        with ctxfast.use_impl(attention="cpu"):
            found = bert(IDS, lengths=(3, 1, 5)).last_hidden_state
    monkeypatch.undo()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_call_with_lengths_never_waits() -> None:
    model = ctxfast.Bert(CONFIG).eval().cuda()
    ids = IDS.cuda()
    with torch.no_grad():
        for _ in range(3):
            expected = model(ids, lengths=(3, 1, 5)).last_hidden_state
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = model(ids, lengths=(3, 1, 5)).last_hidden_state
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)

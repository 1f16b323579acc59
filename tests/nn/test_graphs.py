# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of packed functions: buckets, what fills them up, and what drops them.

On the CPU a stand-in for a graph runs the captured function again on the same memory, which is what a replay does.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import ctxfast
from ctxfast.models.bert.config import BertConfig
from ctxfast.nn import graphs
from ctxfast.nn.graphs import PackedGraphs
from ctxfast.packing import Packing
from ctxfast.swap.transformers_layers import is_capture

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=600,
)  # fmt: skip


class Rerun:
    """Poses as a captured graph: a call runs the function again and overwrites the same outputs."""

    made = 0
    replaying = False  # a true replay runs no Python

    def __init__(self, run: Callable[[], Sequence[Tensor]], pool: object) -> None:
        Rerun.made += 1
        self.run, self.outputs = run, tuple(output.clone() for output in run())

    def __call__(self) -> None:
        Rerun.replaying = True
        with torch.inference_mode(False), torch.no_grad():
            for output, fresh in zip(self.outputs, self.run()):
                output.copy_(fresh)
        Rerun.replaying = False


class OnCpu(PackedGraphs):
    def __init__(self, **options: object) -> None:
        super().__init__(**options, capture=Rerun)

    def can_run(self, tokens: Tensor) -> bool:
        return not torch.is_grad_enabled() and 0 < tokens.shape[0] <= self.max_tokens


@pytest.fixture
def bert() -> ctxfast.Bert:
    torch.manual_seed(0)
    model = ctxfast.Bert(CONFIG).eval()
    model._graphs = OnCpu()
    Rerun.made = 0
    return model


def batch(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def plain(model: ctxfast.Bert, *inputs: Tensor, **options: bool) -> ctxfast.models.bert.modeling.BertOutput:
    model.cuda_graphs = False
    try:
        return model(*inputs, **options)
    finally:
        model.cuda_graphs = True


def test_buckets_hold_what_they_are_made_for() -> None:
    for n in range(1, 5000):
        assert n <= graphs.token_bucket(n) <= max(n * 1.125 + 1, n + 15)
        assert graphs.token_bucket(n) % 16 == 0
        assert n <= graphs.seqlen_bucket(n)
        assert n <= graphs.sequence_bucket(n) < 2 * n
    assert len({graphs.token_bucket(n) for n in range(1, 16385)}) < 80


@pytest.mark.parametrize("lengths", [[1], [5, 3], [16], [17, 1, 9, 30], [64, 65, 2], [100] * 5, [513, 3]])
@pytest.mark.parametrize("hidden_states", [False, True])
def test_same_results_through_a_graph(bert: ctxfast.Bert, lengths: list[int], hidden_states: bool) -> None:
    for seed in range(4):
        inputs = batch(lengths, seed)
        with torch.no_grad():
            got = bert(*inputs, output_hidden_states=hidden_states)
        expected = plain(bert, *inputs, output_hidden_states=hidden_states)
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=2e-6, rtol=0)
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=2e-6, rtol=0)
        assert (got.hidden_states is None) == (not hidden_states)
        for a, b in zip(got.hidden_states or (), expected.hidden_states or ()):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    assert Rerun.made == 1


def test_sizes_of_one_bucket_share_a_graph_and_leave_nothing_behind(bert: ctxfast.Bert) -> None:
    shapes = [[30, 30, 20], [29, 31, 7], [32, 32, 16], [30, 20, 28], [17, 32, 30]]
    with torch.no_grad():
        first = [bert(*batch(lengths)).last_hidden_state for lengths in shapes]
        again = [bert(*batch(lengths)).last_hidden_state for lengths in shapes]
    assert Rerun.made == len(bert._graphs) <= 2
    for lengths, one, two in zip(shapes, first, again):
        expected = plain(bert, *batch(lengths)).last_hidden_state
        torch.testing.assert_close(one, expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(two, expected, atol=2e-6, rtol=0)


def test_results_belong_to_the_caller(bert: ctxfast.Bert) -> None:
    with torch.no_grad():
        bert(*batch([9, 4]))
        kept = bert(*batch([9, 4], 1)).packed_last_hidden_state
        before = kept.clone()
        bert(*batch([9, 4], 2))
    assert torch.equal(kept, before)


def test_changed_weights_are_seen(bert: ctxfast.Bert) -> None:
    inputs = batch([9, 4])

    def check() -> None:
        with torch.no_grad():
            got = bert(*inputs).last_hidden_state
        torch.testing.assert_close(got, plain(bert, *inputs).last_hidden_state, atol=2e-6, rtol=0)

    for _ in range(3):
        check()
    with torch.no_grad():  # in place: the graph goes on
        bert.encoder.layer[0].intermediate.dense.weight.mul_(1.5)
    check()
    assert Rerun.made == 1
    weight = bert.encoder.layer[1].output.dense.weight  # another tensor: it is made anew
    bert.encoder.layer[1].output.dense.weight = torch.nn.Parameter(weight.detach() * 2)
    for _ in range(3):
        check()
    assert Rerun.made == 2 and len(bert._graphs) == 1
    bert.load_state_dict({name: tensor * 0.5 for name, tensor in bert.state_dict().items()}, assign=True)
    for _ in range(3):
        check()
    bert.encoder.layer[0] = copy.deepcopy(bert.encoder.layer[1])  # another module
    for _ in range(3):
        check()
    assert Rerun.made == 4


def test_hooks_run_and_come_in_later(bert: ctxfast.Bert) -> None:
    inputs, seen = batch([5, 6]), []

    def hook(*_: object) -> None:
        if not Rerun.replaying:
            seen.append(1)

    with torch.no_grad():
        for _ in range(3):
            bert(*inputs)
        handle = bert.encoder.layer[0].register_forward_hook(hook)
        for _ in range(3):
            bert(*inputs)
        assert len(seen) == 3 and Rerun.made == 1
        handle.remove()
        for _ in range(3):
            bert(*inputs)
    assert len(seen) == 3 and Rerun.made == 2


def test_training_gradients_and_the_switch_go_without(bert: ctxfast.Bert) -> None:
    inputs = batch([5, 6])
    for _ in range(3):
        assert bert(*inputs).last_hidden_state.requires_grad
    bert.train()
    with torch.no_grad():
        for _ in range(3):
            bert(*inputs)
    bert.eval().cuda_graphs = False
    with torch.no_grad():
        for _ in range(3):
            bert(*inputs)
    assert Rerun.made == 0


def test_asking_for_an_implementation_is_another_graph(bert: ctxfast.Bert) -> None:
    inputs = batch([5, 6])
    with torch.no_grad():
        for _ in range(2):
            bert(*inputs)
            with ctxfast.use_impl("reference"):
                bert(*inputs)
    assert Rerun.made == 2


def test_number_of_graphs_is_bounded(bert: ctxfast.Bert) -> None:
    bert._graphs = OnCpu(max_graphs=3)
    with torch.no_grad():
        for length in (10, 30, 50, 70, 90):
            for _ in range(2):
                bert(*batch([length]))
        assert len(bert._graphs) == 3 and Rerun.made == 5
        bert(*batch([90]))
        assert Rerun.made == 5
        bert(*batch([10]))  # was dropped: counts as new
        bert(*batch([10]))
        assert Rerun.made == 6 and len(bert._graphs) == 3
        bert._graphs = OnCpu(max_tokens=20)
        for _ in range(3):
            bert(*batch([21]))
        assert len(bert._graphs) == 0
    bert._graphs.clear()


def test_inference_mode_and_no_grad_share_a_graph(bert: ctxfast.Bert) -> None:
    inputs = batch([9, 4])
    with torch.inference_mode():
        for _ in range(2):
            bert(*inputs)
    with torch.no_grad():
        got = bert(*inputs).last_hidden_state
    with torch.inference_mode():
        assert torch.equal(got, bert(*inputs).last_hidden_state)
    assert Rerun.made == 1


def test_copies_and_pickles_start_empty(bert: ctxfast.Bert) -> None:
    bert._graphs = PackedGraphs(max_graphs=5)
    bert._graphs._buckets["some size"] = None
    for other in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
        assert other._graphs is not bert._graphs
        assert other._graphs.max_graphs == 5 and not other._graphs._buckets


def test_a_cpu_call_never_asks_for_a_graph() -> None:
    assert not PackedGraphs().can_run(torch.zeros(3))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = ctxfast.Bert(CONFIG).eval().cuda()
    for lengths in ([9, 4], [60, 64, 1], [513, 3]):
        for seed in range(3):
            ids, mask = (tensor.cuda() for tensor in batch(lengths, seed))
            with torch.no_grad():
                got = model(ids, mask)
            expected = plain(model, ids, mask)
            torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert len(model._graphs) == 3
    streams = [torch.cuda.Stream() for _ in range(2)]
    ids, mask = (tensor.cuda() for tensor in batch([9, 4]))
    torch.cuda.synchronize()
    results = []
    with torch.no_grad():
        for i in range(20):
            with torch.cuda.stream(streams[i % 2]):
                results.append(model(ids, mask).last_hidden_state)
    torch.cuda.synchronize()
    assert all(torch.equal(result, results[0]) for result in results)
    packing = Packing.from_mask(mask)
    assert packing.total == 13


@torch.no_grad()
def test_swapped_encoders_go_through_graphs() -> None:
    from support.hf_models import IDS, MASK, tiny_model

    for kind in ("Bert", "DistilBert"):
        model, other = tiny_model(kind), tiny_model(kind)
        ctxfast.swap_in(model)
        encoder = model.encoder if kind == "Bert" else model.transformer
        encoder.__dict__["_ctxfast_graphs"] = OnCpu(is_harmless=is_capture)
        Rerun.made = 0
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        for call in range(3):
            found = model(IDS, attention_mask=MASK).last_hidden_state
            torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
            assert len(encoder._ctxfast_graphs) == (call > 0)
        states = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        assert len(states) == 3 and Rerun.made == 1, "collecting hidden states runs without a graph"
        for parameter in encoder.parameters():  # in place: the graph reads them where they lie
            parameter.mul_(1.1)
        for parameter in (other.encoder if kind == "Bert" else other.transformer).parameters():
            parameter.mul_(1.1)
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        found = model(IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
        encoder.cuda_graphs = False
        before = Rerun.made
        model(IDS, attention_mask=MASK)
        assert Rerun.made == before
        copied = copy.deepcopy(model)
        assert len((copied.encoder if kind == "Bert" else copied.transformer)._ctxfast_graphs) == 0
        ctxfast.restore(model)
        assert "_ctxfast_graphs" not in encoder.__dict__ and "cuda_graphs" not in encoder.__dict__

# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of packed functions: buckets, what fills them up, and what drops them.

On the CPU a stand-in for torch.cuda records what is captured and runs it again on the same memory, as a replay does.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.graphed import CONFIG, OnCpu, batch, plain, small_bert
from torch import Tensor

import ctxfast
from ctxfast.nn import graphs
from ctxfast.nn.graphs import PackedGraphs
from ctxfast.packing import Packing

pytestmark = pytest.mark.usefixtures("cuda")


@pytest.fixture
def bert() -> ctxfast.Bert:
    return small_bert()


def test_buckets_hold_what_they_are_made_for() -> None:
    for n in range(1, 5000):
        assert n <= graphs.token_bucket(n) <= max(n * 1.125 + 1, n + 15)
        assert graphs.token_bucket(n) % 16 == 0
        assert n <= graphs.seqlen_bucket(n)
        assert n <= graphs.sequence_bucket(n) < 2 * n
    assert len({graphs.token_bucket(n) for n in range(1, 16385)}) < 80


@pytest.mark.parametrize("lengths", [[1], [5, 3], [16], [17, 1, 9, 30], [64, 65, 2], [100] * 5, [513, 3]])
@pytest.mark.parametrize("hidden_states", [False, True])
def test_same_results_through_a_graph(
    bert: ctxfast.Bert, cuda: FakeCuda, lengths: list[int], hidden_states: bool
) -> None:
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
    assert cuda.made == 1


def test_sizes_of_one_bucket_share_a_graph_and_leave_nothing_behind(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    shapes = [[30, 30, 20], [29, 31, 7], [32, 32, 16], [30, 20, 28], [17, 32, 30]]
    with torch.no_grad():
        first = [bert(*batch(lengths)).last_hidden_state for lengths in shapes]
        again = [bert(*batch(lengths)).last_hidden_state for lengths in shapes]
    assert cuda.made == len(bert._graphs) <= 2
    for lengths, one, two in zip(shapes, first, again):
        expected = plain(bert, *batch(lengths)).last_hidden_state
        torch.testing.assert_close(one, expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(two, expected, atol=2e-6, rtol=0)


def test_what_fills_a_bucket_up_does_not_double_its_sequences(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    for texts in (32, 64, 256):
        for seed in range(2):
            with torch.no_grad():
                bert(*batch([3] * (texts - 1) + [13], seed))
        (bucket,) = [each for each in bert._graphs._buckets.values() if isinstance(each, graphs._Bucket)]
        assert texts < bucket.cu_seqlens.shape[0] - 1 <= 1.125 * texts + 1
        bert._graphs.clear()


@pytest.mark.parametrize("lengths", [[9, 4], [9, 0, 4], [0, 16], [5, 5, 6, 0, 0]])
def test_the_pooler_is_in_the_graph(bert: ctxfast.Bert, cuda: FakeCuda, lengths: list[int]) -> None:
    for seed in range(4):
        inputs = batch(lengths, seed)
        with torch.no_grad():
            got = bert(*inputs).pooler_output
        torch.testing.assert_close(got, plain(bert, *inputs).pooler_output, atol=2e-6, rtol=0)
        assert (got[[length == 0 for length in lengths]] == 0).all()
    assert cuda.made == 1 and cuda.replayed == 3


def test_a_pooler_of_somebody_elses_is_called(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: Tensor, packing: Packing) -> Tensor:
            return packing.unpack(x).sum(1)

    bert.pooler = Mean().eval()
    inputs = batch([9, 4])
    for _ in range(3):
        with torch.no_grad():
            got = bert(*inputs)
        torch.testing.assert_close(got.pooler_output, got.last_hidden_state.sum(1))
    assert cuda.made == 1


def test_results_belong_to_the_caller(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    with torch.no_grad():
        bert(*batch([9, 4]))
        kept = bert(*batch([9, 4], 1)).packed_last_hidden_state
        before = kept.clone()
        bert(*batch([9, 4], 2))
    assert torch.equal(kept, before)


def test_changed_weights_are_seen(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
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
    assert cuda.made == 1
    weight = bert.encoder.layer[1].output.dense.weight  # another tensor: it is made anew
    bert.encoder.layer[1].output.dense.weight = torch.nn.Parameter(weight.detach() * 2)
    for _ in range(3):
        check()
    assert cuda.made == 2 and len(bert._graphs) == 1
    bert.load_state_dict({name: tensor * 0.5 for name, tensor in bert.state_dict().items()}, assign=True)
    for _ in range(3):
        check()
    bert.encoder.layer[0] = copy.deepcopy(bert.encoder.layer[1])  # another module
    for _ in range(3):
        check()
    assert cuda.made == 4


def test_hooks_run_and_come_in_later(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    inputs, seen = batch([5, 6]), []

    def hook(*_: object) -> None:
        seen.append(1)

    with torch.no_grad():
        for _ in range(3):
            bert(*inputs)
        handle = bert.encoder.layer[0].register_forward_hook(hook)
        for _ in range(3):
            bert(*inputs)
        assert len(seen) == 3 and cuda.made == 1
        handle.remove()
        for _ in range(3):
            bert(*inputs)
    assert len(seen) == 3 and cuda.made == 2


def test_training_gradients_and_the_switch_go_without(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
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
    assert cuda.made == 0


def test_asking_for_an_implementation_is_another_graph(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    inputs = batch([5, 6])
    with torch.no_grad():
        for _ in range(2):
            bert(*inputs)
            with ctxfast.use_impl("reference"):
                bert(*inputs)
    assert cuda.made == 2


def test_number_of_graphs_is_bounded(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    bert._graphs = OnCpu(max_graphs=3)
    with torch.no_grad():
        for length in (10, 30, 50, 70, 90):
            for _ in range(2):
                bert(*batch([length]))
        assert len(bert._graphs) == 3 and cuda.made == 5
        bert(*batch([90]))
        assert cuda.made == 5
        bert(*batch([10]))  # was dropped: counts as new
        bert(*batch([10]))
        assert cuda.made == 6 and len(bert._graphs) == 3
        bert._graphs = OnCpu(max_tokens=20)
        for _ in range(3):
            bert(*batch([21]))
        assert len(bert._graphs) == 0
    bert._graphs.clear()


def test_inference_mode_and_no_grad_share_a_graph(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    inputs = batch([9, 4])
    with torch.inference_mode():
        for _ in range(2):
            bert(*inputs)
    with torch.no_grad():
        got = bert(*inputs).last_hidden_state
    with torch.inference_mode():
        assert torch.equal(got, bert(*inputs).last_hidden_state)
    assert cuda.made == 1


def test_copies_and_pickles_start_empty(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    bert._graphs = PackedGraphs(max_graphs=5)
    bert._graphs._buckets["some size"] = None
    for other in (copy.deepcopy(bert), pickle.loads(pickle.dumps(bert))):
        assert other._graphs is not bert._graphs
        assert other._graphs.max_graphs == 5 and not other._graphs._buckets


def test_a_cpu_call_never_asks_for_a_graph() -> None:
    assert not PackedGraphs().can_run(torch.zeros(3))


def test_whatever_changes_the_arithmetic_is_seen(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    inputs = batch([9, 4])
    layer = bert.encoder.layer[0]
    other = type("Other", (type(layer.intermediate),), {})
    changes = {
        "eps": lambda: setattr(layer.output.LayerNorm, "eps", 0.5),
        "activation": lambda: setattr(layer.intermediate, "activation", "relu"),
        "impl": lambda: setattr(layer.attention.self, "impl", "reference"),
        "quantisation": lambda: bert.quantize("int8"),
        "and back": lambda: bert.quantize(None),
        "the embeddings' eps": lambda: setattr(bert.embeddings.LayerNorm, "eps", 0.25),
        "another class": lambda: setattr(layer.intermediate, "__class__", other),
        "another function": lambda: setattr(layer.output, "forward", layer.output.forward),
        "and its own": lambda: delattr(layer.output, "forward"),
        "data": lambda: setattr(layer.output.dense.weight, "data", layer.output.dense.weight.data * 2),
        "a setting of the model": lambda: setattr(bert, "extra", 1),
        "a buffer": lambda: layer.register_buffer("extra", torch.ones(2)),
    }
    for name, change in changes.items():
        for _ in range(3):
            with torch.no_grad():
                bert(*inputs)
        made = cuda.made
        change()
        with torch.no_grad():
            got = bert(*inputs).last_hidden_state
        expected = plain(bert, *inputs).last_hidden_state
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0, msg=name)
        with torch.no_grad():
            for _ in range(2):
                bert(*inputs)
        assert cuda.made == made + (name != "another function"), name


def test_graphs_do_not_keep_a_model(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    gc.collect()
    gc.disable()
    try:
        model = copy.deepcopy(bert)
        model._graphs = OnCpu()
        with torch.no_grad():
            for _ in range(3):
                model(*batch([9, 4]))
        assert len(model._graphs) == 1
        weight = weakref.ref(model.encoder.layer[0].output.dense.weight)
        del model
        assert weight() is None and [pool.graphs for pool in cuda.pools.values()] == [0]
    finally:
        gc.enable()


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

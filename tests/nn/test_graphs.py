# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of packed functions: buckets, what fills them up, and what drops them.

On the CPU a stand-in for torch.cuda records what is captured and runs it again on the same memory, as a replay does.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from support import fake_cuda
from support.fake_cuda import FakeCuda
from torch import Tensor

import ctxfast
from ctxfast.models.bert.config import BertConfig
from ctxfast.nn import graph_capture, graphs
from ctxfast.nn.graph_capture import CannotCapture, Place, Refusing
from ctxfast.nn.graphs import PackedGraphs
from ctxfast.packing import Packing
from ctxfast.swap import transformers_layers
from ctxfast.swap.transformers_layers import is_capture

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=600,
)  # fmt: skip


class OnCpu(PackedGraphs):
    def can_run(self, tokens: Tensor) -> bool:
        return not torch.is_grad_enabled() and 0 < tokens.shape[0] <= self.max_tokens


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda | None:
    if request.node.get_closest_marker("gpu") is not None:
        return None
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def bert() -> ctxfast.Bert:
    torch.manual_seed(0)
    model = ctxfast.Bert(CONFIG).eval()
    model._graphs = OnCpu()
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


def test_every_device_captures_on_a_stream_of_its_own(cuda: FakeCuda) -> None:
    """A capture on another device's stream records nothing, and its replays leave what the warm-up left."""
    x = torch.zeros(3)
    for index in (0, 1, 1, 0):
        device = cuda.computes_on = torch.device("cuda", index)
        place = Place(device)
        for _ in range(3):
            with torch.no_grad(), cuda.device(f"cuda:{1 - index}"):  # whatever device the caller's thread is at
                captured = place.capture(lambda: [x + 1], lambda: [x], lambda given: [given + 1])
            x.fill_(5)
            captured()
            assert captured.outputs[0].tolist() == [6, 6, 6]
        made = [stream for stream in cuda.streams if stream.device == device]
        assert len(cuda.streams) == 1 and made == cuda.streams, "one stream, on the graphs' device"
        assert (made[0], cuda.defaults[index]) in cuda.waits and (cuda.defaults[index], made[0]) in cuda.waits
        cuda.streams.clear()


def test_one_stream_for_all_buckets(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    with torch.no_grad():
        for length in (10, 30, 50, 70):
            for _ in range(2):
                bert(*batch([length]))
    assert cuda.made == 4 and len(cuda.streams) == 1


@pytest.mark.parametrize("fails_after", [0, 9])
def test_a_capture_that_fails_leaves_nothing_behind(bert: ctxfast.Bert, cuda: FakeCuda, fails_after: int) -> None:
    inputs, others = batch([9, 4]), batch([60, 20])
    with torch.no_grad():
        for _ in range(2):
            bert(*others)
        cuda.fails_after = fails_after
        bert(*inputs)
        with pytest.warns(UserWarning, match="without from now on: operation not permitted") as said:
            got = bert(*inputs).last_hidden_state
            for _ in range(3):
                bert(*inputs)
            bert(*batch([200]))
            bert(*batch([200]))
    assert len([each for each in said if "CUDA graph" in str(each.message)]) == 1
    torch.testing.assert_close(got, plain(bert, *inputs).last_hidden_state, atol=2e-6, rtol=0)
    assert cuda.capturing is None and cuda.renewed and cuda.current_stream() is cuda.defaults[0]
    assert cuda.made == 1 and [pool.graphs for pool in cuda.pools.values()] == [1]
    cuda.fails_after = None
    with torch.no_grad():
        bert(*inputs)
        assert cuda.made == 1, "a bucket that failed is left alone"
        for _ in range(2):
            replayed = cuda.replayed
            bert(*others)
            assert cuda.replayed == replayed + 1
        for _ in range(2):
            bert(*batch([300]))
    assert cuda.made == 2


def test_what_waits_for_the_gpu_is_found_before_a_capture(
    bert: ctxfast.Bert, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Adapter(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * (1.0 if float(x.sum()) > 0 else 2.0))

    # The CPU's own checks read ids and offsets, which a GPU's do not.
    monkeypatch.setattr(graph_capture, "_is_on_gpu", lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point())
    dense = bert.encoder.layer[1].output.dense
    adapter = Adapter(dense.in_features, dense.out_features)
    adapter.load_state_dict(dense.state_dict())
    bert.encoder.layer[1].output.dense = adapter.eval()
    inputs = batch([9, 4])
    with torch.no_grad():
        bert(*inputs)
        with pytest.warns(UserWarning, match="_local_scalar_dense.*the host waits for"):
            got = bert(*inputs).last_hidden_state
    torch.testing.assert_close(got, plain(bert, *inputs).last_hidden_state, atol=2e-6, rtol=0)
    assert cuda.made == 0 and not cuda.renewed


@pytest.mark.parametrize(
    "function, waits",
    [
        (lambda x: x[x > 0], True),
        (lambda x: x[torch.tensor([0, 2])], False),
        (lambda x: x.index_put((x > 0,), torch.tensor(1.0)), True),
        (lambda x: x.nonzero(), True),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1])), True),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1]), output_size=4), False),
        (lambda x: torch.where(x > 0, x, 0).softmax(0), False),
        (lambda x: x.to("meta"), True),
        (lambda x: bool(x.any()), True),
    ],
)
def test_operations_that_wait(function: object, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_capture, "_is_on_gpu", lambda leaf: isinstance(leaf, Tensor))
    with pytest.raises(CannotCapture) if waits else nullcontext(), Refusing():
        function(torch.tensor([1.0, -1.0, 2.0]))


def test_outputs_of_all_graphs_share_the_memory_of_the_largest(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    """Hidden states of all layers, kept by every graph, took gigabytes."""
    sizes: dict[int, int] = {}
    for lengths in ([400], [380], [390, 8], [200, 190], [100] * 4, [33] * 12, [300, 90]):
        for _ in range(3):
            with torch.no_grad():
                bert(*batch(lengths), output_hidden_states=True)
        sizes[len(bert._graphs)] = bert._graphs._places[torch.device("cpu")].size()
    # Buckets differ by an eighth: the pool grows by fragments, not by a graph's outputs each.
    assert max(sizes) >= 6 and sizes[max(sizes)] < 1.5 * sizes[1]


def test_memory_is_bounded(bert: ctxfast.Bert, cuda: FakeCuda) -> None:
    def call(length: int) -> None:
        inputs = batch([length])
        with torch.no_grad():
            got = bert(*inputs).last_hidden_state
        torch.testing.assert_close(got, plain(bert, *inputs).last_hidden_state, atol=2e-6, rtol=0)

    for length in (100, 100, 200, 200):
        call(length)
    place = bert._graphs._places[torch.device("cpu")]
    bert._graphs.max_bytes = place.size() + 1000
    for _ in range(2):
        call(400)
    assert len(bert._graphs) == 0 and place.size() == 0, "too large beside the others: all make room"
    call(400)
    call(100)
    assert len(bert._graphs) == 1, "alone it is too large, and stays without; the others come back"
    made = cuda.made
    for _ in range(3):
        call(400)
    assert cuda.made == made and len(bert._graphs) == 1
    assert place.size() <= bert._graphs.max_bytes
    assert place.limit() == 1 << 37


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


@pytest.mark.gpu
def test_another_gpu_has_graphs_of_its_own() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        torch.manual_seed(0)
        model = ctxfast.Bert(CONFIG).eval().to(device)
        for seed in range(4):
            ids, mask = (tensor.to(device) for tensor in batch([9, 4], seed))
            with torch.no_grad():
                got = model(ids, mask).last_hidden_state
            expected = plain(model, ids, mask).last_hidden_state
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert len(model._graphs) == 1


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is not found beforehand here, and CUDA breaks the capture off."""
    monkeypatch.setattr(graph_capture, "Refusing", nullcontext)
    torch.manual_seed(0)
    model = ctxfast.Bert(CONFIG).eval().cuda()
    ids, mask = (tensor.cuda() for tensor in batch([9, 4]))
    others = batch([60, 20])[0].cuda()
    with torch.no_grad():
        for _ in range(2):
            model(others)

        class Waiting(torch.nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x * (1.0 if float(x.sum()) < 1e9 else 2.0))

        dense = model.encoder.layer[1].output.dense
        waiting = Waiting(dense.in_features, dense.out_features).cuda().eval()
        waiting.load_state_dict(dense.state_dict())
        model.encoder.layer[1].output.dense = waiting
        expected = model(ids, mask).last_hidden_state
        stream = torch.cuda.current_stream()
        with pytest.warns(UserWarning, match="without from now on"):
            got = model(ids, mask).last_hidden_state
        torch.testing.assert_close(got, expected)
        assert torch.cuda.current_stream() == stream
        assert torch.isfinite(torch.rand(3, device="cuda")).all(), "random numbers go on"
        torch.cuda.empty_cache()  # raises while the allocator believes in a capture
        model.encoder.layer[1].output.dense = dense
        for _ in range(3):
            got = model(ids, mask).last_hidden_state
        assert len(model._graphs) == 1
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_graphs_share_memory_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = ctxfast.Bert(CONFIG).eval().cuda()
    shapes = ([400], [390, 8], [200, 190], [100] * 4, [33] * 12)
    with torch.no_grad():
        for lengths in shapes:
            ids, mask = (tensor.cuda() for tensor in batch(lengths))
            for _ in range(2):
                model(ids, mask, output_hidden_states=True)
        for lengths in reversed(shapes):
            ids, mask = (tensor.cuda() for tensor in batch(lengths, 1))
            got = model(ids, mask, output_hidden_states=True).hidden_states
            expected = plain(model, ids, mask, output_hidden_states=True).hidden_states
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        (place,) = model._graphs._places.values()
        assert 0 < place.size() <= 64 << 20
        model._graphs.max_bytes = 1
        ids = batch([513])[0].cuda()
        for _ in range(4):
            got = model(ids).last_hidden_state
        torch.testing.assert_close(got, plain(model, ids).last_hidden_state, atol=1e-5, rtol=1e-4)
        assert len(model._graphs) == 0 and place.size() == 0


@torch.no_grad()
def test_swapped_encoders_go_through_graphs(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.hf_models import IDS, MASK, tiny_model

    monkeypatch.setattr(transformers_layers, "_is_on_gpu", lambda tensor: True)

    for kind in ("Bert", "DistilBert"):
        model, other = tiny_model(kind), tiny_model(kind)
        ctxfast.swap_in(model)
        encoder = model.encoder if kind == "Bert" else model.transformer
        encoder.__dict__["_ctxfast_graphs"] = OnCpu(is_harmless=is_capture)
        before = cuda.made
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        for call in range(3):
            found = model(IDS, attention_mask=MASK).last_hidden_state
            torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
            assert len(encoder._ctxfast_graphs) == (call > 0)
        states = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        assert len(states) == 3 and cuda.made == before + 1, "collecting hidden states runs without a graph"
        for parameter in encoder.parameters():  # in place: the graph reads them where they lie
            parameter.mul_(1.1)
        for parameter in (other.encoder if kind == "Bert" else other.transformer).parameters():
            parameter.mul_(1.1)
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        found = model(IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
        encoder.cuda_graphs = False
        before = cuda.made
        model(IDS, attention_mask=MASK)
        assert cuda.made == before
        copied = copy.deepcopy(model)
        assert len((copied.encoder if kind == "Bert" else copied.transformer)._ctxfast_graphs) == 0
        ctxfast.restore(model)
        assert "_ctxfast_graphs" not in encoder.__dict__ and "cuda_graphs" not in encoder.__dict__

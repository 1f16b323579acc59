# SPDX-License-Identifier: Apache-2.0
"""Capturing CUDA graphs: streams, devices, memory, captures that fail."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.graphed import CONFIG, batch, plain, small_bert
from torch import Tensor

import ctxfast
from ctxfast.nn import graph_capture
from ctxfast.nn.graph_capture import CannotCapture, Place, Refusing

pytestmark = pytest.mark.usefixtures("cuda")


@pytest.fixture
def bert() -> ctxfast.Bert:
    return small_bert()


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


def test_an_allocator_that_tells_no_sizes(bert: ctxfast.Bert, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("cudaMallocAsync does not yet support a snapshot")

    monkeypatch.setattr(cuda, "memory_snapshot", refuse)
    for _ in range(3):
        with torch.no_grad():
            bert(*batch([9, 4]))
    assert len(bert._graphs) == 1


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

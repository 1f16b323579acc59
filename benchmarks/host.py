# SPDX-License-Identifier: Apache-2.0
"""What the host does in an encoder's call through a CUDA graph, without a GPU: microseconds of this thread before the
replay, which the GPU waits for, and after it, which it works beside.

``python -m benchmarks.host [--layers 12] [--calls 300]``

A stand-in captures by running once, and replays by doing nothing; tensors are a CPU's and small, so that operations
cost their dispatch alone. A launch on a GPU costs about 4 us more each: the column "operations" has how many there are
before the replay. The least of many calls; Hugging Face's whole eager call for scale.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, record_function

import ctxfast
from ctxfast._core import checks
from ctxfast.models.bert.config import BertConfig
from ctxfast.nn.graphs import PackedGraphs
from ctxfast.swap.transformers_layers import is_capture

SIZES = dict(vocab_size=100, hidden_size=64, num_attention_heads=2, intermediate_size=64)
REPLAY = "a graph's replay"
_VIEWS = frozenset(("flatten", "reshape", "expand", "select", "slice", "unflatten", "empty"))  # as called here
_now = time.thread_time_ns


class Instant:
    """In the place of ``graph_capture.Place``: captures by running, replays by noting the time."""

    last = None
    at = 0

    def __init__(self, device: torch.device) -> None:
        self.inputs: tuple[Tensor | None, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()

    def limit(self) -> int:
        return 1

    def size(self) -> int:
        return 0

    def capture(self, warm_up: Callable, inputs: Callable, run: Callable) -> Instant:
        made = Instant(torch.device("cpu"))
        made.inputs = tuple(inputs())
        made.outputs = tuple(warm_up())
        return made

    def __call__(self) -> None:
        Instant.at = _now()
        if torch.autograd._profiler_enabled():
            with record_function(REPLAY):
                pass


class OnCpu(PackedGraphs):
    def can_run(self, tokens: Tensor) -> bool:
        return not torch.is_grad_enabled()


def measured(call: Callable[[], Any], calls: int) -> tuple[float, float, int]:
    """Microseconds before the replay and after it, and operations before it."""
    for _ in range(3):
        call()
    before, after = [], []
    for _ in range(calls):
        start = _now()
        call()
        end = _now()
        before.append(Instant.at - start)
        after.append(end - Instant.at)
    with profile() as seen:
        call()
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    until = next(number for number, event in enumerate(events) if event.name == REPLAY)
    count = sum(event.cpu_parent is None and _computes(event.name) for event in events[:until])
    return min(before) / 1e3, min(after) / 1e3, count


def _computes(name: str) -> bool:
    """Whether an operation is one of torch's, and no view."""
    place, _, name = name.partition("::")
    if place != "aten" or not hasattr(torch.ops.aten, name):
        return False
    packet = getattr(torch.ops.aten, name)
    return not getattr(packet, packet.overloads()[0]).is_view and name not in _VIEWS


def rows(layers: int) -> dict[str, Callable[[], Any]]:
    """Calls by name."""
    ids = torch.randint(1, 100, (8, 64))
    lengths = (64, 60, 33, 20, 16, 9, 5, 3)
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).long()
    config = BertConfig(num_hidden_layers=layers, max_position_embeddings=512, **SIZES)
    bert = ctxfast.Bert(config).eval()
    bert._graphs = OnCpu(place=Instant)
    found: dict[str, Callable[[], Any]] = {
        "Bert, one text": lambda: bert(ids[:1]),
        "Bert, ragged mask": lambda: bert(ids, mask),
        "Bert, ragged lengths": lambda: bert(ids, lengths=lengths),
    }
    try:
        from transformers import BertConfig as Config, BertModel
    except ImportError:
        return found
    model = BertModel(Config(num_hidden_layers=layers, **SIZES)).eval()
    ctxfast.swap_in(model, impl="cpu")
    encoder = model.encoder
    encoder.__dict__["_ctxfast_graphs"] = OnCpu(place=Instant, is_harmless=is_capture)
    x, added = torch.randn(8, 64, 64), (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
    found["swapped encoder, one text"] = lambda: encoder(x[:1])
    found["swapped encoder, ragged mask"] = lambda: encoder(x, added)
    return found


def eager(layers: int, calls: int) -> float | None:
    """Microseconds of a whole eager call of Hugging Face's model, one text."""
    try:
        from transformers import BertConfig as Config, BertModel
    except ImportError:
        return None
    model, ids = BertModel(Config(num_hidden_layers=layers, **SIZES)).eval(), torch.randint(1, 100, (1, 64))
    model(ids)
    times = []
    for _ in range(max(calls // 10, 3)):
        start = _now()
        model(ids)
        times.append(_now() - start)
    return min(times) / 1e3


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, values are not checked: on a GPU nobody reads them."""
    before, checks.is_readable = checks.is_readable, lambda value: False
    try:
        yield
    finally:
        checks.is_readable = before


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--calls", type=int, default=300)
    options = parser.parse_args(argv)
    with as_on_a_gpu():
        _print(options.layers, options.calls)


def _print(layers: int, calls: int) -> None:
    print(f"{'us, ' + str(layers) + ' layers':32s}{'before':>9s}{'after':>9s}{'operations before':>20s}")
    for name, call in rows(layers).items():
        before, after, count = measured(call, calls)
        print(f"{name:32s}{before:9.0f}{after:9.0f}{count:20d}")
    whole = eager(layers, calls)
    if whole is not None:
        print(f"{'Hugging Face, eager, one text':32s}{whole:9.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

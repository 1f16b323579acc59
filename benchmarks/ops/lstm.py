# SPDX-License-Identifier: Apache-2.0
"""``lstm``: ELMo's projected layers and plain biLSTMs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctxfast

from ..cases import Case, Row, Work
from ..inputs import EVERY_WEIGHT, normal
from ..provider import Call, Leaves, Outputs, Provider, Unavailable, leaves_of

_ELMO = dict(I=512, H=4096, P=512, clip=3.0)


def _bilstm_rows() -> Iterator[Row]:
    """Plain biLSTMs as taggers and parsers have them, T = 128, over sizes and batches; trained ones too."""
    for hidden in (256, 512, 1024):
        for batch in (1, 8, 16, 32, 128):
            passes = ("f",) if batch == 16 else ("f", "fb")
            for ragged in (False, True) if batch > 1 else (False,):
                name = f"biLSTM H{hidden} B{batch} T128" + " packed" * ragged
                sizes = dict(B=batch, T=128, R=2, I=512, H=hidden, ragged=ragged)
                yield Row(name, sizes, cpu=(), cuda=("float16",), passes=passes)


ROWS = (
    Row("elmo-original one direction B1 T32", dict(B=1, T=32, R=1, **_ELMO), "small", cpu=EVERY_WEIGHT),
    Row("elmo-original one direction B8 T32", dict(B=8, T=32, R=1, **_ELMO), cpu=EVERY_WEIGHT),
    Row("elmo-original one direction B32 T32", dict(B=32, T=32, R=1, **_ELMO), cpu=EVERY_WEIGHT),
    Row("elmo-original both directions B1 T32", dict(B=1, T=32, R=2, **_ELMO), cpu=EVERY_WEIGHT, cuda=()),
    Row("elmo-original both directions B32 T32 ragged", dict(B=32, T=32, R=2, ragged=True, **_ELMO), cpu=EVERY_WEIGHT),
    Row("elmo-original both directions B1 T128", dict(B=1, T=128, R=2, **_ELMO), "small", cpu=()),
    Row("elmo-original both directions B8 T128", dict(B=8, T=128, R=2, **_ELMO), cpu=()),
    Row("elmo-original both directions B32 T128", dict(B=32, T=128, R=2, **_ELMO), cpu=(), passes=("f", "fb")),
    Row("elmo-original both directions B128 T128", dict(B=128, T=128, R=2, **_ELMO), cpu=(), passes=("f", "fb")),
    Row("elmo-original both directions B8 T128", dict(B=8, T=128, R=2, **_ELMO), cpu=(), passes=("fb",)),
    Row(
        "elmo-original both directions B32 T128 packed",
        dict(B=32, T=128, R=2, ragged=True, **_ELMO),
        cpu=(),
        passes=("f", "fb"),
    ),
    Row("elmo-original one direction B8 T16", dict(B=8, T=16, R=1, **_ELMO), passes=("fb",), cuda=()),
    Row("biLSTM H512 B8 T32", dict(B=8, T=32, R=2, I=512, H=512), "small"),
    Row("biLSTM H512 B8 T32", dict(B=8, T=32, R=2, I=512, H=512), passes=("fb",)),
    Row("biLSTM H512 B32 T32 ragged", dict(B=32, T=32, R=2, I=512, H=512, ragged=True)),
    Row("biLSTM H256 B1 T32", dict(B=1, T=32, R=2, I=512, H=256), cuda=()),
    Row("biLSTM H1024 B1 T32", dict(B=1, T=32, R=2, I=512, H=1024), cuda=()),
    *_bilstm_rows(),
)
TINY = dict(B=3, T=4, R=2, I=5, H=6, P=4, clip=3.0)
GRADS = ("input", "weight_ih", "weight_hh", "bias", "weight_proj")


def make(
    random: torch.Generator, B: int, T: int, R: int, I: int, H: int,  # noqa: E741
    P: int | None = None, clip: float | None = None, ragged: bool = False,
) -> dict[str, Any]:  # fmt: skip
    size = H if P is None else P
    # Weights of this spread keep gates lively and states inside ELMo's clips, so peers without clips compute the same.
    args: dict[str, Any] = dict(
        input=normal(random, B, T, I),
        weight_ih=tuple(normal(random, 4 * H, I, std=I**-0.5) for _ in range(R)),
        weight_hh=tuple(normal(random, 4 * H, size, std=size**-0.5) for _ in range(R)),
        bias=tuple(normal(random, 4 * H, std=0.1) for _ in range(R)),
        weight_proj=None if P is None else tuple(normal(random, P, H, std=H**-0.5) for _ in range(R)),
        lengths=torch.tensor(_ragged(B, T)) if ragged else None,
    )
    return args | (dict(cell_clip=clip, proj_clip=clip) if clip else {})


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    hidden, tokens = sizes["H"], _tokens(sizes)
    size = sizes.get("P") or hidden
    projection = size * hidden if sizes.get("P") else 0
    weights = sizes["R"] * (4 * hidden * size + projection) * itemsize
    return Work(
        flops=(3 if backward else 1) * 2.0 * tokens * sizes["R"] * (4 * hidden * (sizes["I"] + size) + projection),
        tokens=tokens,
        steps=sizes["T"],
        step_bytes=(2.0 if backward else 1.0) * weights,
    )


def _tokens(sizes: dict[str, Any]) -> int:
    """Steps that carry a token, over the whole batch."""
    return sum(_ragged(sizes["B"], sizes["T"])) if sizes.get("ragged") else sizes["B"] * sizes["T"]


def _ragged(count: int, longest: int) -> tuple[int, ...]:
    """``count`` lengths from ``longest`` down to about a quarter of it, in a fixed shuffled order."""
    lengths = [max(1, round(longest * (1 - 0.75 * i / max(count - 1, 1)))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    return tuple(lengths[i] for i in order)


_NAMES = {
    "weight_ih": "weight_ih_l0",
    "weight_hh": "weight_hh_l0",
    "bias": "bias_ih_l0",
    "weight_proj": "weight_hr_l0",
}
_NO_CLIPS = "no clipping; the inputs stay inside the clips"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(item, dtype) for item in value) if isinstance(value, (list, tuple)) else value


def module_lstm(
    args: Mapping[str, Any], directions: Sequence[int], *, trained: bool, kind: Callable[..., nn.Module] = nn.LSTM
) -> tuple[nn.Module, Leaves]:
    """nn.LSTM, or another of its kind, with the weights of these directions; its parameters under ctxfast's names."""
    hidden, size = args["weight_hh"][0].shape[0] // 4, args["weight_hh"][0].shape[1]
    with torch.device("meta"):
        module = kind(
            args["weight_ih"][0].shape[1], hidden, batch_first=True, bidirectional=len(directions) == 2,
            proj_size=size if args["weight_proj"] is not None else 0,
        )  # fmt: skip
    weights: dict[str, Tensor] = {}
    leaves: Leaves = {}
    for name, own in _NAMES.items():
        if args[name] is None:
            continue
        for place, r in enumerate(directions):
            parameter = nn.Parameter(args[name][r].detach().clone(), requires_grad=trained)
            weights[own + ("_reverse" if place else "")] = parameter
            leaves[name] = (*leaves.get(name, ()), parameter)
    for key in [key for key in module.state_dict() if key.startswith("bias_hh")]:
        weights[key] = nn.Parameter(torch.zeros_like(weights[key.replace("_hh", "_ih")]), requires_grad=False)
    module.load_state_dict(weights, assign=True)
    module.flatten_parameters()
    return module, leaves


def _build_nn_lstm(
    dtype: torch.dtype | None = None, *, is_ours: bool = False
) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        options = {name: args.get(name) for name in ("cell_clip", "proj_clip", "weight_dtype")}
        kind = partial(ctxfast.nn.LSTM, **options) if is_ours else nn.LSTM
        args = {name: _cast(value, dtype or case.dtype) for name, value in args.items()}
        lengths, x = args["lengths"], args["input"]
        module, leaves = module_lstm(args, range(len(args["weight_ih"])), trained=case.backward, kind=kind)
        if lengths is None:

            def forward() -> Outputs:
                output, (h, c) = module(x)
                return output, h, c

            return Call(forward, {"input": (x,), **leaves} if case.backward else None)
        if not is_ours and args["weight_proj"] is not None and x.device.type == "cpu" and not _packs_projection():
            raise Unavailable("nn.LSTM(proj_size) takes no packed input on this device and torch")
        rows = lengths.cpu()

        def forward_packed() -> Outputs:
            packed = nn.utils.rnn.pack_padded_sequence(x, rows, batch_first=True, enforce_sorted=False)
            output, (h, c) = module(packed)
            output, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])
            return output, h, c

        return Call(forward_packed, {"input": (x,), **leaves} if case.backward else None)

    return build


def _packs_projection() -> bool:
    module = nn.LSTM(2, 4, proj_size=2, batch_first=True)
    try:
        module(nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 2, 2), torch.tensor([2, 1]), batch_first=True))
    except RuntimeError:
        return False
    return True


def _build_two_lstms(case: Case, args: Mapping[str, Any]) -> Call:
    x = args["input"]
    if len(args["weight_ih"]) != 2:
        raise Unavailable("the case has one direction")
    if args["lengths"] is not None:
        raise Unavailable("flipping whole rows is wrong for rows of different lengths")
    one, leaves = module_lstm(args, (0,), trained=case.backward)
    two, leaves_two = module_lstm(args, (1,), trained=case.backward)
    both = {name: (*leaves[name], *leaves_two[name]) for name in leaves}

    def forward() -> Outputs:
        there, (h_0, c_0) = one(x)
        back, (h_1, c_1) = two(x.flip(1))
        return torch.cat((there, back.flip(1)), dim=2), torch.cat((h_0, h_1)), torch.cat((c_0, c_1))

    return Call(forward, {"input": (x,), **both} if case.backward else None)


def loop_direction(
    x: Tensor,  # (B, T, I)
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_proj: Tensor | None,
    lengths: Sequence[int],  # longest first
    reverse: bool,
    cell_clip: float | None,
    proj_clip: float | None,
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
) -> Outputs:
    """One direction as a Python loop over steps: rows sorted by length, only the still active ones computed at a step.

    This is how ELMo's LSTM was run in PyTorch: the input product over all steps first, then per step a product, the
    gates, the projection and both clips.
    """
    batch, steps, _ = x.shape
    size, hidden = weight_hh.shape[1], weight_hh.shape[0] // 4
    projected = F.linear(x, weight_ih)
    h = x.new_zeros(batch, size) if h_0 is None else h_0
    c = x.new_zeros(batch, hidden) if c_0 is None else c_0
    output = [x.new_zeros(batch, size)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        active = sum(length > t for length in lengths)
        if active == 0:
            continue
        gates = projected[:active, t] + F.linear(h[:active], weight_hh, bias)
        i, f, g, o = gates.split(hidden, dim=1)
        cell = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c[:active]
        if cell_clip is not None:
            cell = torch.clamp(cell, -cell_clip, cell_clip)
        state = torch.sigmoid(o) * torch.tanh(cell)
        if weight_proj is not None:
            state = F.linear(state, weight_proj)
        if proj_clip is not None:
            state = torch.clamp(state, -proj_clip, proj_clip)
        if active == batch:
            h, c, output[t] = state, cell, state
        else:
            h, c = torch.cat((state, h[active:])), torch.cat((cell, c[active:]))
            output[t] = torch.cat((state, x.new_zeros(batch - active, size)))
    return torch.stack(output, dim=1), h, c


def _build_loop(dtype: torch.dtype | None = None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        leaves = leaves_of(case, args)
        args = {name: _cast(value, dtype or case.dtype) for name, value in args.items()}
        x, lengths = args["input"], args["lengths"]
        host = [x.shape[1]] * x.shape[0] if lengths is None else lengths.tolist()
        order = sorted(range(len(host)), key=lambda row: -host[row])
        back = torch.tensor(order).argsort().to(x.device)
        order_index, ordered = torch.tensor(order, device=x.device), [host[row] for row in order]
        is_sorted = lengths is None
        names = ("weight_ih", "weight_hh", "bias", "weight_proj")

        def forward() -> Outputs:
            rows = x if is_sorted else x[order_index]
            results = []
            for r in range(len(args["weight_ih"])):
                weights = (None if args[name] is None else args[name][r] for name in names)
                clips = (args.get("cell_clip"), args.get("proj_clip"))
                results.append(loop_direction(rows, *weights, ordered, r == 1, *clips))
            outputs, h, c = zip(*results)
            merged = torch.cat(outputs, dim=2), torch.stack(h), torch.stack(c)
            return merged if is_sorted else (merged[0][back], merged[1][:, back], merged[2][:, back])

        return Call(forward, leaves)

    return build


def _build_loop_graph(case: Case, args: Mapping[str, Any]) -> Call:
    if case.device != "cuda":
        raise Unavailable("CUDA graphs run on a GPU only")
    if case.backward:
        raise Unavailable("its forward pass only")
    forward = _build_loop()(case, args).forward
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = forward()

    def replay() -> Outputs:
        graph.replay()
        return kept

    return Call(replay)


PEERS = (
    Provider("ctxfast nn.LSTM", _build_nn_lstm(is_ours=True), "the module, fed as nn.LSTM is", ours=True),
    Provider("Python loop (AllenNLP style)", _build_loop()),
    Provider("Python loop in a CUDA graph", _build_loop_graph),
    Provider("nn.LSTM", _build_nn_lstm(), _NO_CLIPS),
    Provider("two nn.LSTM and flip", _build_two_lstms, _NO_CLIPS),
    Provider("Python loop, bfloat16", _build_loop(torch.bfloat16), dtype=torch.bfloat16),
    Provider("nn.LSTM, bfloat16", _build_nn_lstm(torch.bfloat16), _NO_CLIPS, dtype=torch.bfloat16),
)

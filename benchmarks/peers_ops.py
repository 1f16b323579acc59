# SPDX-License-Identifier: Apache-2.0
"""Peers of single ops: torch's own modules, and plain Python loops as the field writes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ctxfast

from .cases import Case
from .peers import Call, Leaves, Outputs, Provider, Unavailable, leaves_of, require

# lstm

_LSTM_NAMES = {
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
    for name, own in _LSTM_NAMES.items():
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
        order_index, ordered, is_sorted = (
            torch.tensor(order, device=x.device),
            [host[row] for row in order],
            lengths is None,
        )
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


# attention


def _padding(args: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Row of each grid place, which places hold tokens, and the grid place of each token."""
    offsets = args["cu_seqlens"].long()
    lengths, longest = offsets[1:] - offsets[:-1], args["max_seqlen"]
    column = torch.arange(longest, device=offsets.device)
    inside = column < lengths[:, None]
    row = (offsets[:-1, None] + column).clamp(max=int(offsets[-1]) - 1)
    return row, inside, inside.flatten().nonzero()[:, 0]


def _build_sdpa(use_mask: bool, backend: str | None = None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        row, inside, places = _padding(args)
        if not use_mask and not bool(inside.all()):
            raise Unavailable("without a mask it is wrong for sequences of different lengths")
        # The peer lives in a padded world: its input comes padded, and packing is not charged to it.
        qkv = args["qkv"].detach()[row].masked_fill(~inside[:, :, None, None, None], 0)  # (S, L, 3, H, D)
        qkv.requires_grad_(case.backward)
        bias, mask = args["bias"], inside[:, None, None, :] if use_mask else None
        dropout = args.get("dropout_p", 0.0)

        def forward() -> Outputs:
            query, key, value = (qkv + bias).permute(2, 0, 3, 1, 4)
            with nullcontext() if backend is None else sdpa_kernel(SDPBackend.__members__[backend]):
                context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            return (context.transpose(1, 2),)  # (S, L, H, D)

        def to_own(grads: Outputs) -> Outputs:
            return (grads[0][row].masked_fill(~inside[:, :, None, None], 0),)

        if backend is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why each other backend was passed over
                try:
                    forward()
                except RuntimeError as error:
                    if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                        raise
                    raise Unavailable("this backend does not take the case") from None
        return Call(
            forward,
            {"qkv": (qkv,), "bias": (bias,)} if case.backward else None,
            to_case=lambda outputs: (outputs[0].flatten(0, 1)[places],),
            to_own=to_own,
            leaf_to_case=lambda name, grad: grad.flatten(0, 1)[places] if name == "qkv" else grad,
        )

    return build


def _build_varlen(case: Case, args: Mapping[str, Any]) -> Call:
    if case.device != "cuda":
        raise Unavailable("torch.nn.attention.varlen runs on CUDA only")
    if args.get("dropout_p"):
        raise Unavailable("it has no dropout")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    qkv, offsets, longest, bias = args["qkv"], args["cu_seqlens"], args["max_seqlen"], args["bias"]

    def forward() -> Outputs:
        query, key, value = (qkv + bias).unbind(1)
        return (varlen_attn(query, key, value, offsets, offsets, longest, longest),)

    return Call(forward, leaves_of(case, args))


# layers of an encoder


def _layers(args: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
    weights = args["weights"]
    return [weights[i : i + 12] for i in range(0, len(weights), 12)]


def _build_encoder(case: Case, args: Mapping[str, Any]) -> Call:
    row, inside, places = _padding(args)
    x, layers = args["x"][row].masked_fill(~inside[:, :, None], 0), _layers(args)  # padded for free
    layer = torch.nn.TransformerEncoderLayer(
        x.shape[-1], args["num_heads"], layers[0][6].shape[0], 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, len(layers))
    parts = ("self_attn.in_proj_", "self_attn.out_proj.", "norm1.", "linear1.", "linear2.", "norm2.")
    names = [part + kind for part in parts for kind in ("weight", "bias")]
    for layer, weights in zip(encoder.layers, layers):
        layer.load_state_dict(dict(zip(names, weights)))
    encoder = encoder.to(case.device, case.dtype).eval()
    padding = None if bool(inside.all()) else ~inside
    return Call(
        lambda: (encoder(x, src_key_padding_mask=padding),),
        to_case=lambda outputs: (outputs[0].flatten(0, 1)[places],),
    )


def _build_layer_parts(case: Case, args: Mapping[str, Any]) -> Call:
    offsets, longest, heads = args["cu_seqlens"], args["max_seqlen"], args["num_heads"]
    weight_dtype, layers = args.get("weight_dtype"), _layers(args)
    product, norm = partial(ctxfast.functional.linear_act, weight_dtype=weight_dtype), ctxfast.functional.add_layer_norm

    def forward() -> Outputs:
        x = args["x"]
        for w_qkv, b_qkv, w, b, gain, shift, w_wide, b_wide, w_narrow, b_narrow, last_gain, last_shift in layers:
            qkv = product(x, w_qkv, b_qkv).unflatten(-1, (3, heads, x.shape[1] // heads))
            context = ctxfast.functional.attention(qkv, offsets, longest).flatten(1)
            h = norm(product(context, w), x, gain, shift, b)
            wide = product(h, w_wide, b_wide, activation="gelu")
            x = norm(product(wide, w_narrow), h, last_gain, last_shift, b_narrow)
        return (x,)

    return Call(forward)


def _build_layer_norm(case: Case, args: Mapping[str, Any]) -> Call:
    x, residual, x_bias = args["x"], args["residual"], args["x_bias"]
    weight, bias, eps = args["weight"], args["bias"], args["eps"]

    def forward() -> Outputs:
        return (F.layer_norm(x + x_bias + residual, (x.shape[-1],), weight, bias, eps),)

    return Call(forward, leaves_of(case, args))


def _build_linear(case: Case, args: Mapping[str, Any]) -> Call:
    x, weight, bias = args["x"], args["weight"], args["bias"]

    # What the modules nn.Linear and nn.GELU call; a module would take copies of the leaves.
    def forward() -> Outputs:
        product = F.linear(x, weight, bias)
        return (F.gelu(product) if args["activation"] == "gelu" else product,)

    return Call(forward, leaves_of(case, args))


def _build_embeddings(case: Case, args: Mapping[str, Any]) -> Call:
    kinds = (
        ("input_ids", "word_embeddings"),
        ("token_type_ids", "token_type_embeddings"),
        ("position_ids", "position_embeddings"),
    )
    pairs = [(args[ids], args[table]) for ids, table in kinds]
    weight, bias = args["weight"], args["bias"]

    # What the modules nn.Embedding and nn.LayerNorm call.
    def forward() -> Outputs:
        x = sum(F.embedding(ids, table) for ids, table in pairs)
        return (F.layer_norm(x, weight.shape, weight, bias, 1e-12),)

    return Call(forward, leaves_of(case, args))


def _build_labelled_rows(case: Case, args: Mapping[str, Any]) -> Call:
    hidden, weight, bias, labels = args["hidden"], args["weight"], args["bias"], args["labels"]

    def forward() -> Outputs:
        rows = (labels != -100).nonzero()[:, 0]
        logits = F.linear(hidden[rows], weight, bias).float()
        return (F.cross_entropy(logits, labels[rows]),)

    return Call(forward, leaves_of(case, args))


def _build_liger_layer_norm(case: Case, args: Mapping[str, Any]) -> Call:
    require("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.functional import liger_layer_norm

    x, residual, x_bias = args["x"], args["residual"], args["x_bias"]
    weight, bias, eps = args["weight"], args["bias"], args["eps"]
    return Call(lambda: (liger_layer_norm(x + x_bias + residual, weight, bias, eps),), leaves_of(case, args))


def _build_liger_loss(case: Case, args: Mapping[str, Any]) -> Call:
    require("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    hidden, weight, bias, labels = args["hidden"], args["weight"], args["bias"], args["labels"]
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-100)
    return Call(lambda: (loss(weight, hidden, labels, bias),), leaves_of(case, args))


# ELMo around its LSTM


def _build_conv1d(case: Case, args: Mapping[str, Any]) -> Call:
    ids, table = args["char_ids"], args["char_embeddings"]
    layers = []
    for weight, bias in zip(args["conv_weights"], args["conv_biases"]):
        with torch.device("meta"):
            layer = nn.Conv1d(weight.shape[1], weight.shape[0], weight.shape[2])
        layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        layers.append(layer)

    def forward() -> Outputs:
        x = F.embedding(ids, table).transpose(1, 2)
        return (torch.cat([torch.relu(layer(x).max(dim=-1).values) for layer in layers], dim=-1),)

    return Call(forward)


def _build_unfold(case: Case, args: Mapping[str, Any]) -> Call:
    ids, table = args["char_ids"], args["char_embeddings"]
    matrices = [weight.permute(0, 2, 1).flatten(1).contiguous() for weight in args["conv_weights"]]  # (n, w * D)
    widths = [weight.shape[2] for weight in args["conv_weights"]]
    biases, depth = args["conv_biases"], table.shape[1]

    def forward() -> Outputs:
        x = F.embedding(ids, table).flatten(1)  # (W, C * D)
        pooled = []
        for width, matrix, bias in zip(widths, matrices, biases):
            windows = x.unfold(1, width * depth, depth)  # (W, C - w + 1, w * D)
            pooled.append(torch.relu(F.linear(windows, matrix).amax(dim=1) + bias))
        return (torch.cat(pooled, dim=1),)

    return Call(forward)


def _build_mix_loop(case: Case, args: Mapping[str, Any]) -> Call:
    layers, scalars, gamma = args["tensors"], args["scalar_parameters"], args["gamma"]

    def forward() -> Outputs:
        weights = torch.softmax(scalars, dim=0).split(1)
        return (gamma * sum(weight * layer for weight, layer in zip(weights, layers)),)

    return Call(forward)


def _build_mix_product(case: Case, args: Mapping[str, Any]) -> Call:
    layers, scalars, gamma = args["tensors"], args["scalar_parameters"], args["gamma"]

    def forward() -> Outputs:
        return (torch.einsum("k,k...->...", gamma * torch.softmax(scalars, dim=0), torch.stack(layers)),)

    return Call(forward)


PEERS: dict[str, tuple[Provider, ...]] = {
    "lstm": (
        Provider("ctxfast nn.LSTM", _build_nn_lstm(is_ours=True), "the module, fed as nn.LSTM is", ours=True),
        Provider("Python loop (AllenNLP style)", _build_loop()),
        Provider("Python loop in a CUDA graph", _build_loop_graph),
        Provider("nn.LSTM", _build_nn_lstm(), _NO_CLIPS),
        Provider("two nn.LSTM and flip", _build_two_lstms, _NO_CLIPS),
        Provider("Python loop, bfloat16", _build_loop(torch.bfloat16), dtype=torch.bfloat16),
        Provider("nn.LSTM, bfloat16", _build_nn_lstm(torch.bfloat16), _NO_CLIPS, dtype=torch.bfloat16),
    ),
    "attention": (
        Provider("SDPA padded, key mask", _build_sdpa(True), "padding not timed"),
        Provider("SDPA padded, no mask", _build_sdpa(False), "padding not timed"),
        *(
            Provider(name, _build_sdpa("key mask" in name, backend), "padding not timed", device="cuda")
            for name, backend in (
                ("SDPA padded, key mask, cuDNN", "CUDNN_ATTENTION"),
                ("SDPA padded, key mask, mem-efficient", "EFFICIENT_ATTENTION"),
                ("SDPA padded, no mask, cuDNN", "CUDNN_ATTENTION"),
                ("SDPA padded, no mask, flash", "FLASH_ATTENTION"),
                ("SDPA padded, no mask, mem-efficient", "EFFICIENT_ATTENTION"),
            )
        ),
        Provider("torch varlen_attn", _build_varlen),
    ),
    "add_layer_norm": (
        Provider("F.layer_norm after adds", _build_layer_norm),
        Provider("Liger layer_norm after adds", _build_liger_layer_norm, device="cuda"),
    ),
    "linear_act": (Provider("nn.Linear and activation", _build_linear),),
    "embed_layer_norm": (Provider("nn.Embedding and nn.LayerNorm", _build_embeddings),),
    "transformer_layers": (
        Provider("ctxfast, part by part", _build_layer_parts, "seven calls a layer", ours=True),
        Provider("nn.TransformerEncoder", _build_encoder, "padding not timed"),
    ),
    "char_cnn": (
        Provider("nn.Conv1d (AllenNLP style)", _build_conv1d),
        Provider("unfold and matrix product", _build_unfold),
    ),
    "scalar_mix": (
        Provider("sum of products (AllenNLP style)", _build_mix_loop),
        Provider("stack and einsum", _build_mix_product),
    ),
    "linear_cross_entropy": (
        Provider("only labelled rows, F.cross_entropy", _build_labelled_rows),
        Provider("Liger fused linear cross entropy", _build_liger_loss, device="cuda"),
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""One public function per op: gather arguments -> autocast rule -> check -> choose an implementation -> run.

Shape letters: B batch, T time steps (``lstm``) or packed tokens (all other ops), S sequences, I input size,
H hidden size (``lstm``) or heads (``attention``), P projected size, D head size, N hidden size of a transformer,
K layers, R directions (1 or 2), V rows of a table, W words, C characters of a word. Batch comes first everywhere.

Every function takes ``impl=``: the name of an implementation, or None for the fastest that accepts the call.
Raises common to all: TypeError for wrong dtypes and kinds, ValueError for wrong shapes, devices and values,
RuntimeError when an implementation asked for by name cannot run the call. Checks run before any kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._core import registry
from .ops import (
    add_layer_norm as _add_layer_norm,
    attention as _attention,
    char_cnn as _char_cnn,
    embed_layer_norm as _embed_layer_norm,
    linear_act as _linear_act,
    linear_cross_entropy as _linear_cross_entropy,
    lstm as _lstm,
    scalar_mix as _scalar_mix,
    transformer_layers as _transformer_layers,
)

__all__ = [
    "add_layer_norm",
    "attention",
    "char_cnn",
    "embed_layer_norm",
    "explain",
    "linear_act",
    "linear_cross_entropy",
    "lstm",
    "scalar_mix",
    "transformer_layers",
]


def _per_direction(value: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _lstm_args(
    input: Tensor | Sequence[Tensor],
    weight_ih: Tensor | Sequence[Tensor],
    weight_hh: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    weight_proj: Tensor | Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    weights = _per_direction(weight_ih)
    inputs = _per_direction(input)
    return dict(
        input=inputs * len(weights) if isinstance(input, Tensor) else inputs,
        weight_ih=weights,
        weight_hh=_per_direction(weight_hh),
        bias=_per_direction(bias),
        weight_proj=_per_direction(weight_proj),
        lengths=lengths,
        initial_state=initial_state,
        cell_clip=cell_clip,
        proj_clip=proj_clip,
        weight_dtype=weight_dtype,
    )


def lstm(
    input: Tensor | Sequence[Tensor],
    weight_ih: Tensor | Sequence[Tensor],
    weight_hh: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    weight_proj: Tensor | Sequence[Tensor] | None = None,
    lengths: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    weight_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer in one or two directions.

    ``i, f, g, o = W_ih x + W_hh h' + b``; ``c = clip(sigmoid(i) tanh(g) + sigmoid(f) c')``;
    ``h = clip(W_proj (sigmoid(o) tanh(c)))``. The second direction runs from each row's own last step to its first.

    Args:
        input: (B, T, I), read by every direction, or a sequence of R such tensors, one per direction.
        weight_ih: (4H, I), or a sequence of R; rows stacked in the gate order i, f, g, o (torch's).
        weight_hh: (4H, P), or a sequence of R. P = H without a projection.
        bias: (4H,), or a sequence of R; None for none.
        weight_proj: (P, H), or a sequence of R; None for no projection.
        lengths: (B,) int64 or int32, steps of each row, 0..T; None: every row has T. Must be right-padded.
        initial_state: (h_0 (R, B, P), c_0 (R, B, H)); None for zeros.
        cell_clip: bound on ``|c|``, applied before tanh and carried on; None for none.
        proj_clip: bound on ``|h|`` after the projection; None for none.
        weight_dtype: how both factors of every matrix product are held (``W_ih x``, ``W_hh h``, ``W_proj m``).
            torch.bfloat16 rounds them to it; torch.int8 rounds each row of a weight, and each vector at each step, to
            1/127 of its largest magnitude. Sums, gates and cells keep the input's dtype, on a CPU float32. Gradients
            pass straight through the rounding. None keeps everything as it is.
        impl: name of an implementation; None chooses.

    Returns:
        output (B, T, R*P), [forward | backward], zero past a row's length; and (h_n (R, B, P), c_n (R, B, H)), the
        state at each row's own end. A row of length 0 keeps its initial state.

    Numerics: float32 within 1e-5 of float64; deterministic. A clipped value passes no gradient. cpu: a row's bits
    depend neither on the other rows nor on threads; int8 gives the same bits on every instruction set.
    Implementations: reference (any device and dtype), cpu (float32, bfloat16, float16, in float32 inside).
    Reference: Sak et al. 2014; Peters et al. 2018; the cell of AllenNLP's LstmCellWithProjection.
    """
    args = _lstm_args(
        input, weight_ih, weight_hh, bias, weight_proj, lengths, initial_state,
        cell_clip=cell_clip, proj_clip=proj_clip, weight_dtype=weight_dtype,
    )  # fmt: skip
    return registry.call(_lstm.SPEC, args, impl)


def _attention_args(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    return dict(
        qkv=qkv,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        bias=bias,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
    )


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Bidirectional attention inside each of S packed sequences: ``softmax(scale Q K^T) V``.

    Args:
        qkv: (T, 3, H, D), query, key and value of every token, sequences one after another.
        cu_seqlens: (S + 1,) int32 or int64, row where each sequence starts; the last entry is T.
        max_seqlen: length of the longest sequence, or more.
        bias: (3, H, D), added to every row of ``qkv`` (the bias of the QKV projection); None for none.
        softmax_scale: factor on the scores; None for 1/sqrt(D).
        dropout_p: probability of dropping an attention weight in this call (0 at inference).
        impl: name of an implementation; None chooses.

    Returns:
        (T, H, D), in the dtype of ``qkv``.

    Numerics: softmax in float32 (float64 for float64); deterministic without dropout, and with it for a given seed.
    Implementations: reference (any device and dtype), cpu (float32, bfloat16, float16), triton (CUDA;
    float32, bfloat16, float16; D up to 128).
    Reference: Vaswani et al. 2017, equation 1; Devlin et al. 2019.
    """
    args = _attention_args(qkv, cu_seqlens, max_seqlen, bias, softmax_scale=softmax_scale, dropout_p=dropout_p)
    return registry.call(_attention.SPEC, args, impl)


def _add_layer_norm_args(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    return dict(
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        x_bias=x_bias,
        eps=eps,
        dropout_p=dropout_p,
    )


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """``LayerNorm(residual + dropout(x + x_bias))`` over the last dimension.

    Args:
        x: (..., N).
        residual: (..., N); None for none.
        weight, bias: (N,), scale and shift after normalisation.
        x_bias: (N,), bias of the linear layer that made ``x``; None for none.
        eps: added to the variance. BERT's 1e-12 is below half precision's resolution, so statistics are float32.
        dropout_p: probability of dropping an element of ``x + x_bias`` in this call (0 at inference).
        impl: name of an implementation; None chooses.

    Returns:
        The shape and dtype of ``x``.

    Numerics: float32 statistics (float64 for float64); deterministic without dropout.
    Implementations: reference (any device and dtype), cpu (float32, bfloat16; no dropout), triton (CUDA;
    float32, bfloat16, float16); hidden_size up to 8192.
    Reference: Ba et al. 2016; Vaswani et al. 2017, section 3.1.
    """
    args = _add_layer_norm_args(x, residual, weight, bias, x_bias, eps=eps, dropout_p=dropout_p)
    return registry.call(_add_layer_norm.SPEC, args, impl)


def _linear_act_args(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    return dict(x=x, weight=weight, bias=bias, activation=activation, weight_dtype=weight_dtype)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    weight_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """``activation(x W^T + b)``.

    Args:
        x: (..., N_in).
        weight: (N_out, N_in).
        bias: (N_out,); None for none.
        activation: "none", "gelu" (exact, erf), "gelu_tanh", "relu" or "tanh".
        weight_dtype: how both factors of the product are held. None: as they are. torch.int8: each row of x and of
            the weight in whole steps of 1/127 of its largest magnitude, products summed exactly.
        impl: name of an implementation; None chooses.

    Returns:
        (..., N_out), in the dtype of ``x``.

    Numerics: a row's result on the CPU does not depend on the other rows, to the last bit (impl cpu).
    Implementations: reference (any device and dtype), cpu (packed weights; float32, bfloat16; int8
    without gradient), triton (CUDA; float32, bfloat16, float16; every activation, and none in training where x is an
    activation's result, which it makes again in the backward instead of keeping it).
    Reference: Hendrycks & Gimpel 2016 (both forms of GELU); Devlin et al. 2019.
    """
    args = _linear_act_args(x, weight, bias, activation=activation, weight_dtype=weight_dtype)
    return registry.call(_linear_act.SPEC, args, impl)


def _embed_layer_norm_args(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_type_ids: Tensor | None = None,
    task_type_embeddings: Tensor | None = None,
    *,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    return dict(
        input_ids=input_ids,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        word_embeddings=word_embeddings,
        position_embeddings=position_embeddings,
        token_type_embeddings=token_type_embeddings,
        weight=weight,
        bias=bias,
        task_type_ids=task_type_ids,
        task_type_embeddings=task_type_embeddings,
        eps=eps,
        padding_idx=padding_idx,
        position_padding_idx=position_padding_idx,
        dropout_p=dropout_p,
    )


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    task_type_ids: Tensor | None = None,
    task_type_embeddings: Tensor | None = None,
    *,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """``dropout(LayerNorm(word + position + type [+ task]))`` for packed tokens.

    Args:
        input_ids, position_ids, token_type_ids: (T,) int64 or int32, rows of the three tables.
        word_embeddings, position_embeddings, token_type_embeddings: (V, N) each.
        weight, bias: (N,), scale and shift of the LayerNorm.
        task_type_ids, task_type_embeddings: (T,) and (V, N), ERNIE's task embedding; both or neither.
        eps: added to the variance.
        padding_idx, position_padding_idx: rows of the word and position table that get no gradient; None for none.
        dropout_p: probability of dropping an element in this call (0 at inference).
        impl: name of an implementation; None chooses.

    Returns:
        (T, N), in the dtype of the tables.

    Raises:
        ValueError: also for ids outside their table; on a GPU ids are not read, since that would wait for the device.

    Implementations: reference (any device and dtype), cpu (float32, bfloat16; no dropout), triton (CUDA;
    float32, bfloat16, float16); hidden_size up to 8192.
    Reference: Devlin et al. 2019, figure 2; Sun et al. 2020 (task embedding).
    """
    args = _embed_layer_norm_args(
        input_ids, position_ids, token_type_ids, word_embeddings, position_embeddings, token_type_embeddings,
        weight, bias, task_type_ids, task_type_embeddings,
        eps=eps, padding_idx=padding_idx, position_padding_idx=position_padding_idx, dropout_p=dropout_p,
    )  # fmt: skip
    return registry.call(_embed_layer_norm.SPEC, args, impl)


def _char_cnn_args(
    char_ids: Tensor,
    char_embeddings: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor],
    *,
    activation: str = "relu",
) -> dict[str, Any]:
    return dict(
        char_ids=char_ids,
        char_embeddings=char_embeddings,
        conv_weights=tuple(conv_weights),
        conv_biases=tuple(conv_biases),
        activation=activation,
    )


def char_cnn(
    char_ids: Tensor,
    char_embeddings: Tensor,
    conv_weights: Sequence[Tensor],
    conv_biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    impl: str | None = None,
) -> Tensor:
    """Word vectors from characters: embed, convolve with several widths, take the maximum over positions, activate.

    Args:
        char_ids: (W, C) int64 or int32, rows of ``char_embeddings``.
        char_embeddings: (V, D).
        conv_weights: one (n_i, D, w_i) per filter width; windows lie wholly inside the word, stride 1.
        conv_biases: one (n_i,) per filter width.
        activation: "relu" or "tanh", after the maximum.
        impl: name of an implementation; None chooses.

    Returns:
        (W, sum of n_i), filters in the order given.

    Numerics: compiled kernels sum in float32. Where windows of different characters tie for the maximum, the first
        takes the gradient (the reference shares it out).
    Implementations: cpu (compiled; float32 and bfloat16; words of at most 16384 numbers, characters times D),
        cuda (float32, float16, bfloat16; filters and words that fit a block's shared memory; not yet run on a GPU),
        reference (any device and dtype).
    Reference: Kim et al. 2016; Peters et al. 2018; AllenNLP's _ElmoCharacterEncoder.
    """
    args = _char_cnn_args(char_ids, char_embeddings, conv_weights, conv_biases, activation=activation)
    return registry.call(_char_cnn.SPEC, args, impl)


def _scalar_mix_args(
    tensors: Sequence[Tensor] | Tensor,
    scalar_parameters: Tensor,
    gamma: Tensor,
    mask: Tensor | None = None,
    *,
    do_layer_norm: bool = False,
    eps: float = 1e-13,
) -> dict[str, Any]:
    layers = tensors.unbind(0) if isinstance(tensors, Tensor) else tuple(tensors)
    return dict(
        tensors=layers,
        scalar_parameters=scalar_parameters,
        gamma=gamma,
        mask=mask,
        do_layer_norm=do_layer_norm,
        eps=eps,
    )


def scalar_mix(
    tensors: Sequence[Tensor] | Tensor,
    scalar_parameters: Tensor,
    gamma: Tensor,
    mask: Tensor | None = None,
    *,
    do_layer_norm: bool = False,
    eps: float = 1e-13,
    impl: str | None = None,
) -> Tensor:
    """``gamma * sum_k softmax(s)_k x_k`` over a model's layers.

    Args:
        tensors: K tensors of one shape (..., N), or one tensor (K, ..., N).
        scalar_parameters: (K,), weights before the softmax.
        gamma: (1,), scale of the whole.
        mask: the shape of a layer without N; True where a row is real. Needed with ``do_layer_norm``.
        do_layer_norm: normalise every layer first, with ONE mean and variance over all unmasked elements of the whole
            tensor and no affine part (as AllenNLP and bilm-tf do, not per token).
        eps: added to that variance.
        impl: name of an implementation; None chooses.

    Returns:
        (..., N), in the dtype of the layers.

    Implementations: reference (any device and dtype), cuda (float32, float16, bfloat16; without do_layer_norm).
    Reference: Peters et al. 2018, equation 1; AllenNLP's ScalarMix.
    """
    args = _scalar_mix_args(tensors, scalar_parameters, gamma, mask, do_layer_norm=do_layer_norm, eps=eps)
    return registry.call(_scalar_mix.SPEC, args, impl)


def _linear_cross_entropy_args(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Any]:
    return dict(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross entropy of ``W h + b`` against labels, over the rows that have one.

    Args:
        hidden: (T, N).
        weight: (V, N).
        labels: (T,) int64 or int32, 0..V-1, or ``ignore_index`` for a row without a label.
        bias: (V,); None for none.
        ignore_index: the value that marks a row without a label.
        reduction: "mean" over labelled rows (0 when there is none), "sum", or "none" for (T,) with 0 at ignored rows.
        impl: name of an implementation; None chooses.

    Returns:
        A scalar (float32; float64 for float64), or (T,) with "none".

    Implementations: reference (any device and dtype), cpu and triton (CUDA) (float32, bfloat16, float16; labelled
    rows only, never all logits at once; triton's number of labelled rows is read by the host once a call).
    Reference: Devlin et al. 2019, section 3.1.
    """
    args = _linear_cross_entropy_args(hidden, weight, labels, bias, ignore_index=ignore_index, reduction=reduction)
    return registry.call(_linear_cross_entropy.SPEC, args, impl)


def _transformer_layers_args(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor | None],
    *,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    weight_dtype: torch.dtype | None = None,
    all_layers: bool = False,
) -> dict[str, Any]:
    return dict(
        x=x,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        weights=tuple(weights),
        num_heads=num_heads,
        activation=activation,
        eps=eps,
        weight_dtype=weight_dtype,
        all_layers=all_layers,
    )


def transformer_layers(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor | None],
    *,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    weight_dtype: torch.dtype | None = None,
    all_layers: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Whole post-LN encoder layers over S packed sequences, one after another, without dropout.

    A layer: ``h = LayerNorm(x + project(attention(qkv(x))))``; ``LayerNorm(h + narrow(activation(widen(h))))``.

    Args:
        x: (T, N), sequences one after another.
        cu_seqlens: (S + 1,) int32 or int64, row where each sequence starts; the last entry is T.
        max_seqlen: length of the longest sequence, or more.
        weights: 12 tensors of each layer, layers one after another: weight and bias of qkv (query, key and value
            together: (3N, N)), project (N, N), the attention's LayerNorm (N,), widen (M, N), narrow (N, M) and the
            output's LayerNorm (N,). The bias of a product may be None.
        num_heads: a divisor of N.
        activation, weight_dtype: as in ``linear_act``.
        eps: of every LayerNorm.
        all_layers: return what every layer gives, not only the last.
        impl: name of an implementation; None chooses.

    Returns:
        (T, N), in the dtype of ``x``; with ``all_layers`` one for each layer.

    Numerics: cpu gives the bits that its parts (``linear_act``, ``attention``, ``add_layer_norm``) give one by one; in
    float32 and int8 a sequence's do not depend on the others.
    Implementations: reference (any device and dtype), cpu (float32, bfloat16; int8 without gradient; the backward pass
    recomputes each layer). ``nn.TransformerLayer`` and ``Bert`` take it where it is faster than the parts.
    Reference: Vaswani et al. 2017, section 3.1; Devlin et al. 2019.
    """
    args = _transformer_layers_args(
        x, cu_seqlens, max_seqlen, weights, num_heads=num_heads, activation=activation, eps=eps,
        weight_dtype=weight_dtype, all_layers=all_layers,
    )  # fmt: skip
    return registry.call(_transformer_layers.SPEC, args, impl)


# Arguments of a public function -> the keyword arguments implementations take. Tests, benchmarks and explain use it.
ARGS = {
    "add_layer_norm": _add_layer_norm_args,
    "attention": _attention_args,
    "char_cnn": _char_cnn_args,
    "embed_layer_norm": _embed_layer_norm_args,
    "linear_act": _linear_act_args,
    "linear_cross_entropy": _linear_cross_entropy_args,
    "lstm": _lstm_args,
    "scalar_mix": _scalar_mix_args,
    "transformer_layers": _transformer_layers_args,
}


def explain(op: str, *args: Any, impl: str | None = None, **kwargs: Any) -> registry.Explanation:
    """Which implementation of ``op`` would run this call, and why the others would not; nothing is run.

    Args:
        op: name of a function of this module, e.g. "lstm".
        args, kwargs: the arguments of that function.

    Returns:
        An Explanation: prints as one row per implementation; ``.used`` is the name of the one that would run.

    Example:
        >>> print(ctxfast.explain("attention", qkv, cu_seqlens, 128))
    """
    if op not in ARGS:
        raise ValueError(f"ctxfast.explain: op is {op!r}; expected one of {', '.join(sorted(ARGS))}.")
    return registry.explain_args(registry.OPS[op], ARGS[op](*args, **kwargs), impl)

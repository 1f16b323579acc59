# SPDX-License-Identifier: Apache-2.0
"""Bad input to every op: the exact message, and nothing has run before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity import arguments, combinations, convert, device_of, public

from ctxfast._core import registry

META = torch.device("meta")


def _good(op: str) -> dict[str, Any]:
    """Arguments that pass: small, float32, on the CPU."""
    t = torch.zeros
    ids = torch.zeros(5, dtype=torch.int64)
    return {
        "lstm": dict(
            input=t(2, 3, 4), weight_ih=[t(20, 4)] * 2, weight_hh=[t(20, 6)] * 2, bias=[t(20)] * 2,
            weight_proj=[t(6, 5)] * 2, lengths=torch.tensor([3, 1]), initial_state=(t(2, 2, 6), t(2, 2, 5)),
            cell_clip=3.0, proj_clip=3.0,
        ),
        "attention": dict(qkv=t(5, 3, 2, 4), cu_seqlens=torch.tensor([0, 2, 5]), max_seqlen=3, bias=t(3, 2, 4)),
        "add_layer_norm": dict(x=t(3, 8), residual=t(3, 8), weight=t(8), bias=t(8), x_bias=t(8)),
        "linear_act": dict(x=t(3, 8), weight=t(6, 8), bias=t(6), activation="gelu"),
        "embed_layer_norm": dict(
            input_ids=ids, position_ids=ids, token_type_ids=ids, word_embeddings=t(9, 8), position_embeddings=t(7, 8),
            token_type_embeddings=t(2, 8), weight=t(8), bias=t(8), task_type_ids=ids, task_type_embeddings=t(3, 8),
        ),
        "char_cnn": dict(
            char_ids=torch.zeros(3, 6, dtype=torch.int64), char_embeddings=t(9, 4),
            conv_weights=[t(5, 4, 2), t(7, 4, 6)], conv_biases=[t(5), t(7)], activation="relu",
        ),
        "scalar_mix": dict(tensors=[t(2, 3, 4)] * 2, scalar_parameters=t(2), gamma=t(1), mask=torch.ones(2, 3).bool(),
                           do_layer_norm=True),
        "linear_cross_entropy": dict(hidden=t(5, 4), weight=t(9, 4), labels=ids, bias=t(9)),
        "transformer_layers": dict(x=t(5, 8), cu_seqlens=torch.tensor([0, 2, 5]), max_seqlen=3, weights=_weights(),
                                   num_heads=2),
    }[op]  # fmt: skip


def _weights(at: int | None = None, put: Any = None) -> list[Any]:
    """Those of two layers of ``transformer_layers``, one of them replaced."""
    shapes = ((24, 8), (24,), (8, 8), (8,), (8,), (8,), (6, 8), None, (8, 6), (8,), (8,), (8,)) * 2
    weights = [None if shape is None else torch.zeros(shape) for shape in shapes]
    if at is not None:
        weights[at] = put
    return weights


_T = torch.zeros
_L = "ctxfast.lstm: "
_A = "ctxfast.attention: "
_N = "ctxfast.add_layer_norm: "
_F = "ctxfast.linear_act: "
_E = "ctxfast.embed_layer_norm: "
_C = "ctxfast.char_cnn: "
_M = "ctxfast.scalar_mix: "
_Y = "ctxfast.transformer_layers: "
_X = "ctxfast.linear_cross_entropy: "
_FLOATS = "expected float32, float16, bfloat16 or float64. Convert it with .float()."
_CONVERT = "Convert one of them, or run under torch.autocast."

TABLE = [
    # lstm
    ("lstm", dict(input=["x", "y"]), TypeError, _L + "input is a str; expected a torch.Tensor."),
    ("lstm", dict(input=_T(2, 3, 4).long()), TypeError, _L + "input has dtype torch.int64; " + _FLOATS),
    ("lstm", dict(input=_T(3, 4)), ValueError,
     _L + "input has shape (3, 4); expected (batch, steps, input_size), batch first."),
    ("lstm", dict(input=[_T(2, 3, 4)]), ValueError,
     _L + "input holds 1 tensors; expected 2, one per direction as in weight_ih."),
    ("lstm", dict(weight_ih=[_T(20, 4)] * 3), ValueError,
     _L + "weight_ih holds 3 tensors; expected one per direction, 1 or 2."),
    ("lstm", dict(weight_hh=_T(20, 6)), ValueError,
     _L + "weight_hh holds 1 tensors; expected 2, one per direction as in weight_ih."),
    ("lstm", dict(input=[_T(2, 3, 4), _T(2, 4, 4)]), ValueError,
     _L + "input has shape (2, 4, 4); expected (batch, steps, input_size) = (2, 3, 4)."),
    ("lstm", dict(weight_hh=[_T(21, 6)] * 2), ValueError,
     _L + "weight_hh has shape (21, 6); expected (4*hidden_size, proj_size), gates stacked in the order i, f, g, o."),
    ("lstm", dict(weight_ih=[_T(20, 4), _T(20, 5)]), ValueError,
     _L + "weight_ih has shape (20, 5); expected (4*hidden_size, input_size) = (20, 4)."),
    ("lstm", dict(weight_hh=[_T(20, 6), _T(24, 6)]), ValueError,
     _L + "weight_hh has shape (24, 6); expected (4*hidden_size, proj_size), alike in both directions, = (20, 6)."),
    ("lstm", dict(bias=[_T(20), _T(19)]), ValueError, _L + "bias has shape (19,); expected (4*hidden_size,) = (20,)."),
    ("lstm", dict(weight_proj=[_T(5, 6)] * 2), ValueError,
     _L + "weight_proj has shape (5, 6); expected (proj_size, hidden_size) = (6, 5)."),
    ("lstm", dict(weight_proj=None), ValueError,
     _L + "weight_hh has shape (20, 6); expected (4*hidden_size, hidden_size) = (20, 5) without weight_proj. "
     "Pass weight_proj of shape (6, 5) for a projected LSTM."),
    ("lstm", dict(weight_hh=[_T(20, 6).half()] * 2), TypeError,
     _L + "weight_hh has dtype torch.float16; expected torch.float32, that of input. " + _CONVERT),
    ("lstm", dict(weight_ih=[_T(20, 4, device=META)] * 2), ValueError,
     _L + "weight_ih is on meta; expected cpu, where input is. Move it with .to('cpu')."),
    ("lstm", dict(lengths=torch.tensor([3.0, 1.0])), TypeError,
     _L + "lengths has dtype torch.float32; expected int64 or int32. Convert it with .long()."),
    ("lstm", dict(lengths=torch.tensor([3])), ValueError, _L + "lengths has shape (1,); expected (batch,) = (2,)."),
    ("lstm", dict(lengths=torch.tensor([4, 1])), ValueError,
     _L + "lengths holds 4; expected values in 0..3. A length cannot be longer than the input has steps."),
    ("lstm", dict(lengths=torch.tensor([3, -1])), ValueError,
     _L + "lengths holds -1; expected values in 0..3. A length cannot be longer than the input has steps."),
    ("lstm", dict(initial_state=(_T(2, 2, 6),)), ValueError,
     _L + "initial_state holds 1 tensors; expected (h_0, c_0)."),
    ("lstm", dict(initial_state=(_T(2, 2, 5), _T(2, 2, 5))), ValueError,
     _L + "initial_state[0] has shape (2, 2, 5); expected (directions, batch, proj_size) = (2, 2, 6)."),
    ("lstm", dict(initial_state=(_T(2, 2, 6), _T(2, 2, 6))), ValueError,
     _L + "initial_state[1] has shape (2, 2, 6); expected (directions, batch, hidden_size) = (2, 2, 5)."),
    ("lstm", dict(cell_clip=-1.0), ValueError,
     _L + "cell_clip is -1.0; expected a number above 0, or None for no clipping."),
    ("lstm", dict(proj_clip=0.0), ValueError,
     _L + "proj_clip is 0.0; expected a number above 0, or None for no clipping."),
    ("lstm", dict(weight_dtype=torch.float16), ValueError,
     _L + "weight_dtype is torch.float16; expected one of None, torch.bfloat16, torch.int8."),
    # attention
    ("attention", dict(qkv=_T(5, 2, 2, 4)), ValueError,
     _A + "qkv has shape (5, 2, 2, 4); expected (tokens, 3, heads, head_dim): the packed query, key and value rows. "
     "Pack a padded batch with ctxfast.packing first."),
    ("attention", dict(cu_seqlens=torch.tensor([0, 2, 4])), ValueError,
     _A + "cu_seqlens runs from 0 to 4; expected offsets that never fall, from 0 to the 5 rows of qkv."),
    ("attention", dict(cu_seqlens=torch.tensor([0, 6, 5])), ValueError,
     _A + "cu_seqlens runs from 0 to 5; expected offsets that never fall, from 0 to the 5 rows of qkv."),
    ("attention", dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ValueError,
     _A + "cu_seqlens has shape (0,); expected (sequences + 1,)."),
    ("attention", dict(max_seqlen=2), ValueError,
     _A + "max_seqlen is 2; expected at least 3, the longest sequence in cu_seqlens."),
    ("attention", dict(max_seqlen=3.0), TypeError, _A + "max_seqlen is a float; expected an int."),
    ("attention", dict(bias=_T(3, 4, 2)), ValueError,
     _A + "bias has shape (3, 4, 2); expected (3, heads, head_dim) = (3, 2, 4)."),
    ("attention", dict(dropout_p=1.0), ValueError,
     _A + "dropout_p is 1.0; expected a probability, 0 <= dropout_p < 1."),
    # add_layer_norm
    ("add_layer_norm", dict(x=_T(3, 0)), ValueError,
     _N + "x has shape (3, 0); expected (..., hidden_size) with hidden_size >= 1."),
    ("add_layer_norm", dict(residual=_T(2, 8)), ValueError,
     _N + "residual has shape (2, 8); expected the shape of x = (3, 8)."),
    ("add_layer_norm", dict(weight=None), TypeError, _N + "weight is None; expected a tensor of shape (8,)."),
    ("add_layer_norm", dict(x_bias=_T(7)), ValueError, _N + "x_bias has shape (7,); expected (hidden_size,) = (8,)."),
    ("add_layer_norm", dict(eps=0.0), ValueError,
     _N + "eps is 0.0; expected a number above 0."),
    # linear_act
    ("linear_act", dict(x=_T(())), ValueError, _F + "x has shape (); expected (..., in_features)."),
    ("linear_act", dict(weight=_T(6, 7)), ValueError,
     _F + "weight has shape (6, 7); expected (out_features, in_features) = (any, 8)."),
    ("linear_act", dict(bias=_T(5)), ValueError, _F + "bias has shape (5,); expected (out_features,) = (6,)."),
    ("linear_act", dict(activation="swish"), ValueError,
     _F + "activation is 'swish'; expected one of 'none', 'gelu', 'gelu_tanh', 'relu', 'tanh'."),
    # embed_layer_norm
    ("embed_layer_norm", dict(word_embeddings=_T(9)), ValueError,
     _E + "word_embeddings has shape (9,); expected (vocab_size, hidden_size)."),
    ("embed_layer_norm", dict(input_ids=torch.zeros(1, 5).long()), ValueError,
     _E + "input_ids has shape (1, 5); expected (tokens,), packed."),
    ("embed_layer_norm", dict(input_ids=torch.tensor([0, 1, 9, 0, 0])), ValueError,
     _E + "input_ids holds 9; expected values in 0..8. These are the rows of word_embeddings."),
    ("embed_layer_norm", dict(position_ids=torch.tensor([0, -1, 0, 0, 0])), ValueError,
     _E + "position_ids holds -1; expected values in 0..6. These are the rows of position_embeddings."),
    ("embed_layer_norm", dict(token_type_ids=torch.zeros(4).long()), ValueError,
     _E + "token_type_ids has shape (4,); expected (tokens,) = (5,)."),
    ("embed_layer_norm", dict(task_type_ids=None), ValueError,
     _E + "task_type_ids is None; expected both task_type_ids and task_type_embeddings, or neither."),
    ("embed_layer_norm", dict(position_embeddings=_T(7, 9)), ValueError,
     _E + "position_embeddings has shape (7, 9); expected (rows, hidden_size) = (any, 8)."),
    # char_cnn
    ("char_cnn", dict(char_ids=torch.zeros(3, 6)), TypeError,
     _C + "char_ids has dtype torch.float32; expected int64 or int32. Convert it with .long()."),
    ("char_cnn", dict(char_ids=torch.full((3, 6), 9)), ValueError,
     _C + "char_ids holds 9; expected values in 0..8. These are the rows of char_embeddings."),
    ("char_cnn", dict(conv_biases=[_T(5)]), ValueError,
     _C + "conv_weights holds 2 tensors and conv_biases 1; expected one of each per filter width."),
    ("char_cnn", dict(conv_weights=[_T(5, 4, 2), _T(7, 4, 8)]), ValueError,
     _C + "conv_weights[1] has width 8; expected at most 6, the characters of a word in char_ids."),
    ("char_cnn", dict(activation="gelu"), ValueError, _C + "activation is 'gelu'; expected one of 'relu', 'tanh'."),
    # transformer_layers
    ("transformer_layers", dict(x=_T(1, 5, 8)), ValueError,
     _Y + "x has shape (1, 5, 8); expected (tokens, hidden_size), packed. Pack a padded batch with ctxfast.packing "
     "first."),
    ("transformer_layers", dict(x=_T(5, 8).long()), TypeError, _Y + "x has dtype torch.int64; " + _FLOATS),
    ("transformer_layers", dict(num_heads=3), ValueError,
     _Y + "num_heads is 3; expected a divisor of hidden_size = 8."),
    ("transformer_layers", dict(weights=[]), ValueError,
     _Y + "weights holds 0 tensors; expected 12 for each of one or more layers: weight and bias of qkv, project, "
     "attention_norm, widen, narrow, output_norm."),
    ("transformer_layers", dict(weights=_weights()[:-1]), ValueError,
     _Y + "weights holds 23 tensors; expected 12 for each of one or more layers: weight and bias of qkv, project, "
     "attention_norm, widen, narrow, output_norm."),
    ("transformer_layers", dict(weights=_weights(at=0, put=_T(8, 24))), ValueError,
     _Y + "weight of qkv of layer 0 has shape (8, 24); expected (3*hidden_size, hidden_size) = (24, 8)."),
    ("transformer_layers", dict(weights=_weights(at=15, put=_T(7))), ValueError,
     _Y + "bias of project of layer 1 has shape (7,); expected (hidden_size,) = (8,)."),
    ("transformer_layers", dict(weights=_weights(at=5, put=None)), TypeError,
     _Y + "bias of attention_norm of layer 0 is a NoneType; expected a torch.Tensor."),
    ("transformer_layers", dict(weights=_weights(at=6, put=None)), TypeError,
     _Y + "weight of widen of layer 0 is a NoneType; expected a torch.Tensor."),
    ("transformer_layers", dict(weights=_weights(at=18, put=_T(7, 8))), ValueError,
     _Y + "weight of widen of layer 1 has shape (7, 8); expected (intermediate_size, hidden_size) = (6, 8)."),
    ("transformer_layers", dict(weights=_weights(at=8, put=_T(8, 7))), ValueError,
     _Y + "weight of narrow of layer 0 has shape (8, 7); expected (hidden_size, intermediate_size) = (8, 6)."),
    ("transformer_layers", dict(weights=_weights(at=18, put=_T(6, 8).half())), TypeError,
     _Y + "weight of widen of layer 1 has dtype torch.float16; expected torch.float32, that of x. " + _CONVERT),
    ("transformer_layers", dict(cu_seqlens=torch.tensor([0, 6, 5])), ValueError,
     _Y + "cu_seqlens runs from 0 to 5; expected offsets that never fall, from 0 to the 5 rows of x."),
    ("transformer_layers", dict(max_seqlen=2), ValueError,
     _Y + "max_seqlen is 2; expected at least 3, the longest sequence in cu_seqlens."),
    ("transformer_layers", dict(max_seqlen=3.5), TypeError, _Y + "max_seqlen is a float; expected an int."),
    ("transformer_layers", dict(activation="swish"), ValueError,
     _Y + "activation is 'swish'; expected one of 'none', 'gelu', 'gelu_tanh', 'relu', 'tanh'."),
    ("transformer_layers", dict(weight_dtype=torch.float16), ValueError,
     _Y + "weight_dtype is torch.float16; expected one of None, torch.int8."),
    # scalar_mix
    ("scalar_mix", dict(tensors=[]), ValueError, _M + "tensors holds 0 tensors; expected at least one layer."),
    ("scalar_mix", dict(tensors=[_T(2, 3, 4), _T(2, 3, 5)]), ValueError,
     _M + "tensors[1] has shape (2, 3, 5); expected the shape of tensors[0] = (2, 3, 4)."),
    ("scalar_mix", dict(scalar_parameters=_T(3)), ValueError,
     _M + "scalar_parameters has shape (3,); expected (layers,) = (2,)."),
    ("scalar_mix", dict(gamma=_T(2)), ValueError, _M + "gamma has shape (2,); expected (1,) = (1,)."),
    ("scalar_mix", dict(mask=None), ValueError,
     _M + "mask is None; expected the mask of real rows, since do_layer_norm takes its statistics over them."),
    ("scalar_mix", dict(mask=torch.ones(2, 4).bool()), ValueError,
     _M + "mask has shape (2, 4); expected tensors[0] without its last dimension = (2, 3)."),
    ("scalar_mix", dict(tensors=[_T(2, 3, 4).bfloat16()] * 2), TypeError,
     _M + "tensors[0] has dtype torch.bfloat16; expected float32 or float16 with do_layer_norm. "
     "Convert with .float()."),
    # linear_cross_entropy
    ("linear_cross_entropy", dict(hidden=_T(5)), ValueError,
     _X + "hidden has shape (5,); expected (rows, hidden_size) = (any, any)."),
    ("linear_cross_entropy", dict(labels=torch.tensor([0, 1, 9, -100, 2])), ValueError,
     _X + "labels holds 9; expected values in 0..8. Rows without a label hold ignore_index (-100)."),
    ("linear_cross_entropy", dict(labels=torch.zeros(4).long()), ValueError,
     _X + "labels has shape (4,); expected (rows,) = (5,)."),
    ("linear_cross_entropy", dict(reduction="avg"), ValueError,
     _X + "reduction is 'avg'; expected one of 'mean', 'sum', 'none'."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "kind", "message"), TABLE, ids=[f"{row[0]}-{i}" for i, row in enumerate(TABLE)]
)
def test_bad_input(op, change, kind, message, monkeypatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an implementation ran before the check")

    monkeypatch.setattr(registry, "resolve", never)
    with pytest.raises(kind) as error:
        public(op)(**{**_good(op), **change})
    assert str(error.value) == message
    assert type(error.value) is kind


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_the_good_arguments_are_good(op) -> None:
    """What the table above changes is what it fails for."""
    public(op)(**_good(op))
    registry.OPS[op].check_all(arguments(op, _good(op)))


def test_every_op_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(registry.OPS)


@pytest.mark.parametrize(
    ("op", "impl"),
    [(spec.name, impl.name) for spec, impl in combinations() if impl.name != "reference" and device_of(impl) == "cpu"],
)
def test_kernels_refuse_float64_by_name(op, impl) -> None:
    """The definition takes it; whoever asks for a kernel is told, and nobody gets a rounded result unasked."""
    good = convert(tuple(_good(op).values()), torch.Tensor.double)
    given = dict(zip(_good(op), good))
    with pytest.raises(RuntimeError, match=rf"ctxfast\.{op}: impl='{impl}' .* is torch\.float64\."):
        public(op)(**given, impl=impl)
    found = public(op)(**given)
    first = found[0] if isinstance(found, tuple) else found
    assert first.dtype == torch.float64


def test_a_missing_extension_is_said(monkeypatch) -> None:
    from ctxfast._core import capability

    monkeypatch.setattr(capability, "_C", None)
    monkeypatch.setattr(capability, "_IMPORT_ERROR", "No module named 'ctxfast._C'")
    with pytest.raises(RuntimeError, match=r"the compiled extension ctxfast\._C is not there .* pip install \."):
        public("lstm")(**_good("lstm"), impl="cpu")
    output, _ = public("lstm")(**_good("lstm"))  # the choice says so in explain, and takes the reference
    assert output.shape == (2, 3, 12)

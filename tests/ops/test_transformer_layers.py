# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to ``transformer_layers``: when modules take it, and that it has the bits of the parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast.models.bert.modeling import Encoder
from ctxfast.nn import encoder as nn_encoder
from ctxfast.ops.shared.packed_weights import CACHE

LENGTHS = (7, 0, 1, 33, 18)


def _layer(dtype: torch.dtype = torch.float32, **options) -> ctxfast.nn.TransformerLayer:
    return ctxfast.nn.TransformerLayer(48, 4, 80, dtype=dtype, **options).eval()


def _tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    offsets = torch.tensor((0, *LENGTHS)).cumsum(0, dtype=torch.int32)
    return torch.randn(sum(LENGTHS), 48).to(dtype), offsets, max(LENGTHS)


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[int]]:
    """One entry for every time that layers were asked to be computed in one call: how many were."""
    seen: list[int] = []
    one_call = nn_encoder.one_call

    def spy(layers, *args):
        states = one_call(layers, *args)
        seen.append(0 if states is None else len(layers))
        return states

    monkeypatch.setattr(nn_encoder, "one_call", spy)
    yield seen


def _encoder(dtype: torch.dtype = torch.float32, kind: str | None = None, **changes) -> Encoder:
    config = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, vocab_size=20)
    bert = ctxfast.Bert(ctxfast.BertConfig(**(config | changes))).to(dtype).eval().quantize(kind)
    for parameter in bert.parameters():  # first weights are so small that a wrong layer would hardly show
        nn.init.normal_(parameter, std=0.3)
    return bert.encoder


def _one_by_one(encoder: Encoder, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
    states = [x]
    for layer in encoder.layer:
        states.append(layer(states[-1], cu_seqlens, max_seqlen))
    return states


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", [None, "int8"], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_has_the_bits_of_the_parts(calls, dtype, kind) -> None:
    encoder, tokens = _encoder(dtype, kind), _tokens(dtype)
    with torch.no_grad():
        whole, last = encoder(*tokens), encoder(*tokens, output_hidden_states=False)
        assert calls == [3, 3]
        layers = _one_by_one(encoder, *tokens)
        assert calls == [3, 3, 1, 1, 1]
        with ctxfast.use_impl(linear_act="cpu"):  # asks for a part by name: the parts are called
            parts = encoder(*tokens)
    assert calls == [3, 3, 1, 1, 1]
    assert _same(whole, parts) and _same(whole, layers) and _same(last, parts[-1:])
    assert len({state.untyped_storage().data_ptr() for state in whole}) == 4  # one kept does not keep the others


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_one_call_has_the_same_bits_on_any_number_of_threads(threads) -> None:
    encoder, tokens, before = _encoder(), _tokens(), torch.get_num_threads()
    with torch.no_grad():
        expected = _one_by_one(encoder, *tokens)
        torch.set_num_threads(threads)
        try:
            assert _same(encoder(*tokens), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no-sequences", "empty-sequences"])
def test_no_tokens(calls, lengths) -> None:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    with torch.no_grad():
        states = _encoder()(torch.zeros(0, 48), offsets, 0)
    assert calls == [3] and [tuple(state.shape) for state in states] == [(0, 48)] * 4


def test_an_encoder_without_layers() -> None:
    encoder, (x, *offsets) = _encoder(), _tokens()
    encoder.layer = nn.ModuleList()
    with torch.no_grad():
        assert _same(encoder(x, *offsets), [x])


PARTS = ("", "attention", "attention.self", "attention.output", "attention.output.dense", "attention.output.LayerNorm",
         "intermediate", "intermediate.dense", "output", "output.dense", "output.LayerNorm")  # fmt: skip


@pytest.mark.parametrize("is_recorded", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "compiled", "hook-of-all"])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("part", PARTS)
def test_whoever_looks_at_a_part_of_a_layer_sees_it(calls, part, index, kind, is_recorded) -> None:
    encoder, tokens, seen = _encoder(), _tokens(), []
    module, handle = encoder.layer[index].get_submodule(part), None
    with torch.set_grad_enabled(is_recorded):
        expected = encoder(*tokens)
        if kind == "hook":
            module.register_forward_hook(lambda *given: seen.append(given))
        elif kind == "pre-hook":
            module.register_forward_pre_hook(lambda *given: seen.append(given))
        elif kind == "forward":
            forward = module.forward
            module.forward = lambda *given: seen.append(given) or forward(*given)
        elif kind == "compiled":
            module._compiled_call_impl = lambda *given: seen.append(given) or module.forward(*given)
        else:
            handle = nn.modules.module.register_module_forward_hook(
                lambda each, *given: seen.append(given) if each is module else None
            )
        try:
            found = encoder(*tokens)
        finally:
            if handle is not None:
                handle.remove()
    if kind == "hook-of-all" and isinstance(module, nn.Linear):  # its parameters are read, as ever
        return
    assert seen and (is_recorded or (calls[0] == 3 and 3 not in calls[1:]))
    if isinstance(module, nn.Linear):  # torch's own product, where its call is to be seen
        for one, two in zip(found, expected):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    else:
        assert _same(found, expected)


def _other_module(encoder: Encoder) -> None:
    encoder.layer[1] = nn.Identity()
    encoder.layer[1].forward = lambda x, *offsets: x + 1


def _other_precision(encoder: Encoder) -> None:
    for part in encoder.layer[1].modules():
        if hasattr(part, "weight_dtype"):
            part.weight_dtype = torch.int8


def _other_heads(encoder: Encoder) -> None:
    encoder.layer[2].attention.self.num_heads, encoder.layer[2].attention.self.head_dim = 2, 24


def _other_activation(encoder: Encoder) -> None:
    encoder.layer[0].intermediate.activation = "relu"


def _other_epsilon(encoder: Encoder) -> None:
    encoder.layer[2].output.LayerNorm.eps = encoder.layer[2].attention.output.LayerNorm.eps = 0.1


@pytest.mark.parametrize("change", [_other_module, _other_precision, _other_heads, _other_activation, _other_epsilon])
def test_layers_that_differ_run_one_by_one(calls, change) -> None:
    encoder, tokens = _encoder(), _tokens()
    with torch.no_grad():
        before = encoder(*tokens)
        change(encoder)
        after = encoder(*tokens)
        assert calls[0] == 3 and 3 not in calls[1:]
        assert _same(after, _one_by_one(encoder, *tokens))
    assert not torch.equal(before[-1], after[-1])


def _write(encoder: Encoder, index: int, name: str) -> None:
    with torch.no_grad():
        encoder.layer[index].get_parameter(name).mul_(3)


def _write_data(encoder: Encoder, index: int, name: str) -> None:
    encoder.layer[index].get_parameter(name).data.mul_(3)


def _give_data(encoder: Encoder, index: int, name: str) -> None:
    parameter = encoder.layer[index].get_parameter(name)
    parameter.data = parameter.data * 3


def _put_another(encoder: Encoder, index: int, name: str) -> None:
    owner, _, own = name.rpartition(".")
    setattr(encoder.layer[index].get_submodule(owner), own,
            nn.Parameter(encoder.layer[index].get_parameter(name).detach() * 3))  # fmt: skip


NAMES = [name for name, _ in ctxfast.nn.TransformerLayer(8, 2, 8).named_parameters()]


@pytest.mark.parametrize("change", [_write, _write_data, _give_data, _put_another])
@pytest.mark.parametrize("name", NAMES)
def test_changed_weights_are_noticed(calls, change, name) -> None:
    encoder, tokens = _encoder(), _tokens()
    with torch.no_grad():
        before = encoder(*tokens)
        change(encoder, 1, name)
        after = encoder(*tokens)
        assert calls == [3, 3]
        with ctxfast.use_impl("reference"):
            expected = encoder(*tokens)
    assert torch.equal(before[1], after[1])
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
    assert (after[2] - before[2]).abs().max() > 1e-2


def test_weights_changed_in_inference_mode_are_noticed(calls) -> None:
    with torch.inference_mode():  # tensors made here have no version
        encoder, tokens = _encoder(), _tokens()
        before = encoder(*tokens)
        assert _same(encoder(*tokens), before)
        encoder.layer[2].output.dense.weight.mul_(2)
        after = encoder(*tokens)
        assert _same(after, _one_by_one(encoder, *tokens))
    assert calls[:3] == [3, 3, 3] and not torch.equal(before[-1], after[-1])


def test_packed_layers_go_with_their_weights() -> None:
    gc.collect()
    before = len(CACHE)
    encoder = _encoder()
    with torch.no_grad():
        encoder(*_tokens())
        assert len(CACHE) == before + 1 + 3 * 4  # the table of all layers, and each product's weights
        del encoder
    gc.collect()
    assert len(CACHE) == before


def test_strided_biases_and_norms() -> None:
    encoder, tokens = _encoder(), _tokens()
    with torch.no_grad():
        expected = encoder(*tokens)
        for name in NAMES:
            parameter = encoder.layer[1].get_parameter(name)
            if parameter.dim() == 1:
                parameter.data = torch.stack((parameter.data, torch.full_like(parameter, torch.nan)), dim=1)[:, 0]
        assert _same(encoder(*tokens), expected)


def _hook(layer: nn.Module) -> None:
    layer.intermediate.register_forward_hook(lambda module, args, output: output * 2)


def _replace(layer: nn.Module) -> None:
    layer.output.dense = nn.Sequential(layer.output.dense)
    layer.output.dense.weight, layer.output.dense.bias = layer.output.dense[0].weight, layer.output.dense[0].bias


def _replace_block(layer: nn.Module) -> None:
    layer.intermediate = nn.Sequential(layer.intermediate)  # has no such parts inside as the one it replaces


def _pick(layer: nn.Module) -> None:
    layer.attention.self.impl = "reference"


def _other_eps(layer: nn.Module) -> None:
    layer.output.LayerNorm.eps = 1e-3


def _drop(layer: nn.Module) -> None:
    layer.train()


CHANGES: list[Callable[[nn.Module], None]] = [_hook, _replace, _replace_block, _pick, _other_eps, _drop]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_another_runs_its_parts(calls, change) -> None:
    layer, tokens = _layer(dropout=0.5), _tokens()
    with torch.no_grad():
        before = layer(*tokens)
        change(layer)
        after = layer(*tokens)
    assert calls[0] == 1 and 1 not in calls[1:]
    # Another way to the same result, or another result.
    assert torch.allclose(before, after, atol=1e-5) == (change in (_replace, _replace_block, _pick))


@pytest.mark.parametrize(
    "around",
    [
        nullcontext,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: ctxfast.use_impl("reference"),
        lambda: ctxfast.use_impl(attention="reference"),
    ],
    ids=["gradients", "autocast", "reference", "a-part"],
)
def test_calls_that_go_another_way(calls, around: Callable[[], AbstractContextManager]) -> None:
    layer, tokens = _layer(), _tokens()
    with torch.set_grad_enabled(around is nullcontext), around():
        y = layer(*tokens)
    assert 1 not in calls
    assert y.requires_grad == (around is nullcontext)
    with torch.no_grad():
        torch.testing.assert_close(layer(*tokens), y.detach().float(), rtol=0, atol=5e-2)


def test_what_no_part_can_run_is_refused_as_before() -> None:
    with torch.no_grad(), ctxfast.use_impl(linear_act="triton"), pytest.raises(RuntimeError, match="triton"):
        _layer()(*_tokens())


@pytest.mark.parametrize("weight_dtype", [None, torch.int8], ids=["float32", "int8"])
def test_a_texts_bits_do_not_depend_on_its_batch_or_on_threads(weight_dtype) -> None:
    bert = ctxfast.Bert(
        ctxfast.BertConfig(
            vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        )
    ).eval()
    bert.quantize("int8" if weight_dtype else None)
    ids, lengths = torch.randint(0, 50, (6, 40)), (40, 1, 17, 32, 33, 5)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            together = bert(ids, attention_mask=mask).last_hidden_state
            torch.set_num_threads(1)
            for row, length in enumerate(lengths):
                alone = bert(ids[row : row + 1, :length]).last_hidden_state
                assert torch.equal(alone[0], together[row, :length]), length
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [_layer, _encoder])
def test_compiled_layers_are_one_graph(make) -> None:
    module, tokens = make(), _tokens()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tokens), module(*tokens), rtol=0, atol=1e-6)
        # The compiled one reads the weights, too.
        (module if make is _layer else module.layer[1]).output.dense.weight.mul_(2)
        torch.testing.assert_close(compiled(*tokens), module(*tokens), rtol=0, atol=1e-6)


def test_exported_layers_hold_one_operator() -> None:
    encoder, tokens = _encoder(), _tokens()
    with torch.no_grad():
        exported = torch.export.export(encoder, tokens)
        targets = [str(node.target) for node in exported.graph.nodes]
        assert targets.count("ctxfast.transformer_layers_cpu_fwd.default") == 1
        assert _same(exported.module()(*tokens), encoder(*tokens))

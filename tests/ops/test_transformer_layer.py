# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to ``transformer_layer``: when a module takes it, and that it has the bits of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import ctxfast
from ctxfast.nn import whole_layer

LENGTHS = (7, 0, 1, 33, 18)


def _layer(dtype: torch.dtype = torch.float32, **options) -> ctxfast.nn.TransformerLayer:
    return ctxfast.nn.TransformerLayer(48, 4, 80, dtype=dtype, **options).eval()


def _tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    offsets = torch.tensor((0, *LENGTHS)).cumsum(0, dtype=torch.int32)
    return torch.randn(sum(LENGTHS), 48).to(dtype), offsets, max(LENGTHS)


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[bool]]:
    """One entry for every layer that was asked to be computed in one call: whether it was."""
    seen: list[bool] = []
    run = whole_layer.run

    def spy(*args, **kwargs):
        y = run(*args, **kwargs)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(whole_layer, "run", spy)
    yield seen


@pytest.mark.parametrize("weight_dtype", [None, torch.int8], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_has_the_bits_of_the_parts(calls, dtype, weight_dtype) -> None:
    layer, tokens = _layer(dtype), _tokens(dtype)
    for module in layer.modules():
        if hasattr(module, "weight_dtype"):
            module.weight_dtype = weight_dtype
    with torch.no_grad():
        whole = layer(*tokens)
        assert calls == [True]
        with ctxfast.use_impl(linear_act="cpu"):  # asks for a part by name: the parts are called
            parts = layer(*tokens)
    assert calls == [True]
    assert torch.equal(whole, parts)


def _hook(layer: nn.Module) -> None:
    layer.intermediate.register_forward_hook(lambda module, args, output: output * 2)


def _replace(layer: nn.Module) -> None:
    layer.output.dense = nn.Sequential(layer.output.dense)
    layer.output.dense.weight, layer.output.dense.bias = layer.output.dense[0].weight, layer.output.dense[0].bias


def _pick(layer: nn.Module) -> None:
    layer.attention.self.impl = "reference"


def _other_eps(layer: nn.Module) -> None:
    layer.output.LayerNorm.eps = 1e-3


def _drop(layer: nn.Module) -> None:
    layer.train()


CHANGES: list[Callable[[nn.Module], None]] = [_hook, _replace, _pick, _other_eps, _drop]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_another_runs_its_parts(calls, change) -> None:
    layer, tokens = _layer(dropout=0.5), _tokens()
    with torch.no_grad():
        before = layer(*tokens)
        change(layer)
        after = layer(*tokens)
    assert calls == [True]
    # Another way to the same result, or another result.
    assert torch.allclose(before, after, atol=1e-5) == (change in (_replace, _pick))


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
    assert True not in calls
    assert y.requires_grad == (around is nullcontext)
    with torch.no_grad():
        torch.testing.assert_close(layer(*tokens), y.detach().float(), rtol=0, atol=5e-2)


def test_what_no_part_can_run_is_refused_as_before() -> None:
    with torch.no_grad(), ctxfast.use_impl("triton"), pytest.raises(RuntimeError, match="triton"):
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


def test_compiled_layers_are_one_graph() -> None:
    layer, tokens = _layer(), _tokens()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tokens), layer(*tokens), rtol=0, atol=1e-6)

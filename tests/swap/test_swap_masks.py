# SPDX-License-Identifier: Apache-2.0
"""Attention masks of swapped encoders: padding masks are read as Hugging Face's attention reads them, and calls with
any other are the original's."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model as _model
from torch import Tensor

import ctxfast
from ctxfast.packing import Packing
from ctxfast.swap import transformers as swap_transformers

pytest.importorskip("transformers")


def _per_query() -> Tensor:
    """(B, 1, L, L): every token sees itself and what comes before."""
    return torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)


ORIGINAL_CALLS = {
    "padding comes first": dict(attention_mask=MASK.flip(1)),
    "an empty row": dict(attention_mask=MASK * torch.tensor([[1], [0], [1]])),
    "masks differ by query": dict(attention_mask=_per_query()),
}


@pytest.mark.parametrize("call", ORIGINAL_CALLS.values(), ids=ORIGINAL_CALLS)
@torch.no_grad()
def test_calls_left_to_the_original(call) -> None:
    """To the bit, at padding too."""
    model = _model("Bert")
    expected = model(IDS, **call).last_hidden_state
    ctxfast.swap_in(model)
    assert torch.equal(model(IDS, **call).last_hidden_state, expected)


def _wide(mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None].expand(-1, 1, 7, 7)


def _added(low: float) -> Tensor:
    return torch.where(_wide(MASK), 0.0, low)


MASKS = {
    "0 and 1": (MASK, True),
    "repeated": (_wide(MASK), True),
    "one for all texts": (_wide(MASK[1:2]), False),
    "lowest float added": (_added(torch.finfo(torch.float32).min), True),
    "infinity added": (_added(-torch.inf), True),
    "a bias added": (_added(-torch.inf) + 0.5, None),
    "a slight penalty": (_added(-3.0), None),
    "by query": (_per_query(), None),
    "by head": (_wide(MASK).expand(-1, 2, 7, 7), None),
    "another length": (MASK[:, :5], None),
    "padding first": (MASK.flip(1), None),
    "no tensor": ("a block mask", None),
}


@pytest.mark.parametrize("name", MASKS)
def test_only_padding_masks_are_read(name) -> None:
    mask, is_own = MASKS[name]
    found = swap_transformers.real_tokens(mask, 3, 7)
    packing = None if found is None else Packing.from_tokens(*found)
    if is_own is None:
        assert packing is None
    else:
        real = packing.unpack(torch.ones(packing.total, dtype=torch.bool), fill=False)
        assert torch.equal(real, (MASK if is_own else MASK[1:2].expand(3, 7)).bool())


_FLOAT = torch.where(MASK.bool()[:, None, None], 0.0, -1e9)

# Masks that Hugging Face's attention functions read otherwise than as padding, or refuse.
ODD_MASKS = {
    "bool, added by eager attention": ("eager", MASK.bool()[:, None, None]),
    "whole numbers, added by eager attention": ("eager", (MASK[:, None, None] - 1) * 10**5),
    "whole numbers": ("sdpa", MASK[:, None, None] * 0),
    "float64": ("sdpa", _FLOAT.double()),
    "float64, added": ("eager", _FLOAT.double()),
    "float16": ("sdpa", _FLOAT.clamp(-6e4).half()),
    "two dimensions": ("sdpa", torch.ones(3, 7, dtype=torch.bool)),
    "float32, added": ("eager", _FLOAT),  # is read
}


@pytest.mark.parametrize("name", ODD_MASKS)
@torch.no_grad()
def test_odd_masks_are_the_originals(name) -> None:
    """The same numbers at every row, or the same error."""
    attention, mask = ODD_MASKS[name]
    model = _model("Bert", attn_implementation=attention)
    x = torch.randn(3, 7, 16)

    def run() -> Tensor | str:
        try:
            return model.encoder(x, mask).last_hidden_state
        except RuntimeError as error:
            return str(error)

    expected = run()
    ctxfast.swap_in(model)
    found = run()
    if name == "float32, added":
        torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
        assert not found[MASK == 0].any()
    else:
        assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


@torch.no_grad()
def test_a_mask_by_query_with_as_many_texts_as_positions() -> None:
    model = _model("Bert")
    x, mask = torch.randn(7, 7, 16), torch.ones(7, 7, dtype=torch.bool).tril()
    expected = model.encoder(x, mask).last_hidden_state
    ctxfast.swap_in(model)
    assert torch.equal(model.encoder(x, mask).last_hidden_state, expected)


def test_a_masks_gradient() -> None:
    model = _model("Bert", attn_implementation="eager")

    def gradient() -> Tensor:
        mask = _FLOAT.clone().requires_grad_()
        out = model(IDS, attention_mask=mask).last_hidden_state[MASK == 1].square().sum()
        return torch.autograd.grad(out, mask)[0]

    expected = gradient()
    assert expected.any()
    ctxfast.swap_in(model)
    torch.testing.assert_close(gradient(), expected)

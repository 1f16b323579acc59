# SPDX-License-Identifier: Apache-2.0
"""What the encoder refuses, with the exact words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.modeling import Bert
from ctxfast.nn import SelfAttention

SIZES = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=96, max_position_embeddings=64,
)  # fmt: skip


def _bert(**fields: object) -> Bert:
    return Bert(BertConfig(**{**SIZES, **fields})).eval()


_IDS = torch.zeros(2, 4, dtype=torch.int64)
_META = torch.zeros(2, 4, dtype=torch.int64, device="meta")
ERRORS: dict[str, tuple[Callable[[Bert], object], type[Exception], str]] = {
    "ids-list": (
        lambda m: m([[1, 2]]),
        TypeError,
        "ctxfast.Bert: input_ids is a list; expected a torch.Tensor.",
    ),
    "ids-float": (
        lambda m: m(_IDS.float()),
        TypeError,
        "ctxfast.Bert: input_ids has dtype torch.float32; expected int64 or int32. Convert it with .long().",
    ),
    "ids-float64": (
        lambda m: m(_IDS.double()),
        TypeError,
        "ctxfast.Bert: input_ids has dtype torch.float64; expected int64 or int32. Convert it with .long().",
    ),
    "ids-1d": (
        lambda m: m(_IDS[0]),
        ValueError,
        "ctxfast.Bert: input_ids has shape (4,); expected (batch, seqlen). One text alone is input_ids[None].",
    ),
    "ids-large": (
        lambda m: m(_IDS + 120),
        ValueError,
        "ctxfast.Bert: input_ids holds 120; expected values in 0..119. The model has 120 rows for them.",
    ),
    "ids-negative": (
        lambda m: m(_IDS - 1, check_inputs=True),
        ValueError,
        "ctxfast.Bert: input_ids holds -1; expected values in 0..119. The model has 120 rows for them.",
    ),
    "ids-long": (
        lambda m: m(torch.zeros(1, 65, dtype=torch.int64)),
        ValueError,
        "ctxfast.Bert: input_ids has 65 columns; expected at most 64, the positions of this model. "
        "Truncate the text or split it into windows.",
    ),
    "ids-device": (
        lambda m: m(_META),
        ValueError,
        "ctxfast.Bert: input_ids is on meta; expected cpu, where the model is. Move it with .to('cpu').",
    ),
    "mask-kind": (
        lambda m: m(_IDS, [[1]]),
        TypeError,
        "ctxfast.Bert: attention_mask is a list; expected a torch.Tensor.",
    ),
    "mask-shape": (
        lambda m: m(_IDS, torch.ones(2, 5)),
        ValueError,
        "ctxfast.Bert: attention_mask has shape (2, 5); expected (batch, seqlen) = (2, 4).",
    ),
    "mask-4d": (
        lambda m: m(_IDS, torch.ones(2, 1, 4, 4)),
        ValueError,
        "ctxfast.Bert: attention_mask has shape (2, 1, 4, 4); expected (batch, seqlen) = (2, 4). "
        "Masks that differ by query (decoder masks) are not supported.",
    ),
    "mask-3d": (
        lambda m: m(_IDS, torch.ones(2, 4, 4)),
        ValueError,
        "ctxfast.Bert: attention_mask has shape (2, 4, 4); expected (batch, seqlen) = (2, 4). "
        "Masks that differ by query (decoder masks) are not supported.",
    ),
    "mask-additive-4d": (
        lambda m: m(_IDS, torch.zeros(2, 1, 1, 4)),
        ValueError,
        "ctxfast.Bert: attention_mask has shape (2, 1, 1, 4); expected (batch, seqlen) = (2, 4). "
        "Masks that differ by query (decoder masks) are not supported.",
    ),
    "mask-nan": (
        lambda m: m(_IDS, torch.full((2, 4), float("nan"))),
        ValueError,
        "ctxfast.Packing: attention_mask holds other values than 0 and 1; expected 1 for a token, "
        "0 for padding. An additive mask becomes one with: mask == 0.",
    ),
    "mask-device": (
        lambda m: m(_IDS, _META),
        ValueError,
        "ctxfast.Bert: attention_mask is on meta; expected cpu, where the model is. Move it with .to('cpu').",
    ),
    "mask-additive": (
        lambda m: m(_IDS, torch.full((2, 4), -1e4)),
        ValueError,
        "ctxfast.Packing: attention_mask holds other values than 0 and 1; expected 1 for a token, "
        "0 for padding. An additive mask becomes one with: mask == 0.",
    ),
    "types-shape": (
        lambda m: m(_IDS, None, _IDS[:1]),
        ValueError,
        "ctxfast.Bert: token_type_ids has shape (1, 4); expected (batch, seqlen) = (2, 4).",
    ),
    "types-range": (
        lambda m: m(_IDS, None, _IDS + 2),
        ValueError,
        "ctxfast.Bert: token_type_ids holds 2; expected values in 0..1. The model has 2 rows for them.",
    ),
    "types-dtype": (
        lambda m: m(_IDS, None, _IDS.bool()),
        TypeError,
        "ctxfast.Bert: token_type_ids has dtype torch.bool; expected int64 or int32. Convert it with .long().",
    ),
    "positions-range": (
        lambda m: m(_IDS, position_ids=_IDS[:1] + 64),
        ValueError,
        "ctxfast.Bert: position_ids holds 64; expected values in 0..63. The model has 64 rows for them.",
    ),
    "positions-long": (
        lambda m: m(torch.zeros(1, 70, dtype=torch.int64), position_ids=torch.arange(70)[None]),
        ValueError,
        "ctxfast.Bert: position_ids holds 69; expected values in 0..63. The model has 64 rows for them.",
    ),
    "positions-relative": (
        lambda m: _bert(position_embedding_type="relative_key_query"),
        ValueError,
        "ctxfast.BertConfig: position_embedding_type is 'relative_key_query'; expected 'absolute'; relative key and "
        "query position embeddings are not supported",
    ),
    "positions-short-text": (  # 65 columns, of which the mask leaves three
        lambda m: m(torch.zeros(1, 65, dtype=torch.int64), (torch.arange(65) < 3).long()[None]),
        ValueError,
        "ctxfast.Bert: input_ids has 65 columns; expected at most 64, the positions of this model. "
        "Truncate the text or split it into windows.",
    ),
    "positions-shape": (
        lambda m: m(_IDS, position_ids=_IDS[0]),
        ValueError,
        "ctxfast.Bert: position_ids has shape (4,); expected (batch, seqlen) = (2, 4).",
    ),
    "tasks-absent": (
        lambda m: m(_IDS, task_type_ids=_IDS),
        ValueError,
        "ctxfast.Bert: task_type_ids is given; expected None, as this model has no task embedding (use_task_id).",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind) as caught:
        call(_bert())
    assert str(caught.value) == text


@torch.no_grad()
def test_masks_with_holes_are_packed() -> None:
    """Tokens on both sides of a hole see each other and keep their positions; the hole itself gives zeros."""
    model, ids = _bert(), torch.tensor([[5, 9, 17, 3, 40]])
    found = model(ids, torch.tensor([[1, 0, 1, 0, 1]])).last_hidden_state
    alone = model(ids[:, ::2], position_ids=torch.tensor([[0, 2, 4]])).last_hidden_state
    assert torch.equal(found[:, ::2], alone) and not found[:, 1::2].any()


def test_bad_task_types_and_roberta_length() -> None:
    ernie = _bert(model_type="ernie", use_task_id=True)
    with pytest.raises(ValueError, match=r"task_type_ids holds 3; expected values in 0\.\.2\."):
        ernie(_IDS, task_type_ids=_IDS + 3)
    roberta = _bert(model_type="roberta", type_vocab_size=1)
    with pytest.raises(ValueError, match="input_ids has 63 columns; expected at most 62"):
        roberta(torch.zeros(1, 63, dtype=torch.int64))


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError) as caught:
        SelfAttention(10, 3)
    assert str(caught.value) == ("ctxfast.nn.SelfAttention: hidden_size is 10; expected a multiple of num_heads = 3.")


@pytest.mark.gpu
def test_ids_on_a_gpu_are_checked_when_asked() -> None:
    model = _bert().cuda()
    with pytest.raises(ValueError, match=r"input_ids holds 120; expected values in 0\.\.119"):
        model(_IDS.cuda() + 120, check_inputs=True)

# SPDX-License-Identifier: Apache-2.0
"""padding="keep": Hugging Face's values in every row, those at padding too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.hf_models import HF_FAMILIES, pair
from torch import Tensor

import ctxfast
from ctxfast.models.bert import heads
from ctxfast.models.bert.modeling import Bert

SIZES = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=66, initializer_range=0.1,
)  # fmt: skip
B, L = 4, 11


def _pair(
    model_type: str = "bert", head: str = "Model", attention: str = "sdpa", **fields: object
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours, with padding kept, and Hugging Face's."""
    torch.manual_seed(0)
    ours, theirs = pair(model_type, head, attention, **{**SIZES, **fields})
    encoder = ours if head == "Model" else ours.bert
    encoder.padding = "keep"
    return ours, theirs


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[int(digit) for digit in row] for row in rows])


MASKS = {
    "right": _mask("11111111111", "11111100000", "11100000000", "10000000000"),
    "left": _mask("11111111111", "00000111111", "00000000111", "00000000001"),
    "holes": _mask("01101011010", "10000000001", "00010100000", "11111011111"),
    "no text": _mask("11111111111", "00000000000", "11111100000", "00000000000"),
    "full": torch.ones(B, L, dtype=torch.int64),
    "none": None,
}


def _inputs(model_type: str = "bert", mask: Tensor | None = None) -> dict[str, Tensor]:
    ids = torch.randint(2, 120, (B, L), generator=torch.Generator().manual_seed(1))
    if mask is not None:
        ids[mask == 0] = 1 if "roberta" in model_type else 0
    types = torch.randint(2, (B, L), generator=torch.Generator().manual_seed(2)) if model_type == "bert" else None
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("model_type", HF_FAMILIES)
def test_every_row_of_every_layer(model_type, kind) -> None:
    # Where a text has no token, Hugging Face's two attentions differ: sdpa, its default, gives zeros for the context,
    # eager attention the mean of all values.
    for attention in ("sdpa",) if kind == "no text" else ("sdpa", "eager"):
        ours, theirs = _pair(model_type, attention=attention)
        inputs = _inputs(model_type, MASKS[kind])
        with torch.no_grad():
            found, expected = (model(**inputs, output_hidden_states=True) for model in (ours, theirs))
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            _close(one, other)
        _close(found.last_hidden_state, expected.last_hidden_state)
        _close(found.pooler_output, expected.pooler_output)
        assert found.packing.total == B * L
        _close(found.packed_last_hidden_state.view(B, L, -1), expected.last_hidden_state)


def test_gradients_of_a_loss_over_every_row() -> None:
    ours, theirs = _pair()
    for kind in ("right", "holes", "no text"):
        inputs = _inputs(mask=MASKS[kind])
        for model in (ours, theirs):
            model.zero_grad()
            out = model(**inputs, output_hidden_states=True)
            weights = torch.linspace(-1, 1, out.last_hidden_state.numel()).view_as(out.last_hidden_state)
            (sum(state * weights for state in out.hidden_states).sum() + out.pooler_output.sum()).backward()
        names, kept = dict(theirs.named_parameters()), {}
        for prefix, module in ours.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("qkv_"):
                    for part, grad in zip(("query", "key", "value"), parameter.grad.chunk(3)):
                        kept[f"{prefix}.{part}.{name.removeprefix('qkv_')}"] = grad
                else:
                    kept[f"{prefix}.{name}"] = parameter.grad
        assert kept.keys() == names.keys()
        for name, grad in kept.items():
            torch.testing.assert_close(
                grad, names[name].grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
            )


LABELS = {
    "ForPreTraining": {"labels": (B, L, 120), "next_sentence_label": (B, 2)},
    "ForMaskedLM": {"labels": (B, L, 120)},
    "ForNextSentencePrediction": {"labels": (B, 2)},
    "ForSequenceClassification": {"labels": (B, 2)},
    "ForTokenClassification": {"labels": (B, L, 2)},
    "ForQuestionAnswering": {"start_positions": (B, L), "end_positions": (B, L)},
}
LOGITS = ("logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits")


@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("head", LABELS)
def test_heads_at_every_row(head, kind) -> None:
    """Labels and answers at padding count as they do there."""
    ours, theirs = _pair(head=head)
    inputs = _inputs(mask=MASKS[kind])
    generator = torch.Generator().manual_seed(3)
    labels = {name: torch.randint(sizes[-1], sizes[:-1], generator=generator) for name, sizes in LABELS[head].items()}
    with torch.no_grad():
        found, expected = (model(**inputs) for model in (ours, theirs))
        compared = [name for name in LOGITS if hasattr(expected, name)]
        assert compared
        for name in compared:
            _close(getattr(found, name), getattr(expected, name), 2e-5)
        losses = [model(**inputs, **labels).loss for model in (ours, theirs)]
        _close(*losses)
        other = ours(**inputs, **labels, padding="zero").loss  # a call's own choice goes first
    is_of_rows = head not in ("ForNextSentencePrediction", "ForSequenceClassification")
    assert (abs(float(other - losses[1])) > 1e-3) == (is_of_rows or kind == "left")


def test_real_rows_are_those_of_packed_calls() -> None:
    ours, _ = _pair()
    inputs = _inputs(mask=MASKS["holes"])
    real = MASKS["holes"].bool()
    with torch.no_grad():
        kept, zero = ours(**inputs).last_hidden_state, ours(**inputs, padding="zero").last_hidden_state
    _close(kept[real], zero[real], 2e-6)
    assert not zero[~real].any()


def test_where_it_is_chosen(tmp_path: Path) -> None:
    ours, theirs = _pair()
    ours.save_pretrained(tmp_path)
    inputs = _inputs(mask=MASKS["right"])

    def keeps(model: Bert, **options: str) -> bool:
        with torch.no_grad():
            return bool(model(**inputs, **options).last_hidden_state[MASKS["right"] == 0].any())

    assert ours.padding == "keep" and keeps(ours) and not keeps(ours, padding="zero")
    made, read = Bert(ours.config, padding="keep"), Bert.from_pretrained(tmp_path, padding="keep")
    assert keeps(made) and keeps(read)
    plain = Bert.from_pretrained(tmp_path)
    assert plain.padding == "zero" and not keeps(plain) and keeps(plain, padding="keep")
    plain.padding = "keep"
    assert keeps(plain)
    tagger = heads.BertForTokenClassification(ours.config)
    tagger.save_pretrained(tmp_path / "tagger")
    assert heads.BertForTokenClassification.from_pretrained(tmp_path / "tagger", padding="keep").bert.padding == "keep"


def test_what_is_refused(tmp_path: Path) -> None:
    ours, _ = _pair()
    ids, wrong = _inputs()["input_ids"], r"^ctxfast.Bert: padding is 'kept'; expected one of 'zero', 'keep'\.$"
    with pytest.raises(ValueError, match=wrong):
        Bert(ours.config, padding="kept")
    for kind in (Bert, heads.BertForMaskedLM):
        with pytest.raises(ValueError, match=wrong):
            kind.from_pretrained(tmp_path, padding="kept")
    with pytest.raises(ValueError, match=wrong):
        ours.padding = "kept"
    with pytest.raises(ValueError, match=wrong):
        ours(ids, padding="kept")
    with pytest.raises(ValueError, match="^ctxfast.Bert: return_packed is True; expected False with padding='keep'"):
        ours(ids, return_packed=True)
    tagger = heads.BertForTokenClassification(ours.config)
    with pytest.raises(ValueError, match="^ctxfast.Bert: return_packed is True; expected False with padding='keep'"):
        tagger(ids, padding="keep", return_packed=True)


def test_autocast_checkpoints_and_dropout() -> None:
    ours, theirs = _pair()
    inputs = _inputs(mask=MASKS["holes"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (model(**inputs).last_hidden_state for model in (ours, theirs))
    _close(found.float(), expected.float(), 0.1)

    ours.train()
    plain = ours(**inputs).last_hidden_state
    assert not torch.equal(plain, ours(**inputs).last_hidden_state)  # dropout
    ours.gradient_checkpointing_enable()
    torch.manual_seed(5)
    ours(**inputs).last_hidden_state.square().sum().backward()
    again = [parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None]
    ours.gradient_checkpointing_enable(False)
    ours.zero_grad()
    torch.manual_seed(5)
    ours(**inputs).last_hidden_state.square().sum().backward()
    for one, other in zip(again, (p.grad for p in ours.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(one, other)


def test_int8_at_every_row() -> None:
    ours, theirs = _pair()
    inputs = _inputs(mask=MASKS["holes"])
    real = MASKS["holes"].bool()
    ours.quantize("int8")
    with torch.no_grad():
        kept, zero = (ours(**inputs, padding=padding).last_hidden_state for padding in ("keep", "zero"))
        expected = theirs(**inputs).last_hidden_state
    _close(kept[real], zero[real], 2e-6)
    assert torch.cosine_similarity(kept, expected, dim=-1).min() > 0.98
    assert not torch.equal(kept, expected)


@pytest.mark.slow
def test_compiled() -> None:
    ours, _ = _pair(num_hidden_layers=1)
    compiled = torch.compile(ours, backend="eager")  # breaks where the lengths are read
    for kind in ("right", "none"):
        inputs = _inputs(mask=MASKS[kind])
        with torch.no_grad():
            _close(compiled(**inputs).last_hidden_state, ours(**inputs).last_hidden_state)


def test_the_impl_of_the_parts_is_obeyed() -> None:
    ours, theirs = _pair()
    inputs = _inputs(mask=MASKS["right"])
    with torch.no_grad(), ctxfast.use_impl("reference"):
        _close(ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state)
    ours.encoder.layer[0].attention.self.impl = "fast"
    with pytest.raises(ValueError, match="^ctxfast.attention: impl is 'fast'"):
        ours(**inputs)

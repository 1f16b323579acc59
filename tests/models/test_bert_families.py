# SPDX-License-Identifier: Apache-2.0
"""Every model type that ``swap_in`` makes faster opens, computes what Hugging Face's does, and is written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.hf_models import IDS, MASK, tiny_model

import ctxfast
from ctxfast import cli
from ctxfast.models.bert.config import MODEL_TYPES, BertConfig
from ctxfast.swap.transformers_kinds import ENCODERS

REAL = MASK.bool()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
# Type of a head -> its class here, and what of Hugging Face's output its logits are.
HEADS = {
    "MaskedLM": (ctxfast.BertForMaskedLM, "logits"),
    "SequenceClassification": (ctxfast.BertForSequenceClassification, "logits"),
    "TokenClassification": (ctxfast.BertForTokenClassification, "logits"),
    "QuestionAnswering": (ctxfast.BertForQuestionAnswering, "start_logits"),
}


def _save(kind: str, folder: Path, head: str = "Model", **options: object) -> torch.nn.Module:
    """A tiny model of Hugging Face's in a folder, with the vocabulary of a BERT where it has one such."""
    padding = 1 if kind == "MPNet" else 0
    model = tiny_model(kind, head, pad_token_id=padding, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and LayerNorm start at 0 and 1, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if kind in ("DistilBert", "Electra", "Ernie"):
        (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    if kind == "MPNet":
        names = {"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
        order = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *PIECES[5:], "##b", "[MASK]"]
        (folder / "vocab.txt").write_text("\n".join(names.get(piece, piece) for piece in order) + "\n")
    return model


def test_every_type_of_bert_is_one_of_swap_in() -> None:
    kinds = {name.split(".")[3].removeprefix("modeling_").replace("_", "-") for name in ENCODERS}
    assert kinds >= set(MODEL_TYPES)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DistilBert", {}),
        ("DistilBert", {"activation": "relu", "sinusoidal_pos_embds": True}),
        ("Electra", {"embedding_size": 8}),
        ("Electra", {"embedding_size": 16, "hidden_act": "relu"}),
        ("Camembert", {}),
        ("Data2VecText", {}),
        ("XLMRoberta", {"type_vocab_size": 1}),
        ("Ernie", {"use_task_id": True}),
        ("MPNet", {}),
    ],
)
def test_the_encoder(kind: str, options: dict, tmp_path: Path) -> None:
    theirs = _save(kind, tmp_path / "theirs", **options)
    ours = ctxfast.Bert.from_pretrained(tmp_path / "theirs")
    ids = IDS.masked_fill(MASK == 0, ours.config.pad_token_id)  # RoBERTa counts positions by the padding's id
    with torch.no_grad():
        mine = ours(ids, MASK, output_hidden_states=True, output_attentions=True)
        want = theirs(input_ids=ids, attention_mask=MASK, output_hidden_states=True)
        if kind != "MPNet":  # which has one attention, its own
            theirs.set_attn_implementation("eager")
        attentions = theirs(input_ids=ids, attention_mask=MASK, output_attentions=True).attentions
    assert len(mine.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip(mine.hidden_states, want.hidden_states):
        torch.testing.assert_close(a[REAL], b[REAL], rtol=0, atol=1e-5)
    both = (MASK[:, None, :, None] & MASK[:, None, None, :]).bool()
    for a, b in zip(mine.attentions, attentions, strict=True):
        torch.testing.assert_close(a, b.masked_fill(~both, 0.0), rtol=0, atol=1e-5)

    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--quiet"]) == 0
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    own, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert {name: back.get(name) for name in own} == own


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("DistilBert", {}), ("Electra", {"embedding_size": 8}), ("MPNet", {"hidden_act": "relu"}), ("Data2VecText", {})],
)
def test_the_heads(kind: str, options: dict, head: str, tmp_path: Path) -> None:
    theirs = _save(kind, tmp_path / "theirs", f"For{head}", **options)
    kind_of_ours, field = HEADS[head]
    ours = kind_of_ours.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "back")
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    ids = IDS.masked_fill(MASK == 0, ours.config.pad_token_id)
    with torch.no_grad():
        mine = getattr(ours(ids, MASK), field)
        for model in (theirs, again):
            want = getattr(model(input_ids=ids, attention_mask=MASK), field)
            shown = slice(None) if head == "SequenceClassification" else REAL
            torch.testing.assert_close(mine[shown], want[shown], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "head"), [("DistilBert", "MultipleChoice"), ("Electra", "PreTraining")])
def test_convert_keeps_heads_that_are_not_computed(kind: str, head: str, tmp_path: Path) -> None:
    theirs = _save(kind, tmp_path / "theirs", f"For{head}")
    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--quiet"]) == 0
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(again.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_training_drops_where_the_type_does(tmp_path: Path) -> None:
    """Of DistilBERT's attention block nothing is dropped, and spans and classifiers have probabilities of their own."""
    _save("DistilBert", tmp_path, dropout=0.25)
    layer = ctxfast.Bert.from_pretrained(tmp_path).train().encoder.layer[0]
    assert [layer.attention.self.dropout, layer.attention.output.LayerNorm.dropout] == [0.25, 0.0]
    assert layer.output.LayerNorm.dropout == 0.25
    config = BertConfig.from_dict({"model_type": "distilbert", "dropout": 0.3, "qa_dropout": 0.4})
    found = config.head_dropout, config.token_dropout, config.span_dropout
    assert (found, config.num_hidden_layers) == ((0.2, 0.3, 0.4), 6)
    assert BertConfig.from_dict({"model_type": "electra"}).embedding_size == 128


def test_gradients_are_hugging_faces(tmp_path: Path) -> None:
    theirs = _save("Electra", tmp_path, "ForSequenceClassification", embedding_size=8)
    ours = ctxfast.BertForSequenceClassification.from_pretrained(tmp_path)
    labels = torch.tensor([0, 1, 1])
    theirs(input_ids=IDS, attention_mask=MASK, labels=labels).loss.backward()
    ours(IDS, MASK, labels=labels).loss.backward()
    for mine, want in (
        (ours.bert.embeddings_project.weight, theirs.electra.embeddings_project.weight),
        (ours.bert.pooler.dense.weight, theirs.classifier.dense.weight),
        (ours.bert.embeddings.position_embeddings.weight, theirs.electra.embeddings.position_embeddings.weight),
    ):
        torch.testing.assert_close(mine.grad, want.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["DistilBert", "Electra", "MPNet"])
def test_texts_and_tasks(kind: str, tmp_path: Path) -> None:
    """From a folder to vectors as Transformers computes them, and through fine-tuning into a folder of its class."""
    from support.tiny_models import classified

    theirs = _save(kind, tmp_path / "bert")
    texts = ["a b c", "d e", "f"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    found = ctxfast.Embedder(tmp_path / "bert")(texts, level="token")
    for text, vectors in zip(texts, found):
        with torch.no_grad():
            want = theirs(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(vectors), want[1:-1], rtol=0, atol=1e-5)
    batch = ctxfast.BertTokenizer.from_pretrained(tmp_path / "bert").batch(texts)  # as README has it
    assert ctxfast.Bert.from_pretrained(tmp_path / "bert")(**batch).last_hidden_state.shape == (3, 5, 16)

    (tmp_path / "train.tsv").write_text(classified(8))
    words = ["finetune", "classify", "-m", tmp_path / "bert", "--train", tmp_path / "train.tsv", "-o", tmp_path / "run"]
    words += ["--epochs", "1", "--batch-size", "8", "--max-length", "16", "--quiet"]
    assert cli.main([*map(str, words)]) == 0
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "final")
    assert type(stored).__name__ == f"{kind}ForSequenceClassification"


def test_mpnet_trains_its_buckets_and_refuses_holes(tmp_path: Path) -> None:
    theirs = _save("MPNet", tmp_path, "ForSequenceClassification")
    ours = ctxfast.BertForSequenceClassification.from_pretrained(tmp_path)
    ids, labels = IDS.masked_fill(MASK == 0, 1), torch.tensor([0, 1, 1])
    theirs(input_ids=ids, attention_mask=MASK, labels=labels).loss.backward()
    want = theirs.mpnet.encoder.relative_attention_bias.weight.grad
    for recomputes in (False, True):
        ours.train()  # tiny models have no dropout
        ours.bert.gradient_checkpointing_enable(recomputes)
        ours.zero_grad()
        ours(ids, MASK, labels=labels).loss.backward()
        found = ours.bert.encoder.relative_attention_bias.weight.grad
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    holes = MASK.clone()
    holes[0, 2] = 0
    with pytest.raises(ValueError, match="attention_mask has zeros between a text's tokens; expected none for mpnet"):
        ours(ids, holes)
    left = torch.tensor([[0] * 3 + [1] * 4])  # padding before a text moves it, and no distance in it
    shifted = torch.cat((torch.ones(1, 3, dtype=torch.long), ids[:1, :4]), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(shifted, left).logits, ours(ids[:1, :4]).logits)
    with pytest.raises(ValueError, match="padding is 'keep'; expected 'zero' for mpnet"):
        ours.bert.padding = "keep"
    with pytest.raises(ValueError, match="pad_token_id is 0; expected 1, from which mpnet counts its positions"):
        BertConfig(model_type="mpnet", pad_token_id=0)
    with pytest.raises(ValueError, match="relative_attention_num_buckets is 40; expected 32"):
        BertConfig.from_dict({"model_type": "mpnet", "relative_attention_num_buckets": 40})


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_mpnet_tokens_are_hugging_faces(form: str, tmp_path: Path) -> None:
    _save("MPNet", tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if form == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink()
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ctxfast.BertTokenizer.from_pretrained(tmp_path)
    for text, pair in (("A\u00e9 ab  <mask> x?", None), ("b <s> c", "ab"), ("", None)):
        expected = theirs(text, pair) if pair else theirs(text)
        assert ours.encode(text, pair).ids == expected["input_ids"], text
    assert ours.encode("a", "b").tokens == ["<s>", "a", "</s>", "</s>", "b", "</s>"]


def test_refusals(tmp_path: Path) -> None:
    _save("DistilBert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for model_type in ("deberta-v2", "albert", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        sentence = rf"is '{model_type}'; expected one of bert, .* opens in ctxfast\.Embedder, .* ctxfast\.swap_in"
        with pytest.raises(ValueError, match=sentence):
            ctxfast.Bert.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BertConfig().to_dict()))
    theirs = tiny_model("DistilBert", "ForMaskedLM")
    theirs.save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "config.json").write_text(json.dumps(BertConfig().to_dict()))
    with pytest.raises(ValueError, match=r"with 'distilbert\.', .* model_type 'bert'; expected one of distilbert"):
        ctxfast.Bert.from_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="type_vocab_size is 2; expected 0: distilbert has no token types"):
        BertConfig(model_type="distilbert", type_vocab_size=2)
    with pytest.raises(ValueError, match="embedding_size is 8; expected hidden_size = 768 for model_type 'bert'"):
        BertConfig(embedding_size=8)
    distilbert = BertConfig(model_type="distilbert", hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight has no place in a distilbert model"):
        ctxfast.Bert(distilbert).save_pretrained(tmp_path / "pooled")

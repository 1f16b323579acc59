# SPDX-License-Identifier: Apache-2.0
"""``swap_in`` on sentence-transformers: the same embeddings from ``encode``."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import tiny_model

import ctxfast
from ctxfast.swap import transformers as swap_transformers

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = [
    "The bank of the river.",
    "A bank lends money to people who can show that they do not need it.",
    "Short.",
    "It rained all night, and in the morning the water stood a hand high in the lower streets of the town.",
    "",
    "café, naïve, 北京",
]


def _model(folder, pooling: str = "mean") -> sentence_transformers.SentenceTransformer:
    from sentence_transformers.sentence_transformer import modules as models

    transformer = models.Transformer(str(folder))
    size = transformer.get_embedding_dimension()
    parts = [transformer, models.Pooling(size, pooling), models.Normalize()]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


@pytest.fixture(scope="module")
def tiny_roberta(tmp_path_factory):
    """A folder with a RoBERTa, whose positions start behind the padding id, and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("roberta")
    words = sorted({word for text in TEXTS for word in text.lower().replace(".", " ").replace(",", " ").split()})
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>")
    special |= dict(pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=60)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    tiny_model("Roberta", vocab_size=len(vocabulary), max_position_embeddings=62).save_pretrained(folder)
    return folder


@pytest.fixture(params=["minilm", "roberta"])
def folder(request):
    return request.getfixturevalue("minilm_dir" if request.param == "minilm" else "tiny_roberta")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_same_embeddings(folder, pooling, monkeypatch) -> None:
    monkeypatch.setattr(swap_transformers, "_DENSE", 2.0)  # batches without padding, too
    model = _model(folder, pooling)
    expected = model.encode(TEXTS, batch_size=3)
    tokens = model.encode(TEXTS, output_value="token_embeddings", batch_size=3)
    report = ctxfast.swap_in(model, strict=True)
    assert len(report.swapped) == 1 and report.swapped[0][0].endswith("encoder")
    for batch_size in (1, 3, 8):
        found = model.encode(TEXTS, batch_size=batch_size)
        assert abs(found - expected).max() < 1e-5
    for one, other in zip(model.encode(TEXTS, output_value="token_embeddings", batch_size=3), tokens):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    ctxfast.restore(model)
    assert (model.encode(TEXTS, batch_size=3) == expected).all()


def test_a_text_keeps_its_bits_in_every_batch(minilm_dir, monkeypatch) -> None:
    monkeypatch.setattr(swap_transformers, "_DENSE", 2.0)
    model = _model(minilm_dir)
    ctxfast.swap_in(model)
    alone = [model.encode([text])[0] for text in TEXTS]
    together = model.encode(TEXTS + TEXTS[::-1], batch_size=12)
    for one, other in zip(alone + alone[::-1], together):
        assert (one == other).all()


def test_saved_and_loaded(minilm_dir, tmp_path) -> None:
    model = _model(minilm_dir)
    expected = model.encode(TEXTS[:2])
    ctxfast.swap_in(model)
    model.save(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(loaded.encode(TEXTS[:2]) - expected).max() < 1e-5


def test_fine_tuned_with_its_own_losses(tiny_roberta) -> None:
    """Ten steps of a similarity loss: the same losses as without."""
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    curves = []
    for is_swapped in (False, True):
        model = _model(tiny_roberta)
        if is_swapped:
            ctxfast.swap_in(model, impl=None)
        loss_of = CosineSimilarityLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        losses = []
        for step in range(10):
            pairs = [TEXTS[step % 3 : step % 3 + 2], TEXTS[1:3]]
            features = [{k: v for k, v in model.preprocess(texts).items()} for texts in pairs]
            loss = loss_of(features, torch.tensor([1.0, 0.0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-5)

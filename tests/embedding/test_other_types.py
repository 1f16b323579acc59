# SPDX-License-Identifier: Apache-2.0
"""``Embedder`` on model types that ``Bert`` does not compute: Transformers' model, its encoder swapped."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from support.hf_models import tiny_model

import ctxfast
from ctxfast.cli import main
from ctxfast.models.bert.config import MODEL_TYPES
from ctxfast.swap.transformers import PackedEncoder

transformers = pytest.importorskip("transformers", reason="needs Hugging Face's models")

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghijklmnopqrst", *(f"##{c}" for c in "abcdefghij")]
TEXTS = ["a bc d", "efg", "h i j k lm n", "abab cdcd", "q"]


def _folder(folder: Path, model: torch.nn.Module) -> Path:
    """A model with a word-piece tokenizer of its own."""
    model.save_pretrained(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        mask_token="<mask>", model_max_length=20, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _theirs(folder: Path, texts: list[str]) -> list[list[np.ndarray]]:
    """Layers of each text alone, by Transformers, (layers, tokens, dim) without the first and the last token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    found = []
    with torch.no_grad():
        for text in texts:
            result = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            layers = [*result.hidden_states[:-1], result.last_hidden_state]
            found.append([layer[0, 1:-1].numpy() for layer in layers])
    return found


def _modernbert() -> torch.nn.Module:
    config = transformers.ModernBertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2,
        global_attn_every_n_layers=2, local_attention=4, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ModernBertModel(config).eval()


def _t5() -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return transformers.T5Model(config).eval()


MODELS = {
    "splinter": lambda: tiny_model("Splinter"),
    "albert": lambda: tiny_model("Albert", embedding_size=8),
    "modernbert": _modernbert,
    "deberta-v2": lambda: tiny_model("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "t5": _t5,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:ctxfast.Embedder. this")
def test_vectors_are_transformers_own(kind, tmp_path) -> None:
    assert kind not in MODEL_TYPES, "Bert computes it: it needs no other way"
    folder = _folder(tmp_path / kind, MODELS[kind]())
    embedder, expected = ctxfast.Embedder(folder, device="cpu"), _theirs(folder, TEXTS)
    assert embedder.num_layers == 3 and embedder.dim == 16 and embedder.kind == "bert"
    for found, want in zip(embedder(TEXTS, level="token", layers="all"), expected):
        np.testing.assert_allclose(found, np.stack(want), atol=2e-5)
    top = embedder(TEXTS, level="token", layers="top")
    for found, want in zip(top, expected):
        np.testing.assert_allclose(found, want[-1], atol=2e-5)
    again = pickle.loads(pickle.dumps(embedder))
    assert np.array_equal(again(TEXTS, level="sentence"), embedder(TEXTS, level="sentence"))


def test_the_encoder_is_swapped_or_the_reason_is_told(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        swapped = ctxfast.Embedder(_folder(tmp_path / "a", MODELS["splinter"]()), device="cpu")
    assert any(isinstance(module, PackedEncoder) for module in swapped.encoder.model.model.modules())
    plain = _folder(tmp_path / "b", MODELS["deberta-v2"]())
    with pytest.warns(UserWarning, match="this deberta-v2 runs as in Transformers, not faster: .* relative positions"):
        ctxfast.Embedder(plain, device="cpu")
    with pytest.raises(ValueError, match="dtype is 'int8' for a deberta-v2; expected 'float32' or 'bfloat16'"):
        ctxfast.Embedder(plain, device="cpu", dtype="int8")
    narrow = ctxfast.Embedder(tmp_path / "a", device="cpu", dtype="int8")
    exact, rounded = swapped(TEXTS, level="sentence"), narrow(TEXTS, level="sentence")
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max() and narrow.encoder.dtype == "int8"


def test_long_texts_are_cut_refused_or_split(tmp_path) -> None:
    folder = _folder(tmp_path / "a", MODELS["splinter"]())
    embedder, long = ctxfast.Embedder(folder, device="cpu"), ["a b c d e f g h i j k l m n o p q r s t"]
    with pytest.raises(ValueError, match="has 22 tokens, special ones included; expected at most 20"):
        embedder(long, level="token")
    assert embedder(long, level="token", truncate=True)[0].shape == (18, 16)
    assert ctxfast.Embedder(folder, device="cpu", split=4)(long, level="token")[0].shape == (20, 16)


def test_the_command(tmp_path) -> None:
    folder = _folder(tmp_path / "a", MODELS["splinter"]())
    (tmp_path / "texts").write_text("\n".join(TEXTS) + "\n")
    out = tmp_path / "vectors.jsonl"
    argv = ["embed", str(tmp_path / "texts"), "-m", str(folder), "-o", str(out), "--level", "sentence", "--quiet"]
    assert main([*argv, "--device", "cpu"]) == 0
    assert len(out.read_text().splitlines()) == len(TEXTS)


def test_what_is_wrong(tmp_path, monkeypatch) -> None:
    folder = _folder(tmp_path / "a", MODELS["splinter"]())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))
    with pytest.raises(ValueError, match="has the model_type 'nobody-knows', which Transformers does not open"):
        ctxfast.Embedder(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="transformers is not installed; expected it for models of type splinter"):
        ctxfast.Embedder(folder, device="cpu")

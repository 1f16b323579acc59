# SPDX-License-Identifier: Apache-2.0
"""Files that hold one parameter twice, or say more of a model than is computed: followed as Hugging Face's library
does, or named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from oracles.hf_bert import hf_model, transformers
from safetensors.torch import save_file

import ctxfast
from ctxfast.models.bert.weights import load_checkpoint

IDS = torch.tensor([[3, 17, 5, 44, 9]])


def tensors_of(model: torch.nn.Module, without: str = "?") -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if without not in name}


def write(folder: Path, model: torch.nn.Module, tensors: dict[str, torch.Tensor], **changes) -> Path:
    model.config.save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path, kind: type = ctxfast.BertForMaskedLM) -> tuple[torch.nn.Module, str]:
    """The model, and everything that was said about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = kind.from_pretrained(folder)
    return model, " | ".join(str(each.message) for each in said)


_BIASES_DIFFER, _NOT_TIED = "decoder.bias and cls.predictions.bias differ", "differs from the word table"
_DECODERS = [  # tie_word_embeddings, the decoder's weight, its bias, what is said
    (True, "absent", "same", ""),
    (True, "absent", "other", _BIASES_DIFFER),
    (True, "absent", "alone", ""),
    (True, "same", "other", _BIASES_DIFFER),
    (True, "other", "absent", _NOT_TIED),
    (True, "other", "other", _BIASES_DIFFER),
    ("absent", "absent", "other", _BIASES_DIFFER),
    ("absent", "other", "same", _NOT_TIED),
    (False, "same", "same", ""),
    (False, "other", "other", _BIASES_DIFFER),
    (False, "other", "alone", ""),
]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
@pytest.mark.parametrize(("tie", "weight", "bias", "said"), _DECODERS)
def test_a_decoder_of_its_own(name: str, tie, weight: str, bias: str, said: str, tmp_path: Path) -> None:
    model = hf_model(name)
    head, prefix = ("lm_head.", "roberta.") if "Roberta" in name else ("cls.predictions.", "bert.")
    tensors = tensors_of(model, f"{head}decoder")
    tensors[f"{head}bias"] = torch.linspace(-1, 1, 50)
    if weight != "absent":
        words = tensors[f"{prefix}embeddings.word_embeddings.weight"]
        tensors[f"{head}decoder.weight"] = words.clone() if weight == "same" else words.flip(0)
    if bias != "absent":
        tensors[f"{head}decoder.bias"] = (
            torch.linspace(-2, 2, 50) if bias == "other" else tensors[f"{head}bias"].clone()
        )
    if bias == "alone":
        del tensors[f"{head}bias"]
    write(tmp_path, model, tensors, tie_word_embeddings=tie)
    own, heard = read(tmp_path)
    assert said in heard and bool(said) == bool(heard)
    theirs = getattr(transformers, name).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own(IDS).logits, theirs(IDS).logits, atol=2e-5, rtol=1e-5)
    # What is written again is that model, here and there.
    own.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again")[1] == ""
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(own(IDS).logits, theirs(IDS).logits, atol=2e-5, rtol=1e-5)


def test_an_untied_decoder_without_a_bias_of_its_own_takes_the_one_there_is(tmp_path: Path) -> None:
    """Before version 5 Hugging Face's library wrote such files and read them so; since, it starts from zeros."""
    model = hf_model("BertForMaskedLM")
    tensors = tensors_of(model, "decoder.bias")
    tensors["cls.predictions.bias"] = torch.linspace(-1, 1, 50)
    own, heard = read(write(tmp_path, model, tensors, tie_word_embeddings=False))
    assert "has no cls.predictions.decoder.bias, and the config ties nothing" in heard
    assert torch.equal(own.cls.predictions.decoder.bias, tensors["cls.predictions.bias"])


def test_a_weight_without_its_bias_is_kept(tmp_path: Path) -> None:
    model = hf_model("BertForTokenClassification", num_labels=3)
    own, heard = read(write(tmp_path, model, tensors_of(model, "classifier.bias")), ctxfast.BertForTokenClassification)
    assert "has no classifier.bias" in heard
    assert torch.equal(own.classifier.weight, model.classifier.weight) and not own.classifier.bias.any()


_NAME = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("is_equal", [True, False])
@pytest.mark.parametrize("kind", ["prefix", "gamma", "module", "shards", "bins"])
def test_one_tensor_under_two_names_or_in_two_files(kind: str, is_equal: bool, tmp_path: Path) -> None:
    model = hf_model("BertForMaskedLM")
    tensors = tensors_of(model, "decoder")
    own = "bert.embeddings.LayerNorm.weight" if kind == "gamma" else f"bert.{_NAME}"
    copy = tensors[own].clone()
    copy.flatten()[3] = float("nan") if is_equal else 7.0
    tensors[own] = copy.clone() if is_equal else tensors[own]  # a copy that holds NaN is a copy, too
    other = {"prefix": _NAME, "gamma": own.replace("weight", "gamma"), "module": f"module.{own}"}.get(kind, own)
    model.config.save_pretrained(tmp_path)
    if kind in ("shards", "bins"):
        end, index = ("safetensors", "model.safetensors") if kind == "shards" else ("bin", "pytorch_model.bin")
        for name, part in (("a", tensors), ("b", {other: copy})):
            store = save_file if kind == "shards" else torch.save
            store(part, tmp_path / f"{name}.{end}")
        weight_map = {**dict.fromkeys(tensors, f"a.{end}"), own: f"b.{end}"}
        (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file({**tensors, other: copy}, tmp_path / "model.safetensors")
    if is_equal:
        with pytest.warns(UserWarning, match="NaN"):
            assert load_checkpoint(tmp_path).unexpected == ()
        return
    with pytest.raises(ValueError, match=r"with different values; expected one of them") as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and own in str(caught.value)


@pytest.mark.parametrize(
    ("buffer", "said"),
    [
        (torch.arange(20)[None], ""),
        (torch.arange(512)[None], ""),
        (torch.arange(20), ""),
        (torch.arange(20).flip(0)[None], "holds unusual values"),
        (torch.arange(2, 22)[None], "holds unusual values"),
        (torch.tensor(3), "holds unusual values"),
    ],
)
def test_position_buffers(buffer: torch.Tensor, said: str, tmp_path: Path) -> None:
    model = hf_model("BertModel")
    write(tmp_path, model, {**tensors_of(model), "embeddings.position_ids": buffer})
    own, heard = read(tmp_path, ctxfast.Bert)
    assert said in heard and bool(said) == bool(heard)
    torch.testing.assert_close(own(IDS).last_hidden_state, model(IDS).last_hidden_state, atol=2e-5, rtol=1e-5)


_REFUSED = [
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config is .*quantised"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ({"is_decoder": True}, "is_decoder is True"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'; expected one of gelu"),
    ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
    ({"model_type": "deberta-v2"}, "model_type is 'deberta-v2'"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf"),
    ({"num_labels": 10**9}, "num_labels is 1000000000; expected at most 65536 labels without names"),
]


@pytest.mark.parametrize(("changes", "said"), _REFUSED)
def test_what_a_config_asks_for_and_nothing_here_does(changes: dict, said: str, tmp_path: Path) -> None:
    model = hf_model("BertModel")
    write(tmp_path, model, tensors_of(model), **changes)
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_code_adapters_and_another_familys_weights_are_named(tmp_path: Path) -> None:
    model = hf_model("BertModel")
    write(tmp_path / "a", model, tensors_of(model), auto_map={"AutoModel": "modeling.Own"})
    with pytest.warns(UserWarning, match=r"names code of its own \(auto_map\), which is not run"):
        load_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has adapter_config.json.*merge_and_unload"):
        load_checkpoint(tmp_path / "a")
    roberta = hf_model("RobertaForMaskedLM")
    write(tmp_path / "b", roberta, tensors_of(roberta, "decoder"), model_type="bert", pad_token_id=0)
    with pytest.raises(ValueError, match=r"holds weights whose names begin with 'roberta\.', but .* model_type 'bert'"):
        load_checkpoint(tmp_path / "b")


def test_values_in_a_bin_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    model = hf_model("BertModel")
    model.config.save_pretrained(tmp_path)
    torch.save({**tensors_of(model), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="not used: epoch"):
        assert load_checkpoint(tmp_path).unexpected == ("epoch",)

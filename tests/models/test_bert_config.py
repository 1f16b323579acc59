# SPDX-License-Identifier: Apache-2.0
"""BertConfig: released sizes, files, labels, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctxfast.models.bert.config import BertConfig


def test_config_released_sizes() -> None:
    base, large = BertConfig.base(), BertConfig.large(hidden_act="gelu_new")
    assert (base.num_hidden_layers, base.hidden_size, base.head_dim) == (12, 768, 64)
    assert (large.num_hidden_layers, large.hidden_size, large.intermediate_size) == (24, 1024, 4096)
    assert (base.activation, large.activation) == ("gelu", "gelu_tanh")
    assert (base.position_offset, base.max_length, base.pad_token_id) == (0, 512, 0)
    roberta = BertConfig(model_type="roberta", max_position_embeddings=514)
    assert (roberta.pad_token_id, roberta.position_offset, roberta.max_length) == (1, 2, 512)
    assert base.head_dropout == 0.1
    assert BertConfig(classifier_dropout=0.0).head_dropout == 0.0


def test_config_round_trip(tmp_path: Path) -> None:
    values = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "model_type": "ernie",
        "use_task_id": True,
        "summary": {"a": [1]},
    }
    values |= {"id2label": {"0": "x", "1": "y", "2": "z"}}
    config = BertConfig.from_dict(values)
    assert config.extra == {"summary": {"a": [1]}}
    assert (config.num_labels, config.label2id) == (3, {"x": 0, "y": 1, "z": 2})
    assert BertConfig.from_json_file(config.save(tmp_path / "new")) == config
    assert BertConfig.from_dict(config.with_labels(7).to_dict()).num_labels == 7
    assert config.with_labels(2).id2label is None
    assert config.with_labels(["a"]).id2label == {0: "a"}
    assert BertConfig.from_dict({"label2id": {"n": 1, "m": 0}}).id2label == {0: "m", 1: "n"}
    old = BertConfig.from_dict({"architectures": ["XLMRobertaForMaskedLM"]})
    assert (old.model_type, old.pad_token_id) == ("xlm-roberta", 1)


BAD_CONFIGS = [
    ({"hidden_size": 100}, ValueError, "hidden_size is 100; expected a multiple of num_attention"),
    ({"hidden_act": "swish"}, ValueError, "hidden_act is 'swish'; expected one of gelu, "),
    ({"model_type": "gpt2"}, ValueError, "model_type is 'gpt2'; expected one of bert, roberta"),
    ({"position_embedding_type": "relative_key"}, ValueError, "expected 'absolute'"),
    ({"is_decoder": True}, ValueError, "is_decoder is True; expected False"),
    ({"add_cross_attention": True}, ValueError, "only bidirectional encoders"),
    ({"pruned_heads": {"0": [1]}}, ValueError, "pruned_heads"),
    ({"vocab_size": 0}, ValueError, "vocab_size is 0; expected a positive integer"),
    ({"vocab_size": "30522"}, TypeError, "vocab_size is '30522'; expected an integer"),
    ({"num_hidden_layers": 2.0}, TypeError, "num_hidden_layers is 2.0; expected an integer"),
    ({"hidden_dropout_prob": 1.0}, ValueError, r"expected a probability in \[0, 1\)"),
    ({"layer_norm_eps": 0}, ValueError, "layer_norm_eps is 0; expected a number above 0"),
    ({"pad_token_id": 30522}, ValueError, "pad_token_id is 30522; expected an id below 30522"),
    ({"use_task_id": True}, ValueError, "expected False for model_type 'bert'"),
    ({"id2label": {"0": "a", "2": "b"}}, ValueError, "without gaps"),
    ({"id2label": {"0": "a"}, "num_labels": 2}, ValueError, "num_labels is 2; expected 1"),
    ({"architectures": ["GPT2Model"]}, ValueError, "architectures is"),
    (
        {"model_type": "roberta", "max_position_embeddings": 2},
        ValueError,
        r"max_position_embeddings is 2; expected more than pad_token_id \+ 1 = 2",
    ),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_CONFIGS)
def test_config_errors(values: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        BertConfig.from_dict(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(error, match=r"config\.json\)$"):
        BertConfig.from_json_file(path)


def test_config_gelu() -> None:
    assert BertConfig().with_gelu("tanh").hidden_act == "gelu_new"
    assert BertConfig(hidden_act="gelu_fast").with_gelu("erf").activation == "gelu"
    with pytest.raises(ValueError, match="hidden_act is 'relu'; expected a GELU"):
        BertConfig(hidden_act="relu").with_gelu("erf")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        BertConfig.from_json_file("nowhere.json")

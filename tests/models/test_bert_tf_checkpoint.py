# SPDX-License-Identifier: Apache-2.0
"""Google's TensorFlow checkpoints: the bundle format, names, layouts, and damaged files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import tf_bundle_writer as writer
from oracles.hf_bert import TINY, assert_same, expected_tensors, hf_model

from ctxfast.models.bert.tf_checkpoint import TensorBundle, crc32c, mask_crc, snappy_decompress
from ctxfast.models.bert.weights import load_checkpoint


def google_variables(model) -> dict[str, np.ndarray]:
    """Variables as Google's code names and lays them out, from a BertForPreTraining."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    variables: dict[str, np.ndarray] = {}

    def dense(theirs: str, ours: str) -> None:
        variables[f"{ours}/kernel"] = np.ascontiguousarray(state[f"{theirs}.weight"].T)
        variables[f"{ours}/bias"] = state[f"{theirs}.bias"]

    def norm(theirs: str, ours: str) -> None:
        variables[f"{ours}/gamma"] = state[f"{theirs}.weight"]
        variables[f"{ours}/beta"] = state[f"{theirs}.bias"]

    for table in ("word", "position", "token_type"):
        key = f"bert.embeddings.{table}_embeddings.weight"
        variables[f"bert/embeddings/{table}_embeddings"] = state[key]
    norm("bert.embeddings.LayerNorm", "bert/embeddings/LayerNorm")
    for i in range(model.config.num_hidden_layers):
        theirs, ours = f"bert.encoder.layer.{i}", f"bert/encoder/layer_{i}"
        for part in ("query", "key", "value"):
            dense(f"{theirs}.attention.self.{part}", f"{ours}/attention/self/{part}")
        dense(f"{theirs}.attention.output.dense", f"{ours}/attention/output/dense")
        norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention/output/LayerNorm")
        dense(f"{theirs}.intermediate.dense", f"{ours}/intermediate/dense")
        dense(f"{theirs}.output.dense", f"{ours}/output/dense")
        norm(f"{theirs}.output.LayerNorm", f"{ours}/output/LayerNorm")
    dense("bert.pooler.dense", "bert/pooler/dense")
    dense("cls.predictions.transform.dense", "cls/predictions/transform/dense")
    norm("cls.predictions.transform.LayerNorm", "cls/predictions/transform/LayerNorm")
    variables["cls/predictions/output_bias"] = state["cls.predictions.bias"]
    variables["cls/seq_relationship/output_weights"] = state["cls.seq_relationship.weight"]
    variables["cls/seq_relationship/output_bias"] = state["cls.seq_relationship.bias"]
    return variables


def write_google_folder(folder: Path, model, extra: dict[str, np.ndarray] | None = None, **layout):
    folder.mkdir(exist_ok=True)
    variables = {**google_variables(model), **(extra or {})}
    writer.write_bundle(folder / "bert_model.ckpt", variables, **layout)
    config = {**TINY, "hidden_act": "gelu", "type_vocab_size": 2, "initializer_range": 0.02}
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "bert_config.json").write_text(json.dumps(config))
    return variables


LAYOUTS = {
    "plain": {},
    "many blocks": {"block_entries": 3, "restart_interval": 2},
    "snappy": {"block_entries": 20, "restart_interval": 5, "compress": True},
    "three shards": {"shards": 3, "restart_interval": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_google_checkpoint(layout: dict, tmp_path: Path) -> None:
    model = hf_model("BertForPreTraining")
    slots = {}
    for name, value in google_variables(model).items():
        slots[f"{name}/adam_m"] = slots[f"{name}/adam_v"] = value * 2
    slots["global_step"] = np.array(7, np.int64)
    write_google_folder(tmp_path, model, slots, **layout)
    for place in (tmp_path, tmp_path / "bert_model.ckpt", tmp_path / "bert_model.ckpt.index"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint = load_checkpoint(place)
        assert checkpoint.kind == "tensorflow"
        assert_same(checkpoint.state_dict, expected_tensors(model))
        assert checkpoint.config.activation == "gelu_tanh"
    assert load_checkpoint(tmp_path, gelu="erf").config.activation == "gelu"
    with pytest.raises(ValueError, match="gelu is 'exact'; expected 'erf' or 'tanh'"):
        load_checkpoint(tmp_path, gelu="exact")


def test_google_fine_tuned_heads_and_hugging_face_config(tmp_path: Path) -> None:
    model = hf_model("BertForPreTraining")
    heads = {
        "output_weights": np.ones((3, 16), np.float32),
        "output_bias": np.zeros(3, np.float32),
        "cls/squad/output_weights": np.full((2, 16), 2, np.float32),
        "cls/squad/output_bias": np.zeros(2, np.float32),
    }
    write_google_folder(tmp_path, model, heads)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.num_labels == 3
    assert torch.equal(checkpoint.state_dict["classifier.weight"], torch.ones(3, 16))
    assert torch.equal(checkpoint.state_dict["qa_outputs.weight"], torch.full((2, 16), 2.0))
    model.config.save_pretrained(tmp_path)  # now there is a config.json that means erf by "gelu"
    assert load_checkpoint(tmp_path).config.activation == "gelu"


def test_google_folder_with_two_checkpoints(tmp_path: Path) -> None:
    model = hf_model("BertForPreTraining")
    variables = write_google_folder(tmp_path, model)
    writer.write_bundle(tmp_path / "model.ckpt-10", variables)
    load_checkpoint(tmp_path)
    (tmp_path / "bert_model.ckpt.index").rename(tmp_path / "model.ckpt-9.index")
    with pytest.raises(ValueError, match=r"2 TensorFlow checkpoints .* pass the prefix of one"):
        load_checkpoint(tmp_path)
    load_checkpoint(tmp_path / "model.ckpt-10")


def test_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(b"\0" * 32) == 0x8A9136AA  # RFC 3720, B.4
    rng = np.random.default_rng(0)
    for size in (0, 1, 3, 4, 5, 63, 64, 4096, 65535, 65540, 131_075):
        data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        assert crc32c(data) == writer.crc32c(data), size
        assert mask_crc(crc32c(data)) == writer.masked(data)


def test_snappy() -> None:
    # Literal "ab", then a copy of 9 bytes from 2 back, which overlaps what it writes.
    assert snappy_decompress(b"\x0b\x04ab\x15\x02") == b"abababababa"
    rng = np.random.default_rng(0)
    for alphabet, size in ((2, 5000), (256, 70_000), (256, 300), (4, 1)):
        data = rng.integers(0, alphabet, size, dtype=np.uint8).tobytes()
        assert snappy_decompress(writer.snappy_compress(data)) == data


def test_bundle_dtypes_and_names(tmp_path: Path) -> None:
    values = {
        "a/half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a/half_more": np.zeros((0, 4), np.float32),
        "b": np.array(3.5),
        "bf": np.array([1.0, -2.5, 3.140625], np.float32),
        "flag": np.array([True, False]),
        "n": np.array([[1, -2]], np.int32),
        "text": np.array([b"x"]),
        "part": np.zeros(2, np.float32),
    }
    writer.write_bundle(tmp_path / "m", values, bfloat16=("bf",), sliced=("part",), shards=2)
    bundle = TensorBundle(tmp_path / "m")
    assert bundle.names() == sorted(values)
    for name in ("a/half", "a/half_more", "b", "bf", "flag", "n"):
        got = bundle.read(name)
        assert got.dtype == values[name].dtype
        np.testing.assert_array_equal(got, values[name])
    assert {v.name: v.dtype for v in bundle.variables()}["bf"] == "bfloat16"
    with pytest.raises(TypeError, match=r"text in .* has dtype string"):
        bundle.read("text")
    with pytest.raises(ValueError, match=r"part in .* is stored in slices"):
        bundle.read("part")
    with pytest.raises(KeyError, match="no variable 'nothing'"):
        bundle.read("nothing")


def test_damaged_bundles(tmp_path: Path) -> None:
    prefix = tmp_path / "m.ckpt"
    index, data = tmp_path / "m.ckpt.index", tmp_path / "m.ckpt.data-00000-of-00001"
    value = np.arange(1000, dtype=np.float32)
    writer.write_bundle(prefix, {"x": value, "y": value})
    good_index, good_data = index.read_bytes(), data.read_bytes()

    data.write_bytes(good_data[:5000] + b"\xff" + good_data[5001:])
    np.testing.assert_array_equal(TensorBundle(prefix).read("x"), value)
    with pytest.raises(ValueError, match=r"checksum of y in .*m\.ckpt\.data-00000.* is wrong"):
        TensorBundle(prefix).read("y")
    assert TensorBundle(prefix, verify=False).read("y").shape == (1000,)
    data.write_bytes(good_data[:-1])
    with pytest.raises(ValueError, match=r"has 7999 bytes, but y ends at byte 8000.*cut short"):
        TensorBundle(prefix).read("y")
    data.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        TensorBundle(prefix).read("x")
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00000-of-00001 does not exist"):
        TensorBundle(prefix)

    data.write_bytes(good_data)
    for size in (0, 20, 47, len(good_index) - 1):
        index.write_bytes(good_index[:size])
        with pytest.raises(ValueError, match="cut short"):
            TensorBundle(prefix)
    for at in range(len(good_index)):
        index.write_bytes(good_index[:at] + bytes([good_index[at] ^ 0x41]) + good_index[at + 1 :])
        # A changed byte is found, or it stands in padding and changes nothing.
        for verify in (True, False):
            try:
                bundle = TensorBundle(prefix, verify=verify)
            except (ValueError, FileNotFoundError):
                continue
            if verify:
                assert bundle.names() == ["x", "y"], at
                np.testing.assert_array_equal(bundle.read("x"), value)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.ckpt\.index does not exist"):
        TensorBundle(prefix)
    prefix.write_bytes(b"V1 checkpoints are one file")
    with pytest.raises(ValueError, match="single-file checkpoint"):
        TensorBundle(prefix)
    writer.write_bundle(prefix, {"x": value}, big_endian=True)
    with pytest.raises(ValueError, match="big-endian"):
        TensorBundle(prefix)
    writer.write_table(index, [(b"k", b"")])
    with pytest.raises(ValueError, match="no bundle header"):
        TensorBundle(prefix)

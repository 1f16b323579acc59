# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged BERT files: a sentence that names the file, in no time and no memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import tf_bundle_writer as bundle
from oracles.hf_bert import hf_model
from safetensors.torch import load_file, save_file

from ctxfast.models.bert.tf_checkpoint import TensorBundle, snappy_decompress
from ctxfast.models.bert.weights import load_checkpoint

WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """One small model as safetensors, as a bin of either format, and in two shards."""
    root = tmp_path_factory.mktemp("models")
    model = hf_model("BertModel")
    for name in ("safetensors", "bin", "old", "shards"):
        model.config.save_pretrained(root / name)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, root / "safetensors" / "model.safetensors")
    torch.save(tensors, root / "bin" / "pytorch_model.bin")
    torch.save(tensors, root / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = sorted(tensors)
    shard_of = {name: f"{'ab'[k % 2]}.safetensors" for k, name in enumerate(names)}
    for shard in "ab":
        part = {name: tensors[name] for name in names if shard_of[name][0] == shard}
        save_file(part, root / "shards" / f"{shard}.safetensors")
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return root


def refuse(folder: Path, said: str, named: str, error: type[Exception] = ValueError) -> None:
    """Loading fails with one sentence, and without having taken memory for what the file claims."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=said) as caught:
            load_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith("ctxfast.") and named in text and "\n" not in text and len(text) < 1500


_HUGE = [
    ("num_hidden_layers", 10**9, "layer.2.attention.self.query.weight is missing; expected num_hidden_layers = 10000"),
    ("num_hidden_layers", 10**30, "is missing; expected num_hidden_layers = 10000"),
    ("hidden_size", 16 * 10**8, "hidden_size"),
    ("vocab_size", 10**12, "vocab_size"),
    ("intermediate_size", 10**12, "intermediate_size"),
    ("max_position_embeddings", 10**12, "max_position_embeddings"),
    ("type_vocab_size", 10**12, "type_vocab_size"),
    ("num_attention_heads", 10**12, "hidden_size is 16; expected a multiple"),
]


@pytest.mark.parametrize(("field", "value", "said"), _HUGE)
def test_sizes_that_the_tensors_do_not_have(models: Path, field: str, value: int, said: str, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "safetensors", tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refuse(folder, said, str(path))


_CONFIGS = [
    (b"", "JSONDecodeError"),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError"),
    (b'{"a":' + b"9" * 5000 + b"}", "digits"),
    (b"\xff\xfe{\0}\0", "UnicodeDecodeError"),
    (b"[]", "holds a JSON list"),
    (b'{"id2label": []}', "AttributeError"),
    (b'{"id2label": {"a": "b"}}', "ValueError"),
    (b'{"label2id": {"a": [1]}}', "TypeError"),
    (b'{"hidden_act": {}}', "TypeError"),
    (b'{"extra": 3}', "TypeError"),
    (b'{"vocab_size": 7.0}', "vocab_size is 7.0; expected an integer"),
    (b'{"model_type": "' + b"x" * 9000 + b'"}', "model_type is 'xxx"),
    (b'{"num_hidden_layers": "7"}', "num_hidden_layers is '7'; expected an integer"),
]


@pytest.mark.parametrize(("data", "said"), _CONFIGS)
def test_configs(models: Path, data: bytes, said: str, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "safetensors", tmp_path / "m")
    (folder / "config.json").write_bytes(data)
    refuse(folder, said, str(folder / "config.json"), TypeError if "expected an integer" in said else ValueError)


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def part(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


_SAFETENSORS = [
    (b"", "damaged, cut short or no safetensors file, of 0 bytes"),
    (struct.pack("<Q", 2**62) + b"{}", "header too large"),
    (with_header({WORDS: part([2], 8), "b": part([2], 12, start=4)}, bytes(12)), "invalid offset"),
    (with_header({WORDS: part([2**62, 4], 0)}), "overflow"),
    (with_header({WORDS: part([2**40], 8)}, bytes(8)), "damaged"),
    (with_header({"x" * 100: part([1], 4)}, bytes(4)), "holds no BERT weights"),
    (with_header(b"{" * 1000), "damaged"),
]


@pytest.mark.parametrize(("data", "said"), _SAFETENSORS)
def test_safetensors(models: Path, data: bytes, said: str, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "safetensors", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(data)
    refuse(folder, said, str(folder / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_are_no_floating_point_numbers(
    models: Path, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = shutil.copytree(models / kind, tmp_path / "m")
    tensors = load_file(models / "safetensors" / "model.safetensors")
    tensors[WORDS] = tensors[WORDS].to(dtype)
    file = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    (save_file if kind == "safetensors" else torch.save)(tensors, file)
    refuse(folder, "has dtype .*; expected floating point.*dequantised", str(file), TypeError)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("code-in-a-checkpoint-ran",))


def packed(source: Path, target: Path, change: Callable[[zipfile.ZipInfo, bytes], bytes], kind: int) -> None:
    """A file of torch.save written again with its records changed or packed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record, old.read(record)))


def test_pickles(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = models / "bin" / "pytorch_model.bin"
    tensors = torch.load(whole, weights_only=True)
    folder = shutil.copytree(models / "bin", tmp_path / "m")
    file = folder / "pytorch_model.bin"

    def check(said: str) -> None:
        refuse(folder, said, str(file))

    for protocol in (2, 4):
        file.write_bytes(pickle.dumps({"x": Harmful()}, protocol))
        check("pytorch_model.bin")
    torch.save({**tensors, "x": Harmful()}, file)
    check("holds Python objects beside tensors")
    assert not (tmp_path / "code-in-a-checkpoint-ran").exists()
    torch.save([1], file)
    check("holds a list; expected a dict of tensors")
    torch.save({3: torch.zeros(1)}, file)
    check("has the key '3'; expected names")
    torch.save({**tensors, WORDS: tensors[WORDS].to_sparse()}, file)
    check("is torch.sparse_coo on cpu; expected a plain tensor")
    torch.save({**tensors, WORDS: torch.quantize_per_tensor(tensors[WORDS], 0.1, 0, torch.qint8)}, file)
    check("is quantised; expected a plain tensor")
    torch.save({**tensors, "cls.predictions.decoder.weight": torch.zeros(1).expand(10**5, 10**5)}, file)
    check("would become 40,000")
    packed(whole, file, lambda record, data: data, zipfile.ZIP_DEFLATED)
    check("is compressed inside or damaged")
    # A storage of fewer numbers than its tensor has: torch would fill up with whatever lies in memory.
    packed(whole, file, lambda record, data: data[:64] if "/data/0" in record.filename else data, zipfile.ZIP_STORED)
    check("damaged")


def test_a_tensor_larger_than_its_storage(models: Path, tmp_path: Path) -> None:
    """Some versions of torch grow the storage in silence; the numbers would be whatever lies in memory."""
    folder = shutil.copytree(models / "bin", tmp_path / "m")
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    short = {**tensors, WORDS: torch.as_strided(torch.ones(7), (7,), (1,))}
    torch.save(short, tmp_path / "short.bin")
    size = b"K\x07\x85"  # the pickled shape (7,)

    def grow(record: zipfile.ZipInfo, data: bytes) -> bytes:
        if not record.filename.endswith("data.pkl"):
            return data
        at = data.index(size, data.index(WORDS.encode()))
        return data[:at] + b"M\xff\x7f\x85" + data[at + len(size) :]

    packed(tmp_path / "short.bin", file, grow, zipfile.ZIP_STORED)
    refuse(folder, "damaged", str(file))


def test_an_old_bin_that_claims_a_storage_of_a_terabyte(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "old", tmp_path / "m")
    file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    at = data.index(b"M" + struct.pack("<H", 50 * 16))  # the number of elements of the word table's storage
    file.write_bytes(data[:at] + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + data[at + 3 :])
    refuse(folder, "pytorch_model.bin is damaged", str(file))


_PLACES = ["../safetensors/model.safetensors", "/etc/passwd", "..", ".", "", "a/../a.safetensors", "a.safetensors\0x"]


@pytest.mark.parametrize("name", [*_PLACES, "..\\a.safetensors", "x" * 5000, 3, [], None, {"a": 1}, True])
def test_places_of_shards(models: Path, name: object, tmp_path: Path) -> None:
    shutil.copytree(models / "safetensors", tmp_path / "safetensors")
    folder = shutil.copytree(models / "shards", tmp_path / "m")
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"][WORDS] = name
    path.write_text(json.dumps(values))
    refuse(folder, "expected a file beside it", str(path))


def test_indexes_of_shards(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "shards", tmp_path / "m")
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**values["weight_map"], "cls.predictions.bias": "a.safetensors"}}))
    refuse(folder, "a.safetensors holds cls.predictions.bias, which it does not", str(path))
    for data, said in (
        (b"[]", "holds a JSON list"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": 3}', "no weight_map"),
    ):
        path.write_bytes(data)
        refuse(folder, said, str(path))


# TensorFlow's index


def table(path: Path, entries: list[tuple[bytes, bytes]], blocks: int = 1, raw: bytes | None = None) -> None:
    """An index of one block (or its bytes ``raw``, packed by Snappy), which the table names ``blocks`` times."""
    out = bytearray()

    def put(block: bytes, kind: int = 0) -> bytes:
        at = len(out)
        out.extend(block + bytes([kind]) + struct.pack("<I", bundle.masked(block + bytes([kind]))))
        return bundle.varint(at) + bundle.varint(len(block))

    handle = put(bundle._block(entries, 16) if raw is None else raw, raw is not None)
    index = [(f"z{k:09d}".encode(), handle) for k in range(blocks)]
    foot = put(bundle._block([], 16)) + put(bundle._block(index, 16))
    path.write_bytes(bytes(out) + foot + bytes(40 - len(foot)) + struct.pack("<Q", 0xDB4775248B80FB57))


def number(field: int, value: int) -> bytes:
    return bundle._number(field, value)


def message(field: int, value: bytes) -> bytes:
    return bundle._message(field, value)


_FLOAT, _SHARDS = number(1, 1), (b"", number(1, 1))
_ENTRIES = [
    ([_SHARDS, (b"x", message(1, b"abc"))], "a number is stored as text"),
    ([_SHARDS, (b"x", _FLOAT + message(2, message(2, message(1, b"abc"))))], "a number is stored as text"),
    ([_SHARDS, (b"x", _FLOAT + message(4, b"zz"))], "a number is stored as text"),
    ([_SHARDS, (b"x", _FLOAT + message(6, b"zz"))], "a number is stored as text"),
    ([(b"", message(1, b"zz"))], "a number is stored as text"),
    ([_SHARDS, (b"x", _FLOAT + message(2, message(2, number(1, 1)) * 9000))], "more than 64 dimensions"),
    ([_SHARDS, (b"x" * 5000, _FLOAT)], "a name of 5,000 bytes"),
    ([_SHARDS, (b"x\xff", _FLOAT)], "UnicodeDecodeError"),
    ([_SHARDS, (b"y", _FLOAT), (b"x", _FLOAT)], "not in order"),
    ([_SHARDS, (b"x", _FLOAT), (b"x", _FLOAT)], "not in order"),
    ([_SHARDS, (b"x", _FLOAT + number(3, 2**63))], "data-9223372036854775808-of-00001 does not exist"),
    ([_SHARDS, (b"x", b"\x07")], "wire type 7"),
    ([_SHARDS, *((b"%06d" % k, b"") for k in range(100_001))], "more than 100,000 variables"),
]


@pytest.mark.parametrize(("entries", "said"), _ENTRIES, ids=range(len(_ENTRIES)))
def test_entries_of_a_tensorflow_index(entries, said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt.index"
    table(path, entries)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        TensorBundle(path)
    assert str(caught.value).startswith("ctxfast.TensorBundle: ") and "m.ckpt" in str(caught.value)


def test_blocks_of_a_tensorflow_index(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt.index"

    def check(said: str) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            TensorBundle(path)
        assert str(path) in str(caught.value)

    table(path, [(b"v%06d" % k, _FLOAT) for k in range(300)], blocks=2000)
    check("begins before the end of the one before it")
    literal = bundle.varint(10) + b"\0a"
    table(path, [], raw=literal + b"\xfe\x01\0" * 100_000)  # copies of 64 bytes: 6 MB from 300 KB
    check("gives .* bytes or more instead of 10")
    table(path, [], raw=bundle.varint(1 << 40) + b"\0a")
    check("a compressed block of 1,099,511,627,776 bytes")
    path.write_bytes(bytes(5 << 20))
    check("has 5,242,880 bytes; expected an index, of at most")


def test_a_copy_costs_what_it_copies() -> None:
    """A distance of a megabyte does not make each of many one-byte copies one of a megabyte."""
    text = bytes(range(256)) * 4096
    body = bytes([62 << 2]) + (len(text) - 1).to_bytes(3, "little") + text
    body += (bytes([3]) + struct.pack("<I", len(text))) * 20_000
    assert snappy_decompress(bundle.varint(len(text) + 20_000) + body) == text + text[:20_000]

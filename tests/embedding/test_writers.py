# SPDX-License-Identifier: Apache-2.0
"""Every output format, read back by its own library, against vectors known exactly."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors import safe_open
from support.fake_encoder import DIM, LAYERS, FakeEncoder, vectors

from ctxfast.embedding import writers
from ctxfast.embedding.embedder import Embedder

LINES = ["the cat sat", "", 'a "b" \\ c', "the cat sat", "é 中文", "last one"] * 3
SUFFIXES = ("hdf5", "safetensors", "npz", "jsonl", "parquet")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(LINES))
    return path


def embed(source: Path, name: str, vector_dtype: str = "float32", **options) -> Path:
    target = source.parent / name
    Embedder(FakeEncoder(), batch_tokens=8, vector_dtype=vector_dtype).embed_file(
        source, target, **{"window": 4, **options}
    )
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.txt", name]
    return target


def expected(line: str, layers: str) -> np.ndarray:
    values = vectors(line.split())
    return {"all": values, "top": values[-1], "average": values.mean(0)}[layers]


def expected_sentence(line: str, layers: str) -> np.ndarray:
    values = vectors(line.split()).sum(1) / max(len(line.split()), 1)
    return {"all": values, "top": values[-1], "average": values.mean(0)}[layers]


# Token level


@pytest.mark.parametrize("layers", ["all", "top", "average"])
@pytest.mark.parametrize("suffix", ["hdf5", "h5"])
def test_hdf5(source, layers, suffix):
    target = embed(source, f"out.{suffix}", layers=layers)
    with h5py.File(target) as file:
        assert set(file) == {*map(str, range(len(LINES))), "sentence_to_index"}
        for number, line in enumerate(LINES):
            wanted = expected(line, layers)
            assert file[str(number)].shape == wanted.shape and file[str(number)].dtype == np.float32
            np.testing.assert_allclose(file[str(number)][...], wanted, rtol=1e-6)
        table = file["sentence_to_index"]
        assert table.shape == (1,) and h5py.check_string_dtype(table.dtype).length is None
        # As AllenNLP's dictionary: a sentence that comes again has its last line.
        assert json.loads(table[0]) == {line: str(number) for number, line in enumerate(LINES)}


def test_hdf5_as_allennlp_users_read_it(source):
    """The tutorial's way: number of a sentence by its text, then all its layers."""
    with h5py.File(embed(source, "out.hdf5", layers="all")) as file:
        number = json.loads(file.get("sentence_to_index")[0])["é 中文"]
        np.testing.assert_array_equal(file.get(number)[...], vectors(["é", "中文"]))


def test_hdf5_without_sentences_and_by_sentences(source):
    with h5py.File(embed(source, "out.hdf5", forget_sentences=True)) as file:
        assert set(file) == set(map(str, range(len(LINES))))
    (source.parent / "out.hdf5").unlink()
    lines = ["  the cat sat ", "a . b", "..", "é"]
    source.write_text("\n".join(lines))
    with h5py.File(embed(source, "out.hdf5", use_sentence_keys=True)) as file:
        assert set(file) == {"the cat sat", "a . b", "..", "é"}
        np.testing.assert_array_equal(file["é"][...], vectors(["é"])[-1])


def flat(target: Path) -> dict[str, np.ndarray]:
    if target.suffix == ".npz":
        with np.load(target, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    with safe_open(target, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("layers", ["all", "top", "average"])
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_flat_arrays(source, layers, suffix):
    arrays = flat(embed(source, f"out.{suffix}", layers=layers))
    assert set(arrays) == {"embeddings", "offsets", "lines"}
    counts = [len(line.split()) for line in LINES]
    np.testing.assert_array_equal(arrays["offsets"], np.cumsum([0, *counts]))
    np.testing.assert_array_equal(arrays["lines"], np.arange(len(LINES)))
    for line, start, end in zip(LINES, arrays["offsets"], arrays["offsets"][1:]):
        values = arrays["embeddings"][start:end]
        wanted = expected(line, layers)
        np.testing.assert_allclose(values.swapaxes(0, 1) if layers == "all" else values, wanted, rtol=1e-6)


def test_safetensors_facts(source):
    with safe_open(embed(source, "out.safetensors", layers=[-1, 0]), "np") as file:
        assert file.metadata() == {"level": "token", "layers": "2,0", "model": "elmo"}


@pytest.mark.parametrize("layers, name", [("all", "layers"), ("top", "embedding"), ("average", "embedding")])
def test_jsonl(source, layers, name):
    rows = [json.loads(line) for line in embed(source, "out.jsonl", layers=layers).read_text().splitlines()]
    assert len(rows) == len(LINES)
    for number, (row, line) in enumerate(zip(rows, LINES)):
        assert list(row) == ["index", "text", "tokens", name]
        assert (row["index"], row["text"], row["tokens"]) == (number, line, line.split())
        values = np.array(row[name], dtype=np.float32)
        wanted = expected(line, layers)
        # Nine digits bring back every float32 as it was.
        np.testing.assert_array_equal(values.reshape(wanted.shape), wanted.astype(np.float32))


@pytest.mark.parametrize("layers", ["all", "top"])
def test_parquet(source, layers, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'ctxfast[parquet]'")
    monkeypatch.setattr(writers, "_GROUP_BYTES", 200)
    target = embed(source, "out.parquet", layers=layers)
    assert parquet.ParquetFile(target).num_row_groups > 3
    rows = parquet.read_table(target).to_pylist()
    assert [row["index"] for row in rows] == list(range(len(LINES)))
    for row, line in zip(rows, LINES):
        assert row["text"] == line and row["tokens"] == line.split()
        wanted = expected(line, layers)
        assert tuple(row["shape"]) == wanted.shape
        np.testing.assert_array_equal(np.array(row["embedding"], np.float32).reshape(row["shape"]), wanted)


# Sentence level


@pytest.mark.parametrize("layers", ["all", "top"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sentence_level(source, suffix, layers):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'ctxfast[parquet]'")
    target = embed(source, f"out.{suffix}", level="sentence", layers=layers, empty="skip")
    lines = [(number, line) for number, line in enumerate(LINES) if line]
    wanted = np.stack([expected_sentence(line, layers) for _, line in lines])
    if suffix in ("safetensors", "npz", "hdf5"):
        arrays = flat(target) if suffix != "hdf5" else {k: v[...] for k, v in h5py.File(target).items()}
        assert set(arrays) == {"embeddings", "lines"}
        values, numbers = arrays["embeddings"], arrays["lines"].tolist()
    else:
        if suffix == "jsonl":
            rows = [json.loads(row) for row in target.read_text().splitlines()]
            values = [row["layers" if layers == "all" else "embedding"] for row in rows]
        else:
            from pyarrow import parquet

            rows = parquet.read_table(target).to_pylist()
            assert set(rows[0]) == {"index", "text", "embedding"}
            values = [row["embedding"] for row in rows]
        assert [row["text"] for row in rows] == [line for _, line in lines]
        values, numbers = np.array(values, np.float32).reshape(wanted.shape), [row["index"] for row in rows]
    assert numbers == [number for number, _ in lines]
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)


def test_sentence_level_hdf5_in_blocks(source, monkeypatch):
    monkeypatch.setattr(writers, "_COPY_BYTES", 3 * DIM * LAYERS * 4)
    with h5py.File(embed(source, "out.hdf5", level="sentence", layers="all", window=100)) as file:
        wanted = np.stack([expected_sentence(line, "all") for line in LINES])
        np.testing.assert_allclose(file["embeddings"][...], wanted, rtol=1e-5, atol=1e-6)


# All of them


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_input_and_only_blank_lines(source, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'ctxfast[parquet]'")
    for content, empty, count in (("", "keep", 0), ("\n\n", "skip", 0), ("\n\n", "keep", 2)):
        source.write_text(content)
        target = embed(source, f"out.{suffix}", empty=empty, layers="all")
        if suffix == "jsonl":
            assert len(target.read_text().splitlines()) == count
        elif suffix == "hdf5":
            with h5py.File(target) as file:
                assert len(file) == count + 1
                assert all(file[str(number)].shape == (LAYERS, 0, DIM) for number in range(count))
        elif suffix != "parquet":
            assert flat(target)["embeddings"].shape == (0, LAYERS, DIM) and len(flat(target)["lines"]) == count
        else:
            from pyarrow import parquet

            assert parquet.read_table(target).num_rows == count
        target.unlink()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half_precision(source, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'ctxfast[parquet]'")
    target = embed(source, f"out.{suffix}", vector_dtype="float16")
    wanted = vectors(LINES[0].split())[-1].astype(np.float16)
    if suffix == "hdf5":
        with h5py.File(target) as file:
            values = file["0"][...]
    elif suffix == "jsonl":
        values = np.array(json.loads(target.read_text().splitlines()[0])["embedding"]).astype(np.float16)
    elif suffix == "parquet":
        from pyarrow import parquet

        values = np.array(parquet.read_table(target).to_pylist()[0]["embedding"], np.float16).reshape(3, DIM)
    else:
        values = flat(target)["embeddings"][:3]
    assert values.dtype == np.float16
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize("level", ["token", "sentence"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_are_the_same_every_time(source, suffix, level):
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'ctxfast[parquet]'")
    first = embed(source, f"out.{suffix}", level=level)
    content = first.read_bytes()
    first.unlink()
    time.sleep(1.1)  # formats that keep times keep seconds
    assert embed(source, f"out.{suffix}", level=level).read_bytes() == content


def test_values_that_are_no_numbers(source, monkeypatch):
    class Broken(FakeEncoder):
        def encode(self, batch, selection):
            values = super().encode(batch, selection)
            values[0, 0, :2] = float("nan")
            values[0, 0, 2] = float("inf")
            return values

    target = source.parent / "out.jsonl"
    source.write_text("a b")
    Embedder(Broken()).embed_file(source, target)
    values = json.loads(target.read_text())["embedding"][0]
    assert np.isnan(values[:2]).all() and np.isinf(values[2]) and np.isfinite(values[3:]).all()


@pytest.mark.parametrize(
    "name, format, chosen",
    [
        ("a.hdf5", None, "hdf5"),
        ("a.H5", None, "hdf5"),
        ("a.npz", "npz", "npz"),
        ("a.jsonl", "extract-features", "extract-features"),
        ("a.txt", "extract-features", "extract-features"),
        ("a", "jsonl", "jsonl"),
    ],
)
def test_formats_by_name(name, format, chosen):
    assert writers.format_of(Path(name), format) == chosen


@pytest.mark.parametrize(
    "name, format, message",
    [
        ("a.txt", None, "ends in '.txt'; expected .hdf5"),
        ("a", None, "ends in ''"),
        ("a.npz", "hdf5", "format is 'hdf5', but output a.npz ends as npz does"),
        ("a.npz", "pickle", "format is 'pickle'; expected one of hdf5"),
    ],
)
def test_wrong_formats(name, format, message):
    with pytest.raises(ValueError, match=message):
        writers.format_of(Path(name), format)


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"pip install 'ctxfast\[parquet\]'"):
        writers.format_of(Path("a.parquet"))


# Google's layout, real weights


def test_extract_features(tmp_path, minilm_dir, shared_data):
    reference = json.loads((shared_data / "bert" / "minilm_l6_reference.json").read_text())
    expected = np.load(shared_data / "bert" / "minilm_l6_reference.npz")
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    lines = [*reference["texts"], *(" ||| ".join(pair) for pair in reference["pairs"])]
    source.write_text("\n".join(lines), encoding="utf-8")
    Embedder(minilm_dir, device="cpu").embed_file(source, target, format="extract-features", layers=[-1, 0])
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["linex_index"] for row in rows] == list(range(10))
    for number, row in enumerate(rows):
        assert list(row) == ["linex_index", "features"]
        length = int(expected["attention_mask"][number].sum())
        features = row["features"]
        assert len(features) == length and features[0]["token"] == "[CLS]" and features[-1]["token"] == "[SEP]"
        assert sum(feature["token"] == "[SEP]" for feature in features) == (2 if number >= 8 else 1)
        for place, feature in enumerate(features):
            assert list(feature) == ["token", "layers"]
            assert [layer["index"] for layer in feature["layers"]] == [-1, -7]
            for layer, name in zip(feature["layers"], ("last_hidden_state", "embeddings")):
                assert list(layer) == ["index", "values"] and len(layer["values"]) == 384
                assert all(round(value, 6) == value for value in layer["values"])
                np.testing.assert_allclose(layer["values"], expected[name][number, place], atol=1e-4)


def test_extract_features_takes_the_top_four(tmp_path, minilm_dir):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("a\n\n")
    Embedder(minilm_dir, device="cpu").embed_file(source, target, format="extract-features")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [layer["index"] for layer in rows[0]["features"][0]["layers"]] == [-1, -2, -3, -4]
    assert [feature["token"] for feature in rows[1]["features"]] == ["[CLS]", "[SEP]"]

# SPDX-License-Identifier: Apache-2.0
"""``ElmoEmbedder``: arrays of all layers, and files in the layout of ``allennlp elmo``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from oracles.elmo_models import fixture_layers, fixture_sentences, write_model, write_variant

import ctxfast
from ctxfast.models.elmo.embedder import ElmoEmbedder

TEXT = ["the cat sat on the mat .", "a", "another line , with the cat", "a"]


@pytest.fixture
def embedder(tmp_path: Path) -> ElmoEmbedder:
    folder = tmp_path / "model"
    folder.mkdir()
    return ElmoEmbedder(*write_model(folder))


def test_by_default_it_carries_and_reproduces_allennlp(shared_data: Path) -> None:
    folder = shared_data / "elmo" / "allennlp_tiny"
    embedder = ctxfast.ElmoEmbedder(folder / "options.json", folder / "lm_weights.hdf5")
    lanes, expected = fixture_sentences(folder), [fixture_layers(folder, lane) for lane in range(3)]
    stream = (lanes[k][step] for step in range(4) for k in range(3))
    for number, found in enumerate(embedder.embed_sentences(stream, batch_size=3)):
        want = expected[number % 3][number // 3]
        assert found.shape == (3, *want.shape) and found.dtype == np.float32
        np.testing.assert_allclose(found[2], want, atol=1e-6, rtol=1e-5)
    assert number == 11


def test_shapes(embedder: ElmoEmbedder) -> None:
    assert embedder.embed_sentence(["a", "b"]).shape == (3, 2, 12)
    assert embedder.embed_sentence([]).shape == (3, 0, 12)
    assert [x.shape for x in embedder.embed_batch([[]])] == [(3, 0, 12)]
    assert [x.shape for x in embedder.embed_batch([["a"], [], ["b", "c"]])] == [(3, 1, 12), (3, 0, 12), (3, 2, 12)]
    assert embedder.embed_batch([]) == [] and list(embedder.embed_sentences([])) == []


def test_steady(tmp_path: Path) -> None:
    embedder = ElmoEmbedder(*write_model(tmp_path), state="steady")
    first = embedder.embed_sentence(["the", "cat"])
    embedder.embed_sentence(["something", "else"])
    np.testing.assert_array_equal(embedder.embed_sentence(["the", "cat"]), first)


def test_sentences_are_read_as_they_are_needed(embedder: ElmoEmbedder) -> None:
    read = []

    def source():
        for k in range(10):
            read.append(k)
            yield ["word"] * k

    found = embedder.embed_sentences(source(), batch_size=2)
    assert next(found).shape == (3, 0, 12) and read == [0, 1]
    assert [x.shape[1] for x in found] == list(range(1, 10))


def test_other_word_length(tmp_path: Path) -> None:
    embedder = ElmoEmbedder(*write_variant(tmp_path, "20 characters"), state="zero")
    same, other = ["x" * 18 + "y"], ["x" * 18]
    np.testing.assert_array_equal(embedder.embed_sentence(same), embedder.embed_sentence(other))


@pytest.mark.parametrize("output_format", ["all", "top", "average"])
def test_file(embedder: ElmoEmbedder, tmp_path: Path, output_format: str) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    embedder.embed_file(tmp_path / "in.txt", tmp_path / "out.hdf5", output_format, batch_size=3)
    embedder.bilm.reset_states()
    batches = [[line.split() for line in TEXT[first : first + 3]] for first in range(0, len(TEXT), 3)]
    expected_layers = [layers for batch in batches for layers in embedder.embed_batch(batch)]
    with h5py.File(tmp_path / "out.hdf5", "r") as file:
        assert sorted(file) == ["0", "1", "2", "3", "sentence_to_index"]
        index = json.loads(file["sentence_to_index"][0])
        assert file["sentence_to_index"].shape == (1,)
        assert index == {TEXT[0]: "0", "a": "3", TEXT[2]: "2"}
        for number, layers in enumerate(expected_layers):
            expected = {"all": layers, "top": layers[-1], "average": layers.mean(0)}[output_format]
            assert file[str(number)].dtype == np.float32
            np.testing.assert_allclose(file[str(number)][...], expected, atol=1e-6, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "model", "out.hdf5"]


def test_file_without_an_index_and_with_sentences_as_keys(embedder: ElmoEmbedder, tmp_path: Path) -> None:
    embedder.embed_file(io.StringIO("\n".join(TEXT)), tmp_path / "a", forget_sentences=True)
    embedder.embed_file(io.StringIO("\n".join(TEXT[:3])), tmp_path / "b", use_sentence_keys=True)
    with h5py.File(tmp_path / "a", "r") as file:
        assert sorted(file) == ["0", "1", "2", "3"]
    with h5py.File(tmp_path / "b", "r") as file:
        assert sorted(file) == sorted(TEXT[:3])


@pytest.mark.parametrize(
    ("lines", "kwargs", "error", "message"),
    [
        (
            ["a", "", "b", "  "],
            {},
            ValueError,
            "{0}/in.txt has blank lines: 2, 4 (counted from 1); expected a sentence on every line.",
        ),
        (
            ["a", "b", "a"],
            {"use_sentence_keys": True},
            ValueError,
            "line 3 of {0}/in.txt is the same as line 1; expected different sentences with use_sentence_keys.",
        ),
        (
            ["a/b"],
            {"use_sentence_keys": True},
            ValueError,
            "line 1 of {0}/in.txt cannot be a key of HDF5, where '/' and '.' stand for paths. Leave use_sentence_keys "
            "out.",
        ),
        (
            ["a"],
            {"output_format": "best"},
            ValueError,
            "output_format is 'best'; expected one of all, top, average.",
        ),
        (["a"], {"batch_size": 0}, ValueError, "batch_size is 0; expected 1 or more."),
        (None, {}, FileNotFoundError, "there is no input file {0}/in.txt."),
    ],
)
def test_errors(
    embedder: ElmoEmbedder, tmp_path: Path, lines: list[str] | None, kwargs: dict, error: type, message: str
) -> None:
    if lines is not None:
        (tmp_path / "in.txt").write_text("\n".join(lines))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        embedder.embed_file(tmp_path / "in.txt", tmp_path / "out.hdf5", **kwargs)
    assert str(caught.value) == "ctxfast.ElmoEmbedder: " + message.format(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing half-written


def test_an_existing_file_is_not_overwritten(embedder: ElmoEmbedder, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(FileExistsError, match="out exists. Remove it, or choose another name"):
        embedder.embed_file(io.StringIO("a"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_cuda_device_as_allennlp_has_it(tmp_path: Path, monkeypatch) -> None:
    files = write_model(tmp_path)
    for arguments in ((-1,), ()):
        assert ElmoEmbedder(*files, *arguments).device == torch.device("cpu")
    assert ElmoEmbedder(*files, device="cpu").device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="cuda_device is 0, and torch sees 0 GPUs. Pass -1 for the CPU"):
        ElmoEmbedder(*files, cuda_device=0)
    for wrong in (-2, "cuda:0", 0.5, True):
        with pytest.raises(ValueError, match="expected the number of a GPU, or -1"):
            ElmoEmbedder(*files, wrong)
    with pytest.raises(ValueError, match="cuda_device is 0 and device is 'cpu'; expected one of them"):
        ElmoEmbedder(*files, 0, device="cpu")

# SPDX-License-Identifier: Apache-2.0
"""What heads read of words by themselves: vectors in files, tables, characters, and mixes of layers beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctxfast.models.elmo.tokenization import batch_to_ids
from ctxfast.models.token_vectors import Sources, TokenVectors
from ctxfast.training.readers.vectors import read_vectors
from ctxfast.training.tasks.build import Choice, build, word_table
from ctxfast.training.tasks.word_table import WordTable

GLOVE = "the 0.5 -1\nof 1e-2 2\n. . 3 4\nThe 9 9\nthe 7 7\n"


def test_files_of_vectors(tmp_path) -> None:
    file = tmp_path / "glove.txt"
    file.write_text(GLOVE)
    words, vectors = read_vectors(file, {". .", "the", "missing"})
    assert words == ["the", ". ."] and vectors.tolist() == [[0.5, -1.0], [3.0, 4.0]]  # the first of two counts
    assert read_vectors(file, {". ."}, most=2)[0] == ["the", "of", ". ."]
    file.write_text("2 2\nthe 1 2\nof 3 4\n")  # word2vec's first line
    assert read_vectors(file, {"of"})[1].tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the 1 2\nof 1\n", "line 2: has a word and 1 numbers; expected 2 numbers"),
        ("the 1 2\nof 1 x\n", "line 2: has 'x' among its numbers"),
        ("the 1 nan\n", "line 1: has 'nan' among its numbers"),
        ("the\n", "line 1: has a word and 0 numbers; expected a word and numbers"),
        ("a 1 2\n", "has none of the 2 words asked for"),
    ],
)
def test_wrong_files_of_vectors(text, reason, tmp_path) -> None:
    (tmp_path / "glove.txt").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_vectors(tmp_path / "glove.txt", {"the", "of"})


def test_rows_of_a_table(tmp_path) -> None:
    table = WordTable.of([["Anna", "went"], ["anna", "went", "went"]])
    assert table.words == ("went",) and table.numbers([["went", "Anna"], ["Went"]]).tolist() == [[1, 0], [1, 0]]
    (tmp_path / "glove.txt").write_text(GLOVE)
    table = WordTable.of([["The", "THE", "OF"]], vectors=tmp_path / "glove.txt")
    assert table.words == ("the", "of", ". .", "The")
    weight = torch.empty(5, 2)
    table.fill(weight)
    assert table.numbers([["The", "THE", "OF", "x"]]).tolist() == [[4, 1, 2, 0]]
    assert np.allclose(weight[0], weight[1:].mean(0)) and weight[2].tolist() == pytest.approx([0.01, 2.0])
    with pytest.raises(ValueError, match="no word occurs twice"):
        WordTable.of([["a", "b"]])


def test_vectors_stand_side_by_side() -> None:
    """A mix of normalised layers, characters and a table against their equations; its penalty in training only."""
    torch.manual_seed(0)
    module = TokenVectors(Sources(2, 3, True, 4, 5, mix_norm=True, mix_l2=0.1)).eval()
    for weight, value in zip(module.mix.scalar_parameters, (1.0, -2.0)):
        weight.data.fill_(value)
    layers, lengths = torch.randn(2, 2, 3, 3), torch.tensor([3, 1])
    ids = batch_to_ids([["one", "two", "three"], ["four"]])
    found, mask = module.vectors(layers, lengths, {"characters": ids, "rows": torch.tensor([[1, 2, 3], [1, 0, 0]])})
    assert found.shape == (2, 3, 3 + 128 + 5) and mask.tolist() == [[True] * 3, [True, False, False]]
    assert not found[1, 1:].any()
    real = layers.transpose(0, 1)[:, mask]  # (K, words, N)
    normal = (real - real.mean((1, 2), keepdim=True)) / real.var((1, 2), unbiased=False, keepdim=True).sqrt()
    shares = torch.tensor([1.0, -2.0]).softmax(0)
    assert torch.allclose(found[mask][:, :3], shares[0] * normal[0] + shares[1] * normal[1], atol=1e-5)
    embedded = module.characters._char_embedding_weights[ids[0, 2]]  # "three": (50, 16)
    conv = module.characters.char_conv_0
    spans = torch.stack([embedded[k : k + 3].T.flatten() for k in range(48)])
    expected = torch.relu((spans @ conv.weight.flatten(1).T + conv.bias).amax(0))
    assert torch.allclose(found[0, 2, 3:131], expected, atol=1e-5)
    assert torch.equal(found[0, 2, 131:], module.table.weight[3])
    assert module.penalty() == 0.0
    assert module.train().penalty().item() == pytest.approx(0.1 * 5.0)


def test_vectors_of_a_file_stay(tmp_path, data) -> None:
    """They are what the file says, before and after training, unless they are to be trained."""
    (tmp_path / "glove.txt").write_text("anna 1 2\nparis 3 4\n")
    choice = Choice(words="chars,learned", hidden_size=4, trains_vectors=False)
    table = word_table("tag", data["tag"], choice, tmp_path / "glove.txt")
    predictor = build("tag", None, ("O", "B-x", "I-x"), choice, table=table)
    weight = predictor.model.reader.table.weight
    assert weight.tolist() == [[2.0, 3.0], [1.0, 2.0], [3.0, 4.0]] and not weight.requires_grad
    assert predictor.options["head"]["word_dim"] == 2
    with pytest.raises(ValueError, match="vectors are given, but words is 'chars'"):
        word_table("tag", data["tag"], Choice(words="chars"), tmp_path / "glove.txt")


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({}, "model is None and words is ''"),
        ({"features": "mix", "words": "chars"}, "model is None and features is 'mix'"),
        ({"words": "learned"}, "table is missing, but words has 'learned'"),
        ({"words": "letters"}, "words is 'letters'; expected 'chars'"),
        ({"words": "chars", "mix_l2": -1.0}, "mix_l2 is -1.0; expected a factor"),
    ],
)
def test_choices_that_do_not_fit(choice, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        build("tag", None, ("O", "B-x", "I-x"), Choice(**choice))

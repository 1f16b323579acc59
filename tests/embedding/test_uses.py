# SPDX-License-Identifier: Apache-2.0
"""``ctxfast neighbours``: uses of a word, and which of them are near."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.tiny_models import tiny_bert, tiny_elmo

from ctxfast.cli import main
from ctxfast.embedding.embedder import Embedder
from ctxfast.embedding.uses import Use, _nearest_query, embed_uses, marked_use, nearest, plane, uses_of

TEXT = """the boat went to paris
The boat saw anna

the sea and the boat
anna saw bob
boat boat
"""
LINES = [line.split() for line in TEXT.splitlines()]


def test_marked_words() -> None:
    use = marked_use("they sat on the *bank* of * it")
    assert use == Use(("they", "sat", "on", "the", "bank", "of", "*", "it"), 4) and use.word == "bank"
    assert use.shown(2) == "... on the *bank* of * ..." and use.shown() == "they sat on the *bank* of * it"
    for wrong in ("no mark", "*two* of *them*", "* alone *", "**"):
        with pytest.raises(ValueError, match="expected one, between asterisks"):
            marked_use(wrong)


def test_uses() -> None:
    found = list(uses_of("BOAT", LINES))
    assert [(use.index, len(use.words)) for use in found] == [(1, 5), (1, 4), (4, 5), (0, 2), (1, 2)]
    assert found[0].words == ("the", "boat", "went", "to", "paris")
    (cut,) = uses_of("x", [["a"] * 9 + ["x"] + ["b"] * 9], context=2)
    assert cut == Use(("a", "a", "x", "b", "b"), 2)


@pytest.mark.parametrize("model", ["bert", "elmo"])
def test_vectors_are_the_words(tmp_path, model) -> None:
    embedder = Embedder(tiny_bert(tmp_path / "m", layers=2) if model == "bert" else tiny_elmo(tmp_path / "m"))
    uses = list(uses_of("boat", LINES))
    done: list[int] = []
    vectors = embed_uses(embedder, uses, done.append)
    assert vectors.shape == (5, embedder.num_layers, embedder.dim) and done == [5]
    for use, found in zip(uses, vectors):
        layers = embedder([list(use.words)], layers="all")[0][:, use.index]
        expected = layers / np.linalg.norm(layers, axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_nearest_and_plane() -> None:
    angles = np.array([0.0, 0.3, 3.0, -0.1])
    sine, cosine = np.sin(angles), np.cos(angles)
    vectors = np.stack([np.stack([cosine, sine], -1), np.stack([sine, cosine], -1)], 1)
    order, cosines = nearest(vectors[0], vectors, 3)
    assert order.tolist() == [[0, 3, 1], [0, 3, 1]]
    np.testing.assert_allclose(cosines[0], np.cos([0.0, 0.1, 0.3]))
    draw = np.random.default_rng(0)
    flat = draw.standard_normal((20, 2)) @ draw.standard_normal((2, 7))
    found = plane(flat)
    between = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), between, atol=1e-9)
    assert plane(flat[:1]).shape == (1, 2)


def test_command(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    (tmp_path / "text").write_text(TEXT)
    model = tiny_bert(tmp_path / "m", layers=2)
    sentences = ("the *boat* went to paris", "a *boat*")
    argv = ["neighbours", tmp_path / "text", *sentences, "-m", model, "--top", 2, "--layers", "all", "--device", "cpu"]
    argv += ["-o", tmp_path / "new.json", "--plot", tmp_path / "new" / "plot.png"]
    assert main([*map(str, argv)]) == 0
    said = capsys.readouterr()
    report = json.loads((tmp_path / "new.json").read_text())
    expected = [(sentence, layer) for sentence in sentences for layer in range(3)]
    assert [(entry["sentence"], entry["layer"]) for entry in report] == expected
    # The first sentence stands in the text: it is not its own neighbour. The token layer knows the position alone.
    assert all(len(entry["nearest"]) == 2 for entry in report) and "4 of 4 uses" in said.err
    assert report[0]["nearest"][0]["use"] == "The *boat* saw anna" and report[0]["nearest"][0]["cosine"] > 0.999
    assert said.out.splitlines()[0] == "the *boat* went to paris   (layer 0 of 0..2)"
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a *boat*", "the *sea*"], "mark several words (boat, sea)"),
        (["a boat"], "marks 0 words"),
        (["a *ship*"], "has no use of 'ship'"),
        (["a *boat*", "--top", "0"], "--top is 0; expected 1 or more"),
        (["a *boat*", "--layers", "3"], "--layers is '3'; expected top, all, or a number from 0 to 2"),
        (["a *boat*", "--plot", "x.gif"], "--plot is 'x.gif'; expected a name that ends with .png"),
        (["a *boat*", "-o", "text"], "--output text is TEXT"),
    ],
)
def test_what_is_wrong(tmp_path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    assert main(["neighbours", "text", *words, "-m", str(tiny_bert(tmp_path / "m", layers=2))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctxfast.neighbours") and message in error, error
    assert (tmp_path / "text").read_text() == TEXT


def test_senses_of_a_real_model(minilm_dir, tmp_path, capsys) -> None:
    (tmp_path / "text").write_text(
        "the boat drifted toward the grassy bank below the bridge\n"
        "a steep muddy bank kept the flood out of the fields\n"
        "he paid the cheque into his account at the bank\n"
        "the central bank lent money to the failing lender\n"
    )
    queries = ["she sat on the *bank* of the river", "the *bank* raised the interest rate on every loan"]
    argv = ["neighbours", str(tmp_path / "text"), *queries, "-m", str(minilm_dir), "--top", "2", "--quiet"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("grassy" in line or "muddy" in line for line in lines[1:3]), lines
    assert all("cheque" in line or "central" in line for line in lines[4:6]), lines


def test_a_use_near_two_queries_is_the_nearest_ones() -> None:
    queries = np.eye(3)[:2]
    vectors = np.array([[1.0, 0, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    assert _nearest_query(queries, vectors, 1).tolist() == [0, -1, 1, -1]
    assert _nearest_query(queries, vectors, 2).tolist() == [0, 0, 1, -1]

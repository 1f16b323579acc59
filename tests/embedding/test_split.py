# SPDX-License-Identifier: Apache-2.0
"""Texts that are longer than the model takes, in windows that overlap: every value from the windows' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import FILLERS, tiny_bert, tiny_elmo

from ctxfast import cli
from ctxfast.embedding.embedder import Embedder

WORDS = [FILLERS[number % len(FILLERS)] for number in range(20)]  # one token each
LONG, SHORT = " ".join(WORDS), "the sea"
# 12 positions, two of them special: windows of 10 words, six on from one another with an overlap of 4.
WINDOWS = [(0, 10), (6, 16), (12, 20)]
# Window of each word: of words 6 to 9 the first half is farther from the first window's end than from the second's
# beginning, of words 12 to 15 likewise.
OWNERS = [0] * 8 + [1] * 6 + [2] * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), layers=2, max_positions=12)


@pytest.fixture(scope="module")
def split(folder: Path) -> Embedder:
    return Embedder(folder, device="cpu", split=4)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Embedder:
    """Embeds windows as texts of their own."""
    return Embedder(folder, device="cpu")


def _part(start: int, end: int) -> str:
    return " ".join(WORDS[start:end])


@pytest.mark.parametrize("layers", ["top", "all"])
def test_tokens_come_from_the_window_with_most_context(split, whole, layers) -> None:
    windows = [
        rows.reshape(-1, *rows.shape[-2:]) for rows in whole([_part(*window) for window in WINDOWS], layers=layers)
    ]
    wanted = np.stack([windows[own][:, k - WINDOWS[own][0]] for k, own in enumerate(OWNERS)], axis=1)
    found, short = split([LONG, SHORT], layers=layers)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(short, whole([SHORT], layers=layers)[0])
    assert split.tokens([LONG, SHORT]) == [WORDS, SHORT.split()]
    as_words = split([WORDS], layers=layers)[0]
    np.testing.assert_allclose(as_words, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean"])
def test_texts_are_the_mean_of_windows_by_their_tokens(split, whole, pooling) -> None:
    windows = whole([_part(*window) for window in WINDOWS], level="sentence", pooling=pooling)
    found = split([SHORT, LONG], level="sentence", pooling=pooling)
    np.testing.assert_allclose(found[1], (12 * windows[0] + 12 * windows[1] + 10 * windows[2]) / 34, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[0], whole([SHORT], level="sentence", pooling=pooling)[0])
    scaled = split([LONG], level="sentence", pooling=pooling, normalize=True)[0]
    np.testing.assert_allclose(scaled, found[1] / np.linalg.norm(found[1]), rtol=0, atol=1e-6)


def test_every_window_has_the_prompt(split, whole) -> None:
    # One word less has room: windows of 9, five on from one another.
    windows = whole([_part(0, 9), _part(5, 14), _part(10, 19), _part(15, 20)], level="sentence", prompt="the ")
    found = split([LONG], level="sentence", prompt="the ")[0]
    wanted = (12 * windows[:3].sum(0) + 8 * windows[3]) / 44
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_words_of_several_pieces(folder) -> None:
    """A word across a window's end is made of pieces of two."""
    embedder = Embedder(folder, device="cpu", split=0)
    words = ["the"] * 9 + ["anna"] + ["the"] * 3  # pieces "an", "##na": the tenth and eleventh token
    rows = embedder([words], word_pieces="all")[0]
    assert len(rows) == 14
    mean, first = (embedder([words], word_pieces=each)[0] for each in ("mean", "first"))
    np.testing.assert_allclose(mean[9], rows[9:11].mean(0), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(first[9], rows[9])
    assert mean.shape == first.shape == (13, 32)


def test_files(folder, split, tmp_path) -> None:
    (tmp_path / "in.txt").write_text(f"{SHORT}\n{LONG}\n")
    words = [
        "embed",
        f"{tmp_path}/in.txt",
        "-m",
        str(folder),
        "-o",
        f"{tmp_path}/out.npz",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert cli.main([*words, "--split", "4"]) == 0
    found = np.load(tmp_path / "out.npz")
    assert found["offsets"].tolist() == [0, 2, 22]
    np.testing.assert_allclose(found["embeddings"], np.concatenate(split([SHORT, LONG])), rtol=0, atol=1e-6)


def test_what_is_cut_or_refused_says_how_to_split(folder, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match=r"has 22 tokens, .* at most 12.* Pass --split 64 \(Embedder\(split=64\)\)"):
        Embedder(folder, device="cpu")([LONG])
    (tmp_path / "in.txt").write_text(f"{LONG}\n")
    words = ["embed", f"{tmp_path}/in.txt", "-m", str(folder), "-o", f"{tmp_path}/out.npz", "--device", "cpu"]
    assert cli.main([*words, "--truncate"]) == 0
    assert "tokens they lost: 10 (--split 64 embeds such lines whole, in windows)" in capsys.readouterr().err


def test_refusals(folder, split, tmp_path) -> None:
    for wrong in (-1, True, 1.5, "4"):
        with pytest.raises(ValueError, match="split is .*; expected a number of tokens, 0 or more, or None"):
            Embedder(folder, split=wrong)
    with pytest.raises(ValueError, match="split is 10; expected at most 9: of the 12 tokens of a window 10 are"):
        Embedder(folder, device="cpu", split=10)
    with pytest.raises(ValueError, match="split is 4; expected at most 3: of the 12 tokens of a window 4 are"):
        split([LONG], level="sentence", prompt="the boat and the sea from ")
    with pytest.raises(ValueError, match="split is 4; expected None: an ELMo model takes texts of any length"):
        Embedder(tiny_elmo(tmp_path), split=4)

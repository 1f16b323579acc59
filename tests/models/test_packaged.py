# SPDX-License-Identifier: Apache-2.0
"""The model in the box: opens by its name, is what its card says, and tells senses apart as its page says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ctxfast
from benchmarks import elmo_small, senses
from ctxfast.cli import main
from ctxfast.models.packaged import packaged_model, packaged_models

NAME = "ctxfast-elmo-small"
WORDS = [["The", "bank", "lent", "money", "."], ["Nobody", "saw", "the", "otter"]]


def test_its_files() -> None:
    folder = packaged_model(NAME)
    assert packaged_models() == [NAME] and folder is not None
    names = {"README.md", "options.json", "steady_state.safetensors", "weights.safetensors"}
    assert {file.name for file in folder.iterdir()} == names
    weights = load_file(folder / "weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    made = elmo_small.RESULT.load()["training"]
    for start in ("warm", "zero"):
        assert made["held_out"][f"perplexity_{start}"] <= 120
        assert f"{made['held_out'][f'perplexity_{start}']:.1f}" in card
    assert made["words_read"] >= 60e6 and f"{made['words_read'] / 1e6:.1f} million words" in card


def test_it_opens_by_name_and_becomes_allennlps_files(tmp_path) -> None:
    embedder = ctxfast.Embedder(NAME, device="cpu")
    assert (embedder.kind, embedder.num_layers, embedder.dim) == ("elmo", 3, 256)
    found = embedder(WORDS, layers="all")
    assert [layers.shape for layers in found] == [(3, 5, 256), (3, 4, 256)]
    assert main(["convert", NAME, str(tmp_path / "files"), "--quiet"]) == 0
    again = ctxfast.Embedder(tmp_path / "files", device="cpu")(WORDS, layers="all")
    for one, other in zip(found, again):
        np.testing.assert_allclose(one, other, atol=1e-6)
    model = ctxfast.Elmo.from_pretrained(NAME, num_output_representations=2, dropout=0.0, state="steady").eval()
    out = model(ctxfast.batch_to_ids(WORDS))["elmo_representations"]
    assert len(out) == 2 and out[0].shape == (2, 5, 256)
    np.testing.assert_allclose(out[0][0].detach(), found[0].mean(0), atol=1e-5)


def test_it_tells_senses_apart() -> None:
    found = senses.rows(NAME, ctxfast.Embedder(NAME, device="cpu"), senses.read(senses.SENTENCES))
    committed = [row for row in senses.RESULT.load()["rows"] if row["model"] == NAME]
    # Neighbours that are nearly as near may change places with the processor.
    assert [row["all"] for row in found] == pytest.approx([row["all"] for row in committed], abs=0.03)
    assert found[0]["all"] == pytest.approx(senses.CHANCE, abs=1e-3) and max(row["all"] for row in found) > 0.75


def test_it_finds_more_names_than_what_has_read_nothing() -> None:
    means = {row["reads"]: np.mean(row["f1"]) for row in elmo_small.RESULT.load()["rows"]}
    assert means.pop(NAME) >= max(means.values()) + 0.05

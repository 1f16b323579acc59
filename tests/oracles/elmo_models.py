# SPDX-License-Identifier: Apache-2.0
"""Small ELMo models in the real file format, and the fixtures of AllenNLP, for the tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np

from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import random_weights, save_weights

SMALL = ElmoConfig(
    projection_dim=6,
    cell_size=10,
    num_layers=2,
    filters=((1, 3), (2, 4), (3, 5)),
    char_embedding_dim=4,
    num_highways=2,
    cell_clip=3.0,
    proj_clip=3.0,
)

# What bilm-tf can make and AllenNLP partly refuses, each as changes of SMALL.
VARIANTS = {
    "plain": {},
    "no skip": dict(use_skip_connections=False),
    "no lstm projection": dict(cell_size=6, has_lstm_projection=False),
    "equal sizes, projected": dict(cell_size=6, has_lstm_projection=True),
    "no highway": dict(num_highways=0),
    "no cnn projection": dict(projection_dim=12, has_cnn_projection=False),
    "equal filters, projected": dict(projection_dim=12, has_cnn_projection=True),
    "one layer": dict(num_layers=1),
    "three layers": dict(num_layers=3),
    "tanh": dict(activation="tanh"),
    "no clips": dict(cell_clip=None, proj_clip=None),
    "clips hit": dict(cell_clip=0.4, proj_clip=0.3),
    "only cell clip": dict(cell_clip=0.4, proj_clip=None),
    "20 characters": dict(max_characters=20),
}

# Sentences of every awkward kind: empty, one token, words at and past the 48 bytes, cut inside a character, a mark.
LINES = [
    "the cat sat on the mat .".split(),
    [],
    ["a"],
    ["x" * 48, "x" * 49, "x" * 47 + "é", "中文", "", "<S>"],
    "another one , with the cat".split(),
]


def write_model(folder: Path, config: ElmoConfig = SMALL, *, scale: float = 1.0, seed: int = 0) -> tuple[Path, Path]:
    """Files of a random model; ``scale`` multiplies every weight but the character table's (more clips are hit)."""
    weights = random_weights(config, seed)
    for name, value in weights.items():
        if "_char_embedding" not in name:
            value *= scale
        if "char_conv" in name and name.endswith("weight"):
            value *= 10  # large enough for words to differ
    options, file = folder / "options.json", folder / "weights.hdf5"
    save_weights(weights, config, options, file, overwrite=True)
    return options, file


def write_variant(folder: Path, name: str) -> tuple[Path, Path]:
    changes = {"has_lstm_projection": None, "has_cnn_projection": None, **VARIANTS[name]}
    config = dataclasses.replace(SMALL, **changes)
    return write_model(folder, config, scale=2.5)


def fixture_sentences(folder: Path) -> list[list[list[str]]]:
    """[lane][sentence][token] of AllenNLP's fixture."""
    return [[text.split() for text in lane] for lane in json.loads((folder / "sentences.json").read_text())]


def fixture_layers(folder: Path, lane: int) -> list[np.ndarray]:
    """The expected top layer (n, 2P) of every sentence of a lane, states carried along it."""
    with h5py.File(folder / f"lm_embeddings_{lane}.hdf5", "r") as file:
        return [np.concatenate(list(file[str(k)][...]), axis=1) for k in range(len(file))]

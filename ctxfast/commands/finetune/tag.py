# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune tag``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .task import Say, TaskCommand


class TagCommand(TaskCommand):
    name = "tag"
    summary = "a tag for every word: entities, parts of speech, arguments"
    usage = """\
Sentences: a word a line in columns separated by tabs or spaces, a blank line after each sentence; also .gz and .xz.

  ctxfast finetune tag -m MODEL --train train.tsv --dev dev.tsv -o run --epochs 4 --lr 2e-4 --batch-size 16
  ctxfast finetune tag -m MODEL --features concat4 --crf --train train.tsv --dev dev.tsv -o run --epochs 20
  ctxfast finetune tag -m ELMO --features mix --train train.tsv --scheme none --tag-column 2 -o run
  ctxfast finetune tag -m MODEL --predicate-column 1 --predicate sep --train srl.tsv -o run
  ctxfast finetune tag -m ELMO --features mix --head highway --roles conll2012 --train train.conll -o run
  ctxfast finetune tag --words chars --crf --train train.tsv --dev dev.tsv -o run --epochs 20
  ctxfast finetune tag -m run/best --evaluate-only --test test.tsv -o scores
"""
    suffix = "tsv"
    head = "highway (interleaved highway LSTMs, for semantic roles)"
    lstm_layers = 2
    other_layers = "; highway 8"

    def add(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--word-column", type=int, metavar="N", default=0, help="number from 0 (%(default)s)")
        add("--tag-column", type=int, metavar="N", default=-1, help="number; negative: from the end (%(default)s)")
        add("--scheme", default="bio2", help="bio2 (default), iob1 or bioes (converted), or none: tags are not spans")
        add("--predicate-column", type=int, metavar="N", help="column that marks the predicate (anything but - _ O 0)")
        add("--predicate", help="how BERT sees it: type (token type, default) or sep ([SEP] predicate)")
        add("--roles", help="semantic roles in brackets, a sentence for every predicate: conll2005 or conll2012")
        add("--crf", action="store_true", help="with --features, ELMo or --words: score tags together")

    def layers(self, head: str | None) -> int:
        return 8 if head == "highway" else self.lstm_layers

    def check(self, args: argparse.Namespace) -> None:
        if args.predicate is not None and args.predicate_column is None and args.roles is None:
            raise ValueError("ctxfast.finetune: --predicate is given without --predicate-column; expected both.")

    def read(self, args: argparse.Namespace, path: str, say: Say, *, needs_labels: bool) -> list[Any]:
        from ...training.readers.conll import read_conll
        from ...training.readers.conll_brackets import read_roles

        if args.roles is not None:
            column = 1 if args.predicate_column is None else args.predicate_column
            return read_roles(path, args.roles, predicate_column=column, say=say)
        return read_conll(
            path,
            word_column=args.word_column,
            tag_column=args.tag_column if needs_labels else None,
            predicate_column=args.predicate_column,
            scheme=args.scheme,
            say=say,
        )

    def labels(self, args: argparse.Namespace, examples: Sequence[Any]) -> tuple[str, ...]:
        from ...training.tasks.tag import tag_names

        return tag_names(examples)

    def check_labels(self, path: str, examples: Sequence[Any], known: tuple[str, ...]) -> None:
        from ...training.tasks.tag import check_tags

        check_tags(path, examples, known)

    def found_labels(self, examples: Sequence[Any]) -> list[str]:
        return [tag for sentence in examples for tag in sentence.tags or ()]

    def is_spans(self, args: argparse.Namespace) -> bool:
        return args.scheme != "none"

    def choice(self, args: argparse.Namespace, train: Sequence[Any]) -> dict[str, Any]:
        return {"predicate": "none", **self.foreign_changes(args), "is_spans": self.is_spans(args)}

    def foreign_changes(self, args: argparse.Namespace) -> dict[str, Any]:
        return {} if args.predicate_column is None and args.roles is None else {"predicate": args.predicate or "type"}

    def follow(self, args: argparse.Namespace, predictor: Any) -> None:
        if not predictor.is_spans:
            args.scheme = "none"

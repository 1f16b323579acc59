# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune coref``."""

from __future__ import annotations

import argparse
from typing import Any

from .task import Say, TaskCommand


class CorefCommand(TaskCommand):
    name = "coref"
    summary = "which mentions of a document are of the same"
    usage = """\
Documents: CoNLL-2012's columns, also .gz and .xz. There is no form with all of BERT trained.

  ctxfast finetune coref -m ELMO --features mix --train train.conll --dev dev.conll -o run --epochs 20
  ctxfast finetune coref --words chars,learned --vectors glove.txt --train train.conll --dev dev.conll -o without-elmo
  ctxfast finetune coref -m run/best --evaluate-only --test test.conll -o scores
"""
    suffix = "jsonl"
    head = ""
    has_labels = False
    batch_size = 1

    def add(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--max-span", type=int, metavar="N", help="words of a mention (10)")
        add("--spans-per-word", type=float, metavar="X", help="spans that are kept, by words of the document (0.4)")
        add("--antecedents", type=int, metavar="N", help="earlier spans that are ranked for each (50)")

    def read(self, args: argparse.Namespace, path: str, say: Say, *, needs_labels: bool) -> list[Any]:
        from ...training.readers.conll_brackets import read_coreference
        from ...training.readers.files import fail

        found = read_coreference(path)
        without = sum(not document.clusters for document in found)
        if needs_labels and without == len(found):
            raise fail(path, "", "has no mentions; expected (1, 1) and (1) in the last column")
        if needs_labels and without:
            say(f"{path}: {without:,} of {len(found):,} documents have no mentions")
        return found

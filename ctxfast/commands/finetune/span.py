# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune span``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .task import Say, TaskCommand


class SpanCommand(TaskCommand):
    name = "span"
    summary = "the answer to a question in a text, or none"
    usage = """\
Questions: SQuAD's JSON, 1.1 or 2.0, also .gz and .xz.

  ctxfast finetune span -m MODEL --train train-v2.0.json --dev dev-v2.0.json -o run --epochs 2 --lr 3e-5 --batch-size 24
  ctxfast finetune span -m ELMO --features mix --head bidaf --train train-v1.1.json --dev dev-v1.1.json -o run
  ctxfast finetune span -m run/best --evaluate-only --test test-v2.0.json --null-threshold -1.5 -o scores
"""
    suffix = "json"
    head = "bidaf (attention in both directions and to itself)"
    has_labels = False

    def add(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--doc-stride", type=int, metavar="N", help="tokens between windows (128)")
        add("--max-query", type=int, metavar="N", help="tokens of a question (64)")
        add("--max-answer", type=int, metavar="N", help="tokens of an answer (30)")
        add("--n-best", type=int, metavar="N", help="candidates (20)")
        threshold = "no answer above this difference of scores (0; never if all have answers)"
        add("--null-threshold", type=float, metavar="X", help=f"{threshold}; scores-dev.json has the best")
        add("--skip-misaligned", action="store_true", help="leave out answers that do not stand where they say")

    def read(self, args: argparse.Namespace, path: str, say: Say, *, needs_labels: bool) -> list[Any]:
        from ...training.readers.squad import read_squad

        misaligned = "skip" if args.skip_misaligned else "error"
        found, notes = read_squad(path, needs_answers=needs_labels, misaligned=misaligned)
        for note in notes:
            say(note)
        return found

    def choice(self, args: argparse.Namespace, train: Sequence[Any]) -> dict[str, Any]:
        return {"null_threshold": _threshold(train)} if args.null_threshold is None else {}

    def settle(self, args: argparse.Namespace, predictor: Any, examples: Sequence[Any]) -> None:
        if args.null_threshold is None:
            predictor.null_threshold = _threshold(examples)


def _threshold(questions: Sequence[Any]) -> float | None:
    """No answer is predicted only where some questions have none."""
    return 0.0 if any(question.is_impossible for question in questions) else None

# SPDX-License-Identifier: Apache-2.0
"""What ``ctxfast finetune`` asks of a task."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

Say = Callable[[str], None]


class TaskCommand:
    """A task on the command line: its arguments, how its files are read, what its labels are.

    Attributes:
        name: "tag", ...
        summary: what it makes, in a line.
        usage: what its files are, and commands to copy.
        suffix: of the file of predictions.
        head: its head besides the LSTM; "" for none.
        lstm_layers: layers of an LSTM over features, where none are asked for.
        other_layers: what is said where those of ``head`` are others.
        has_labels: whether there are classes that training may lack.
        batch_size: where none is asked for; None for that of all tasks.
    """

    name: str
    summary: str
    usage: str
    suffix: str
    head: str
    lstm_layers = 1
    other_layers = ""
    has_labels = True
    batch_size: int | None = None

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the task's own arguments."""
        raise NotImplementedError

    def layers(self, head: str | None) -> int:
        """Layers of a head's LSTM, where none are asked for."""
        return self.lstm_layers

    def check(self, args: argparse.Namespace) -> None:
        """Refuse arguments of training that do not go together, before any data is read."""

    def read(self, args: argparse.Namespace, path: str, say: Say, *, needs_labels: bool) -> list[Any]:
        """The examples of a file; ``say`` hears what is odd about them."""
        raise NotImplementedError

    def labels(self, args: argparse.Namespace, examples: Sequence[Any]) -> tuple[str, ...]:
        """Names of the classes in training data; () where there are none."""
        return ()

    def check_labels(self, path: str, examples: Sequence[Any], known: tuple[str, ...]) -> None:
        """Raise ValueError for a label that is not known."""

    def found_labels(self, examples: Sequence[Any]) -> list[str]:
        """The label of every text, or of every word."""
        return []

    def is_spans(self, args: argparse.Namespace) -> bool:
        """Whether labels are tags of spans, judged as such."""
        return False

    def choice(self, args: argparse.Namespace, train: Sequence[Any]) -> dict[str, Any]:
        """Fields of ``Choice`` that the task decides by its arguments and data."""
        return {}

    def foreign_changes(self, args: argparse.Namespace) -> dict[str, Any]:
        """Fields of ``Choice`` that a finished model of Hugging Face's does not say."""
        return {}

    def follow(self, args: argparse.Namespace, predictor: Any) -> None:
        """Read files as a finished model was trained to."""

    def settle(self, args: argparse.Namespace, predictor: Any, examples: Sequence[Any]) -> None:
        """Decide by examples to be judged what a finished model of Hugging Face's does not say."""

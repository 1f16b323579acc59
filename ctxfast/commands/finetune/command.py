# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune``: classes of texts and pairs, tags of words, answers in a text, coreference."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .. import loop_options, progress
from .classify import ClassifyCommand, PairCommand
from .coref import CorefCommand
from .span import SpanCommand
from .tag import TagCommand
from .task import TaskCommand

TASKS: tuple[TaskCommand, ...] = (ClassifyCommand(), PairCommand(), TagCommand(), SpanCommand(), CorefCommand())

_HELP = """\
Fine-tune a BERT or ELMo model, or train an LSTM over its frozen layers or over words alone, and predict.

DIR/final holds the finished model, DIR/best the one with the best figures on --dev (evaluated every epoch); predictions
for --dev and --test are written beside the model. Killed, the same command goes on. A finished model, one that Hugging
Face's library trained included, takes --predict-only or --evaluate-only with --test. Learning rate, where none is
given: 5e-5, or 1e-3 for an LSTM over frozen layers, ELMo or words. Epochs: 3.
"""
# What a model is made with, and what reading and deciding depend on also later; by their names in ``Choice``.
_MADE_WITH = {
    "features": "features",
    "words": "words",
    "word_dim": "word_dim",
    "mix_norm": "mix_norm",
    "mix_l2": "mix_l2",
    "output_mix": "output_mix",
    "head": "head",
    "max_span": "max_span",
    "spans_per_word": "spans_per_word",
    "antecedents": "antecedents",
    "lstm_hidden": "hidden_size",
    "lstm_layers": "lstm_layers",
    "dropout": "dropout",
    "crf": "crf",
}
_READ_WITH = ("max_length", "doc_stride", "max_query", "max_answer", "n_best", "null_threshold")
# What examples are made of, of each task's arguments those that it has.
_READING = ("text_column", "pair_column", "label_column", "header", "quotes", "format", "regression", "word_column")
_READING += ("tag_column", "scheme", "predicate_column", "skip_misaligned", "unseen", "phrases", "roles")
_OF_HEADS = ("lstm_hidden", "lstm_layers", "dropout", "mix_norm", "mix_l2", "output_mix", "head", "vectors")
_OF_WINDOWS = ("max_length", "doc_stride", "max_query")


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a model for a task, evaluate, predict",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(metavar="TASK", required=True, parser_class=type(parser))
    for task in TASKS:
        own = tasks.add_parser(
            task.name,
            help=task.summary,
            description=f"{task.summary[0].upper()}{task.summary[1:]}.\n\n{_HELP}\n{task.usage}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(own)
        task.add(own)
        _add_head(own, task)
        loop_options.add(own, learning_rate=None)
        own.set_defaults(run=partial(run, task))
        if task.batch_size is not None:
            own.set_defaults(batch_size=task.batch_size)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    which = "BERT or ELMo folder, Google checkpoint, package, name on the hub; or a finished model"
    add("-m", "--model", help=which)
    add("--download", action="store_true", help=loop_options.DOWNLOAD)
    add("--train", metavar="FILE", help="examples to learn from")
    add("--dev", metavar="FILE", help="examples to choose the best model by")
    add("--test", metavar="FILE", help="examples to judge the chosen model by, or to predict")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--predict-only",
        action="store_true",
        help="no training: -m is a finished model, of Hugging Face's, too; DIR gets predictions of --test",
    )
    only.add_argument("--evaluate-only", action="store_true", help="the same, with figures: --test has labels")
    add("--max-length", type=int, metavar="N", help="tokens of a text or window (128; span 384; tag: the model's)")
    add(
        "--order",
        default="auto",
        help="batches: shuffled, or length: examples of similar length together (LSTM's default)",
    )


def _add_head(parser: argparse.ArgumentParser, task: TaskCommand) -> None:
    add = parser.add_argument
    which = "train an LSTM over frozen layers: last, second-to-last, sum4, concat4, embeddings; mix4, mix (learned)"
    add("--features", metavar="WHICH", help=which)
    if task.head:
        add("--head", metavar="WHICH", help=f"the model over vectors of words: lstm (default) or {task.head}")
    how = "what the LSTM reads of words besides, or without -m alone: chars (character CNN), learned (word vectors), or"
    add("--words", metavar="WHICH", help=f"{how} chars,learned")
    add("--word-dim", type=int, metavar="N", help="size of learned vectors (100)")
    add("--vectors", metavar="FILE", help="vectors to begin with, GloVe's text format; they stay as they are")
    add("--train-vectors", action="store_true", help="they are trained, too")
    add("--mix-norm", action="store_true", help="normalise layers before they are mixed")
    add("--output-mix", action="store_true", help="mix layers into the output of an LSTM of the head, too")
    add("--mix-l2", type=float, metavar="X", help="loss for the squares of the mix's weights (0)")
    add("--lstm-hidden", type=int, metavar="N", help="with --features, ELMo or --words: size of the LSTM (256)")
    add("--lstm-layers", type=int, metavar="N", help=f"its layers ({task.lstm_layers}{task.other_layers})")
    add("--dropout", type=float, help="around it (0.3)")
    if task.has_labels:
        add("--unseen", default="error", help="labels that training lacks: error, or keep (never right)")


def run(task: TaskCommand, args: argparse.Namespace) -> int:
    """Train and predict, or only predict."""
    who = f"finetune {task.name}"
    is_done = args.predict_only or args.evaluate_only
    if not is_done:
        loop_options.check_output(args, who, "model", "train", "dev", "test", "vectors")
        loop_options.check_directory(args, who)
    loop_options.check_files(args, who, "train", "dev", "test", "vectors")
    loop_options.check_model(args.model, who, download=args.download)
    if is_done and (args.test is None or args.train is not None or args.dev is not None):
        raise ValueError(
            f"ctxfast.{who}: --predict-only and --evaluate-only take --test alone; expected it and no other data."
        )
    if args.model is None and (is_done or args.words is None):
        expected = "a finished model" if is_done else "a pretrained one, or --words without one"
        raise ValueError(f"ctxfast.{who}: --model is missing; expected {expected}.")
    if args.train_vectors and args.vectors is None:
        raise ValueError(f"ctxfast.{who}: --train-vectors is given without --vectors; expected both.")
    if not is_done and args.train is None:
        raise ValueError(
            f"ctxfast.{who}: --train is missing; expected examples, or --predict-only with a finished model."
        )
    if is_done:
        loop_options.check_untrained(args, who)
    if args.epochs is None and args.steps is None:
        args.epochs = 3.0
    loop_options.check(args, who)
    from ..._core.choice import use_impl

    with use_impl(args.impl):
        job = _FineTune(task, args)
        return job.predict_only() if is_done else job.train()


def _given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the arguments that were given; a task may not have some."""
    values = {name: getattr(args, name, None) for name in names}
    return [name for name, value in values.items() if value is not None and value is not False]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class _FineTune:
    """A task with its arguments, and what was said of the data, for the log."""

    def __init__(self, task: TaskCommand, args: argparse.Namespace) -> None:
        self.task, self.args, self.notes = task, args, []

    def _say(self, text: str) -> None:
        if not self.args.quiet and loop_options.task_is_first():
            progress.say(f"finetune {self.task.name}", text)

    def _note(self, text: str) -> None:
        """Say something of the data, once, and keep it for the log."""
        if text not in self.notes:
            self.notes.append(text)
            self._say(text)

    def _read(self, path: str, *, needs_labels: bool = True) -> list[Any]:
        return self.task.read(self.args, path, self._note, needs_labels=needs_labels)

    def _check_labels(self, path: str, examples: list[Any], labels: tuple[str, ...]) -> None:
        """Refuse labels that do not occur in the training data, unless they are to be kept."""
        if not self.task.has_labels:
            return
        unseen = self.args.unseen
        if unseen not in ("error", "keep"):
            raise ValueError(f"ctxfast.finetune: --unseen is {unseen!r}; expected 'error' or 'keep'.")
        if unseen == "error" or not labels:
            self.task.check_labels(path, examples, labels)
        names = frozenset(labels)
        new = [label for label in self.task.found_labels(examples) if label not in names] if labels else []
        if new:
            from ...training.readers.notes import many

            kinds = many([repr(label) for label in dict.fromkeys(new)])
            self._note(f"{path}: {len(new):,} labels that training lacks, {kinds}; they count as wrong")

    def _check_used(self, form: str) -> None:
        """Refuse what this form of model has no use for."""
        args = self.args
        if form == "bert":
            from ...models.bert.modeling import Bert

            loop_options.check_impl(args, f"finetune {self.task.name}", Bert.ops)
        wrong = _given(args, _OF_HEADS if form == "bert" else _OF_WINDOWS)
        if wrong:
            found = "all of BERT is trained" if form == "bert" else "an LSTM reads texts whole"
            raise ValueError(
                f"ctxfast.finetune: {_option(wrong[0])} is given, but {found}; expected it only "
                f"{'with --features, ELMo or --words' if form == 'bert' else 'without --features, and for BERT'}."
            )

    def _choice(self, train: list[Any]) -> Any:
        from ...training.tasks.build import Choice

        args = self.args
        options: dict[str, Any] = {"lstm_layers": self.task.layers(getattr(args, "head", None))}
        options |= {_MADE_WITH[name]: getattr(args, name) for name in _given(args, _MADE_WITH)}
        options |= {name: getattr(args, name) for name in _given(args, _READ_WITH)}
        options["trains_vectors"] = args.vectors is None or args.train_vectors
        return Choice(**options, **self.task.choice(args, train))

    def train(self) -> int:
        args, task = self.args, self.task
        task.check(args)
        from ...training.tasks.metrics import check_libraries

        if args.dev is not None or args.test is not None:
            check_libraries(task.name, is_spans=task.is_spans(args))
        data = {name: self._read(getattr(args, name)) for name in ("train", "dev", "test") if getattr(args, name)}
        choice = self._choice(data["train"])
        labels = task.labels(args, data["train"])
        for name, examples in data.items():
            self._check_labels(getattr(args, name), examples, labels)
        import torch

        from ...training.loop.parallel import join
        from ...training.tasks.build import build, word_table

        table = word_table(task.name, data["train"], choice, args.vectors)
        group = join(args.parallel, args.device)
        torch.manual_seed(args.seed)
        predictor = build(task.name, args.model, labels, choice, table=table, device=group.device)
        self._check_used(predictor.form)
        chosen = self._fit(predictor, data, choice, group)
        if group.is_first:
            self._judge_all(chosen, {name: data[name] for name in ("dev", "test") if name in data}, group.device)
        group.leave()
        return 0

    def _fit(self, predictor: Any, data: dict[str, list[Any]], choice: Any, group: Any) -> Path:
        """Train; returns the directory of the model to be judged."""
        from ...training.tasks.predictor import FineTune

        args = self.args
        is_bert = predictor.form == "bert"
        if args.learning_rate is None:
            args.learning_rate = 5e-5 if is_bert else 1e-3
        order = args.order
        if order == "auto":  # BERT computes nothing at padding
            order = "shuffled" if is_bert else "length"
        options = {"batch_size": args.batch_size, "seed": args.seed, "order": order}
        with loop_options.preparing(args, f"finetune {self.task.name}"):
            run = FineTune(predictor, data["train"], data.get("dev", ()), **options)
        steps = args.steps or run.batches.steps(args.epochs, args.accumulate, group.ranks)
        if args.eval_every is None and args.dev is not None:
            args.eval_every = run.batches.steps(1, args.accumulate, group.ranks)
        best = predictor.main_figure if args.dev is not None else None
        kinds = f", {len(predictor.labels)} labels" if predictor.labels else ""
        self._say(f"{len(data['train']):,} examples{kinds}; {steps:,} steps")
        for what, count in predictor.lost.items():
            self._note(f"train: {count:,} {what}")
        loop = loop_options.config(args, steps, best=best)
        settings = self._settings(predictor.labels, choice, order)
        report = loop_options.run(args, f"finetune {self.task.name}", run, loop, settings, self.notes)
        return report.directory / ("best" if best else "final")

    def _settings(self, labels: tuple[str, ...], choice: Any, order: str) -> dict[str, Any]:
        """What a run that is gone on with must have been started with."""
        args = self.args
        files = ["train", "dev", *(["vectors"] if args.vectors is not None else [])]
        return {
            "command": f"finetune {self.task.name}",
            "task": self.task.name,
            "model": None if args.model is None else str(args.model),
            "data": {name: getattr(args, name) for name in files},
            "sha256": loop_options.digests(args, *files),
            "reading": {name: getattr(args, name) for name in _READING if hasattr(args, name)},
            "labels": list(labels),
            "choice": {name: getattr(choice, name) for name in choice.__dataclass_fields__},
            "batch_size": args.batch_size,
            "order": order,
        }

    def _judge_all(self, directory: Path, data: dict[str, list[Any]], device: Any) -> None:
        from ...training.tasks.build import load

        predictor = load(directory, device=device) if data else None
        for name, examples in data.items():
            self._judge(predictor, name, examples, directory)

    def _judged(self, name: str, directory: Path) -> tuple[Path, Path]:
        """Files of predictions and of figures."""
        return directory / f"predictions-{name}.{self.task.suffix}", directory / f"scores-{name}.json"

    def _judge(self, predictor: Any, name: str, examples: list[Any], directory: Path) -> None:
        """Predict, write predictions and figures, print the figures."""
        import json

        from ...training.tasks.predictor import write_text

        predictor.lost.clear()
        predictions = predictor.predict(examples)
        for what, count in predictor.lost.items():
            self._say(f"{name}: {count:,} {what}")
        predicted, judged = self._judged(name, directory)
        written = predictor.write_predictions(predicted, examples, predictions)
        if self.args.predict_only:
            self._say(f"{len(examples):,} examples: {written[0]}")
            return
        figures = predictor.scores(examples, predictions)
        write_text(judged, json.dumps(figures, indent=1) + "\n")
        shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
        if not self.args.quiet:
            print(f"{name}: {shown}")

    def predict_only(self) -> int:
        from ..._core.files import check_apart
        from ...training.loop.parallel import join
        from ...training.tasks.build import load
        from ...training.tasks.metrics import check_libraries
        from ...training.tasks.predictor import SETTINGS_FILE

        args, task = self.args, self.task
        made = self._judged("test", Path(args.output))
        check_apart(f"ctxfast.finetune {task.name}", {"the output": made}, {"--test": [args.test]})
        is_ours = (Path(args.model) / SETTINGS_FILE).is_file()
        # A model of Hugging Face's does not say how a predicate is marked.
        wrong = _given(
            args, (*_MADE_WITH, "vectors", "train_vectors", "regression", *(["predicate"] if is_ours else []))
        )
        if wrong:
            raise ValueError(
                f"ctxfast.finetune: {_option(wrong[0])} is given for a finished model; expected it in training only, "
                "as the model was made with it or without."
            )
        changes = {name: getattr(args, name) for name in _given(args, _READ_WITH)}
        if not is_ours:
            changes |= task.foreign_changes(args)
        predictor = load(args.model, task=task.name, device=join("no", args.device).device, changes=changes)
        self._check_used(predictor.form)
        task.follow(args, predictor)
        if args.evaluate_only:
            check_libraries(task.name, is_spans=predictor.is_spans)
        examples = self._read(args.test, needs_labels=args.evaluate_only)
        if args.evaluate_only:
            self._check_labels(args.test, examples, predictor.labels)
            if not is_ours:
                task.settle(args, predictor, examples)
        self._judge(predictor, "test", examples, Path(args.output))
        return 0

# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune``: classes of texts and pairs, tags of words, answers in a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from . import loop_options

_HELP = """\
Fine-tune a BERT or ELMo model, or train an LSTM over its frozen layers, and predict.

DIR/final holds the finished model, DIR/best the one with the best figures on --dev (evaluated every epoch); predictions
for --dev and --test are written beside the model. Killed, the same command goes on. A finished model, one that Hugging
Face's library trained included, takes --predict-only or --evaluate-only with --test. Learning rate, where none is
given: 5e-5, or 1e-3 for an LSTM over frozen layers or ELMo. Epochs: 3.
"""
_LSTM_LAYERS = {"classify": 1, "pair": 1, "tag": 2, "span": 1}
# What a model is made with, and what reading and deciding depend on also later; by their names in ``Choice``.
_MADE_WITH = {
    "features": "features",
    "lstm_hidden": "hidden_size",
    "lstm_layers": "lstm_layers",
    "dropout": "dropout",
    "crf": "crf",
}
_READ_WITH = ("max_length", "doc_stride", "max_query", "max_answer", "n_best", "null_threshold")
# What examples are made of, of each task's arguments those that it has.
_READING = ("text_column", "pair_column", "label_column", "header", "quotes", "format", "regression", "word_column")
_READING += ("tag_column", "scheme", "predicate_column", "skip_misaligned", "unseen")
_OF_WINDOWS = ("max_length", "doc_stride", "max_query")
_TASKS = {
    "classify": (
        "a class, or a number, for every text",
        """\
Texts: .tsv, .csv or .jsonl, also .gz and .xz. Columns go by their usual names (text, label, ...) or as told.

  ctxfast finetune classify -m MODEL --train train.csv --dev dev.csv -o run --epochs 3 --lr 5e-5
  ctxfast finetune classify -m MODEL --train cola.tsv --text-column 3 --label-column 1 -o run
  ctxfast finetune classify -m run/best --predict-only --test new.tsv -o predictions
""",
    ),
    "pair": (
        "a class, or a number, for every pair of texts",
        """\
Pairs: .tsv, .csv or .jsonl, also .gz and .xz.

  ctxfast finetune pair -m MODEL --train qnli.tsv --dev dev.tsv -o run --max-length 256
  ctxfast finetune pair -m MODEL --train stsb.tsv --dev dev.tsv -o run --regression
""",
    ),
    "tag": (
        "a tag for every word: entities, parts of speech, arguments",
        """\
Sentences: a word a line in columns parted by tabs or spaces, a blank line after each sentence; also .gz and .xz.

  ctxfast finetune tag -m MODEL --train train.tsv --dev dev.tsv -o run --epochs 4 --lr 2e-4 --batch-size 16
  ctxfast finetune tag -m MODEL --features concat4 --crf --train train.tsv --dev dev.tsv -o run --epochs 20
  ctxfast finetune tag -m ELMO --features mix --train train.tsv --scheme none --tag-column 2 -o run
  ctxfast finetune tag -m MODEL --predicate-column 1 --predicate sep --train srl.tsv -o run
  ctxfast finetune tag -m run/best --evaluate-only --test test.tsv -o scores
""",
    ),
    "span": (
        "the answer to a question in a text, or none",
        """\
Questions: SQuAD's JSON, 1.1 or 2.0, also .gz and .xz.

  ctxfast finetune span -m MODEL --train train-v2.0.json --dev dev-v2.0.json -o run --epochs 2 --lr 3e-5 --batch-size 24
  ctxfast finetune span -m ELMO --features mix --train train-v1.1.json --dev dev-v1.1.json -o run --epochs 10
  ctxfast finetune span -m run/best --evaluate-only --test test-v2.0.json --null-threshold -1.5 -o scores
""",
    ),
}


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a model for a task, evaluate, predict",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(metavar="TASK", required=True, parser_class=type(parser))
    for task, (line, text) in _TASKS.items():
        own = tasks.add_parser(
            task,
            help=line,
            description=f"{line[0].upper()}{line[1:]}.\n\n{_HELP}\n{text}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(own)
        _ADD[task](own)
        _add_head(own, task)
        loop_options.add(own, learning_rate=None)
        own.set_defaults(run=run, task=task)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", required=True, help="BERT or ELMo folder, Google checkpoint, package; or a finished model")
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
        help="batches: shuffled, or length: examples of like length together (LSTM's default)",
    )


def _add_head(parser: argparse.ArgumentParser, task: str) -> None:
    add = parser.add_argument
    add(
        "--features",
        metavar="WHICH",
        help="train an LSTM over frozen layers: last, second-to-last, sum4, concat4, embeddings; mix4, mix (learned)",
    )
    add(
        "--lstm-hidden",
        type=int,
        metavar="N",
        help="with --features or ELMo: size of the LSTM (256)",
    )
    add("--lstm-layers", type=int, metavar="N", help=f"its layers ({_LSTM_LAYERS[task]})")
    add("--dropout", type=float, help="around it (0.3)")
    if task != "span":
        add(
            "--unseen",
            default="error",
            help="labels that training lacks: error, or keep (never right)",
        )


def _add_table(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text-column", metavar="C", help="name, or number from 0")
    add("--label-column", metavar="C", help="name, or number from 0")
    header = parser.add_mutually_exclusive_group()
    header.add_argument(
        "--header", dest="header", action="store_true", default=None, help="the first row names columns"
    )
    header.add_argument("--no-header", dest="header", action="store_false", help="it does not (else: looked at)")
    add("--quotes", help="plain: quote signs are text (default in .tsv); csv: they delimit fields (default in .csv)")
    add("--format", help="tsv, csv or jsonl, where the suffix does not say")
    add("--regression", action="store_true", help="labels are numbers")


def _add_pair(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)
    parser.add_argument("--pair-column", metavar="C", help="the second text: name, or number from 0")


def _add_tag(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--word-column", type=int, metavar="N", default=0, help="number from 0 (%(default)s)")
    add("--tag-column", type=int, metavar="N", default=-1, help="number; negative: from the end (%(default)s)")
    add("--scheme", default="bio2", help="bio2 (default), iob1 or bioes (converted), or none: tags are no spans")
    add("--predicate-column", type=int, metavar="N", help="column that marks the predicate (anything but - _ O 0)")
    add("--predicate", help="how BERT sees it: type (token type, default) or sep ([SEP] predicate)")
    add("--crf", action="store_true", help="with --features or ELMo: score tags together")


def _add_span(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--doc-stride", type=int, metavar="N", help="tokens between windows (128)")
    add("--max-query", type=int, metavar="N", help="tokens of a question (64)")
    add("--max-answer", type=int, metavar="N", help="tokens of an answer (30)")
    add("--n-best", type=int, metavar="N", help="candidates (20)")
    add(
        "--null-threshold",
        type=float,
        metavar="X",
        help="no answer above this difference of scores (0; never if all have answers); scores-dev.json has the best",
    )
    add("--skip-misaligned", action="store_true", help="leave out answers that do not stand where they say")


_ADD = {"classify": _add_table, "pair": _add_pair, "tag": _add_tag, "span": _add_span}


def run(args: argparse.Namespace) -> int:
    """Train and predict, or only predict."""
    who = f"ctxfast.finetune {args.task}"
    is_done = args.predict_only or args.evaluate_only
    loop_options.check_files(args, who.removeprefix("ctxfast."), "train", "dev", "test")
    loop_options.check_model(args.model, who.removeprefix("ctxfast."))
    if not is_done:
        loop_options.check_output(args, f"finetune {args.task}", "model", "train", "dev", "test")
    if is_done and (args.test is None or args.train is not None or args.dev is not None):
        raise ValueError(f"{who}: --predict-only and --evaluate-only take --test alone; expected it and no other data.")
    if not is_done and args.train is None:
        raise ValueError(f"{who}: --train is missing; expected examples, or --predict-only with a finished model.")
    if args.epochs is None and args.steps is None:
        args.epochs = 3.0
    loop_options.check(args, f"finetune {args.task}")
    from .._core.registry import use_impl

    args.notes = []
    with use_impl(args.impl):
        return _predict_only(args) if is_done else _train(args)


def _column(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text


def _read(args: argparse.Namespace, path: str, *, needs_labels: bool = True) -> list[Any]:
    """The examples of a file."""
    if args.task == "tag":
        from ..training.readers.conll import read_conll

        return read_conll(
            path,
            word_column=args.word_column,
            tag_column=args.tag_column if needs_labels else None,
            predicate_column=args.predicate_column,
            scheme=args.scheme,
            say=partial(_note, args),
        )
    if args.task == "span":
        from ..training.readers.squad import read_squad

        misaligned = "skip" if args.skip_misaligned else "error"
        found, notes = read_squad(path, needs_answers=needs_labels, misaligned=misaligned)
        for note in notes:
            _note(args, note)
        return found
    from ..training.readers.notes import class_notes
    from ..training.readers.tables import TableFormat, read_table

    if args.quotes not in (None, "plain", "csv"):
        raise ValueError(f"ctxfast.finetune: --quotes is {args.quotes!r}; expected 'plain' or 'csv'.")
    table = TableFormat(
        text=_column(args.text_column),
        pair=_column(getattr(args, "pair_column", None)),
        label=_column(args.label_column),
        header=args.header,
        quoting=None if args.quotes is None else args.quotes == "csv",
        format=args.format,
    )
    say = partial(_note, args)
    found = read_table(path, table, is_pair=args.task == "pair", needs_label=needs_labels, say=say)
    if needs_labels and not args.regression:
        labels: dict[str, list[int]] = {}
        for example in found:
            labels.setdefault(example.label, []).append(example.line)
        for note in class_notes(labels):
            _note(args, f"{path}: {note}")
    return found


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet and loop_options.task_is_first():
        print(f"ctxfast finetune {args.task}: {text}", file=sys.stderr, flush=True)


def _note(args: argparse.Namespace, text: str) -> None:
    """Say something of the data, and keep it for the log."""
    if text not in args.notes:
        args.notes.append(text)
        _say(args, text)


def _check(args: argparse.Namespace, path: str, examples: list[Any], labels: tuple[str, ...]) -> None:
    """Refuse labels that training has not seen, unless they are to be kept."""
    if args.task == "span":
        return
    if args.unseen not in ("error", "keep"):
        raise ValueError(f"ctxfast.finetune: --unseen is {args.unseen!r}; expected 'error' or 'keep'.")
    if args.task == "tag":
        if args.unseen == "error":
            from ..training.tasks.tag import check_tags

            check_tags(path, examples, labels)
        found = [tag for sentence in examples for tag in sentence.tags or ()]
    else:
        if args.unseen == "error" or not labels:
            from ..training.tasks.classify import check_labels

            check_labels(path, examples, labels)
        found = [example.label for example in examples]
    names = frozenset(labels)
    unseen = [label for label in found if label not in names] if labels else []
    if unseen:
        from ..training.readers.notes import many

        kinds = many([repr(label) for label in dict.fromkeys(unseen)])
        _note(args, f"{path}: {len(unseen):,} labels that training lacks, {kinds}; they count as wrong")


def _given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the arguments that were given; a task may not have some."""
    values = {name: getattr(args, name, None) for name in names}
    return [name for name, value in values.items() if value is not None and value is not False]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _choice(args: argparse.Namespace, train: list[Any]) -> Any:
    from ..training.tasks.build import Choice

    options: dict[str, Any] = {"lstm_layers": _LSTM_LAYERS[args.task]}
    options |= {_MADE_WITH[name]: getattr(args, name) for name in _given(args, _MADE_WITH)}
    options |= {name: getattr(args, name) for name in _given(args, _READ_WITH)}
    if args.task == "span" and args.null_threshold is None:
        options["null_threshold"] = 0.0 if any(question.is_impossible for question in train) else None
    if args.task == "tag":
        predicate = (args.predicate or "type") if args.predicate_column is not None else "none"
        options |= {"predicate": predicate, "is_spans": args.scheme != "none"}
    return Choice(**options)


def _check_used(args: argparse.Namespace, form: str) -> None:
    """Refuse what this form of model has no use for."""
    if form == "bert":
        from ..models.bert.modeling import Bert

        loop_options.check_impl(args, f"finetune {args.task}", Bert.ops)
    wrong = _given(args, ("lstm_hidden", "lstm_layers", "dropout") if form == "bert" else _OF_WINDOWS)
    if wrong:
        found = "all of BERT is trained" if form == "bert" else "an LSTM reads texts whole"
        raise ValueError(
            f"ctxfast.finetune: {_option(wrong[0])} is given, but {found}; expected it only "
            f"{'with --features, or ELMo' if form == 'bert' else 'without --features, and for BERT'}."
        )


def _labels(args: argparse.Namespace, examples: list[Any]) -> tuple[str, ...]:
    if args.task == "span" or getattr(args, "regression", False):
        return ()
    if args.task == "tag":
        from ..training.tasks.tag import tag_names

        return tag_names(examples)
    from ..training.tasks.classify import class_names

    return class_names(examples)


def _train(args: argparse.Namespace) -> int:
    if args.task == "tag" and args.predicate is not None and args.predicate_column is None:
        raise ValueError("ctxfast.finetune: --predicate is given without --predicate-column; expected both.")
    from ..training.metrics import check_libraries

    if args.dev is not None or args.test is not None:
        check_libraries(args.task, is_spans=args.task == "tag" and args.scheme != "none")
    data = {name: _read(args, getattr(args, name)) for name in ("train", "dev", "test") if getattr(args, name)}
    choice = _choice(args, data["train"])
    labels = _labels(args, data["train"])
    for name, examples in data.items():
        _check(args, getattr(args, name), examples, labels)
    import torch

    from ..training.checkpoints import check_directory
    from ..training.parallel import join
    from ..training.tasks.build import build, load
    from ..training.tasks.predictor import FineTune

    check_directory(args.output)
    group = join(args.parallel, args.device)
    torch.manual_seed(args.seed)
    predictor = build(args.task, args.model, labels, choice, device=group.device)
    _check_used(args, predictor.form)
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if predictor.form == "bert" else 1e-3
    order = args.order
    if order == "auto":  # BERT computes nothing at padding
        order = "shuffled" if predictor.form == "bert" else "length"
    task = FineTune(
        predictor, data["train"], data.get("dev", ()), batch_size=args.batch_size, seed=args.seed, order=order
    )
    steps = args.steps or task.batches.steps(args.epochs, args.accumulate, group.ranks)
    if args.eval_every is None and args.dev is not None:
        args.eval_every = task.batches.steps(1, args.accumulate, group.ranks)
    best = predictor.main_figure if args.dev is not None else None
    kinds = f", {len(labels)} labels" if labels else ""
    _say(args, f"{len(data['train']):,} examples{kinds}; {steps:,} steps")
    for what, count in predictor.lost.items():
        _note(args, f"train: {count:,} {what}")
    settings = {
        "command": f"finetune {args.task}",
        "task": args.task,
        "model": str(args.model),
        "data": {name: getattr(args, name) for name in ("train", "dev")},
        "sha256": loop_options.digests(args, "train", "dev"),
        "reading": {name: getattr(args, name) for name in _READING if hasattr(args, name)},
        "labels": list(labels),
        "choice": {name: getattr(choice, name) for name in choice.__dataclass_fields__},
        "batch_size": args.batch_size,
        "order": order,
    }
    loop = loop_options.config(args, steps, best=best)
    report = loop_options.run(args, f"ctxfast finetune {args.task}", task, loop, settings, args.notes)
    chosen = report.directory / ("best" if best else "final")
    judged = [name for name in ("dev", "test") if name in data]
    if group.is_first and judged:
        predictor = load(chosen, device=group.device)
        for name in judged:
            _judge(args, predictor, name, data[name], chosen)
    group.leave()
    return 0


def _judgement(args: argparse.Namespace, name: str, directory: Path) -> tuple[Path, Path]:
    """Files of predictions and of figures."""
    suffix = {"tag": "tsv", "span": "json"}.get(args.task, "jsonl")
    return directory / f"predictions-{name}.{suffix}", directory / f"scores-{name}.json"


def _judge(args: argparse.Namespace, predictor: Any, name: str, examples: list[Any], directory: Path) -> None:
    """Predict, write predictions and figures, print the figures."""
    import json

    from ..training.tasks.predictor import write_text

    predictor.lost.clear()
    predictions = predictor.predict(examples)
    for what, count in predictor.lost.items():
        _say(args, f"{name}: {count:,} {what}")
    predicted, judged = _judgement(args, name, directory)
    written = predictor.write_predictions(predicted, examples, predictions)
    if args.predict_only:
        _say(args, f"{len(examples):,} examples: {written[0]}")
        return
    figures = predictor.scores(examples, predictions)
    write_text(judged, json.dumps(figures, indent=1) + "\n")
    shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
    if not args.quiet:
        print(f"{name}: {shown}")


def _predict_only(args: argparse.Namespace) -> int:
    from .._core.files import check_apart
    from ..training.parallel import join
    from ..training.tasks.build import load
    from ..training.tasks.predictor import SETTINGS_FILE

    made = _judgement(args, "test", Path(args.output))
    check_apart(f"ctxfast.finetune {args.task}", {"the output": made}, {"--test": [args.test]})
    is_ours = (Path(args.model) / SETTINGS_FILE).is_file()
    # A model of Hugging Face's does not say how a predicate is marked.
    wrong = _given(args, (*_MADE_WITH, "regression", *(["predicate"] if is_ours else [])))
    if wrong:
        raise ValueError(
            f"ctxfast.finetune: {_option(wrong[0])} is given for a finished model; expected it in training only, as "
            "the model was made with it or without."
        )
    changes = {name: getattr(args, name) for name in _given(args, _READ_WITH)}
    if args.task == "tag" and not is_ours and args.predicate_column is not None:
        changes["predicate"] = args.predicate or "type"
    predictor = load(args.model, task=args.task, device=join("no", args.device).device, changes=changes)
    _check_used(args, predictor.form)
    if args.task == "tag":
        args.scheme = "none" if not predictor.is_spans else args.scheme
    if args.evaluate_only:
        from ..training.metrics import check_libraries

        check_libraries(args.task, is_spans=args.task == "tag" and predictor.is_spans)
    examples = _read(args, args.test, needs_labels=args.evaluate_only)
    if args.evaluate_only:
        _check(args, args.test, examples, predictor.labels)
        if args.task == "span" and not is_ours and args.null_threshold is None:
            predictor.null_threshold = 0.0 if any(question.is_impossible for question in examples) else None
    _judge(args, predictor, "test", examples, Path(args.output))
    return 0

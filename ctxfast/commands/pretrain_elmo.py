# SPDX-License-Identifier: Apache-2.0
"""``ctxfast pretrain elmo``: a bidirectional language model from text."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from . import loop_options, progress

_WHO = "pretrain elmo"
_HELP = """\
Train ELMo's bidirectional language model on text, as bilm-tf does: characters in, sampled softmax over a vocabulary,
state carried along running text. Defaults are bilm-tf's, but for --restart. Documents are set apart by blank lines.

DIR/final holds options.json and weights.hdf5, which AllenNLP and ctxfast.Elmo read, and the state to start texts from.
The held-out text is judged from a carried state and with every sentence from zeros; DIR/best is the best from the worse
of the two. Killed, the same command goes on.
Under torchrun every process reads its own lanes of the text.

  ctxfast pretrain elmo train.txt -o run --size small --epochs 10 --held-out dev.txt
  ctxfast pretrain elmo book.txt.xz --tokenize -o run --options options.json --vocab-size 20000 --negatives 2000
"""


def add(commands: Any) -> None:
    """Add the command to ``ctxfast pretrain``."""
    parser = commands.add_parser(
        "elmo",
        help="a biLM: characters, LSTMs in both directions",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="+", metavar="TEXT", help="text (plain, .gz, .xz), a sentence a line, words between white space")
    add("--tokenize", action="store_true", help="lines are running text: split sentences and words by simple rules")
    add("--held-out", metavar="FILE", help="text to judge by: perplexity under the full softmax, both ways")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", default="original", help="small, medium or original (default: 4096 cells, 512)")
    size.add_argument("--options", metavar="FILE", help="options.json with the model's sizes")
    add("--vocab", metavar="FILE", help="words of the output layer: <S>, </S>, <UNK>, then frequent before rare")
    add("--vocab-size", type=int, metavar="N", help="else the N most frequent words of the text")
    add("--min-count", type=int, metavar="N", default=1, help="of them those seen N times or more (%(default)s)")
    add("--init-from", metavar="DIR", help="go on from a model: options.json, its weights (softmax.safetensors)")
    add("--unroll", type=int, metavar="N", default=20, help="steps that gradients go back (%(default)s)")
    add("--negatives", type=int, metavar="N", default=8192, help="words of the sampled softmax; 0: full (%(default)s)")
    add(
        "--restart",
        type=float,
        default=0.05,
        metavar="P",
        help="share of windows with which a lane begins anew, from zeros; it does at documents too (%(default)s)",
    )
    add("--dropout", type=float, default=0.1, help="of every layer's input and the top (%(default)s)")
    loop_options.add(
        parser,
        batch_size=128,
        learning_rate=0.2,
        warmup=0,
        schedule="constant",
        optimizer="adagrad",
        weight_decay=0.0,
        max_grad_norm=10.0,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare the text, train, write the model."""
    loop_options.check_output(args, _WHO, "text", "held_out", "options", "vocab", "init_from")
    loop_options.check_directory(args, _WHO)
    loop_options.check(args, _WHO)
    loop_options.check_files(args, _WHO, "text", "held_out", "options", "vocab")
    _check(args)
    from ..training.loop.checkpoints import check_settings
    from ..training.loop.parallel import join

    config, vocabulary = _model_config(args), _vocabulary(args)
    settings = _settings(args, config)
    if not args.overwrite:
        check_settings(args.output, settings)
    group = join(args.parallel, args.device)
    say = None if args.quiet or not group.is_first else partial(progress.say, _WHO)
    locks: list[Any] = []  # held to the end: another command must not prepare what this one reads
    prepare = partial(_prepare, args, config.max_characters, vocabulary, group.is_first, locks, say)
    with loop_options.preparing(args, _WHO):
        corpus, held_out = group.after_first(prepare)
    task = _task(args, corpus, config, held_out)
    windows = task.windows_per_epoch(group.ranks)
    steps = args.steps or max(1, round(args.epochs * windows) // args.accumulate)
    more = {"initial_accumulator": 1.0} if args.optimizer == "adagrad" else {}
    loop = loop_options.config(args, steps, best="-loss" if held_out is not None else None, **more)
    if say is not None:
        parameters = sum(value.numel() for value in task.model.parameters())
        share = 100 * corpus.unknown_share
        say(
            f"{corpus.num_sentences:,} sentences, {corpus.positions:,} predictions each way, {share:.2f} % of words "
            f"outside the vocabulary; {parameters:,} parameters; {steps:,} steps"
        )
    loop_options.run(args, _WHO, task, loop, settings)
    group.leave()
    return 0


def _model_config(args: argparse.Namespace) -> Any:
    """Sizes of the model: of its options file, else of the model that is gone on with, else by name."""
    from ..models.elmo.config import ElmoConfig

    options = args.options
    if options is None and args.init_from is not None:
        options = Path(args.init_from) / "options.json"
    return ElmoConfig.preset(args.size) if options is None else ElmoConfig.from_file(options)


def _vocabulary(args: argparse.Namespace) -> Any:
    """Words that are given, or those of the model that is gone on with; None where the text's are counted."""
    from ..training.pretraining.bilm_corpus import read_vocabulary

    if args.vocab is not None:
        return read_vocabulary(args.vocab)
    stored = None if args.init_from is None else Path(args.init_from) / "vocabulary.txt"
    return read_vocabulary(stored) if stored is not None and stored.is_file() else None


def _settings(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What a run that is gone on with must have been started with."""
    return {
        "command": _WHO,
        "text": [str(file) for file in args.text],
        "held_out": args.held_out,
        "sha256": loop_options.digests(args, "text", "held_out", "vocab"),
        "model": config.to_dict(),
        "vocabulary": [args.vocab, args.vocab_size, args.min_count],
        "init_from": args.init_from,
        "tokenize": args.tokenize,
        "batch_size": args.batch_size,
        "unroll": args.unroll,
        "negatives": args.negatives,
        "dropout": args.dropout,
        "restart": args.restart,
    }


def _prepare(
    args: argparse.Namespace, max_characters: int, vocabulary: Any, is_first: bool, locks: list[Any], say: Any
) -> tuple[Any, Any]:
    """Both texts as numbers; what one process has written the others read."""
    from ..training.pretraining.bilm_corpus import BiLmCorpus
    from ..training.pretraining.prepared import hold

    data = Path(args.output) / "data"
    if is_first:
        locks.append(hold(data))
    common = {"tokenize": args.tokenize, "max_characters": max_characters, "say": say}
    sizes = {"vocabulary_size": args.vocab_size, "min_count": args.min_count}
    corpus = BiLmCorpus.prepare(data / "train", args.text, vocabulary, **sizes, **common)
    if args.held_out is None:
        return corpus, None
    return corpus, BiLmCorpus.prepare(data / "held_out", [args.held_out], corpus.vocabulary, **common)


def _task(args: argparse.Namespace, corpus: Any, config: Any, held_out: Any) -> Any:
    from ..training.pretraining.bilm_task import BiLmPretraining

    task = BiLmPretraining(
        corpus,
        config,
        held_out=held_out,
        batch_size=args.batch_size,
        unroll=args.unroll,
        negatives=args.negatives,
        dropout=args.dropout,
        restart=args.restart,
        scale_by_unroll=args.optimizer == "adagrad",
        seed=args.seed,
        impl=args.impl,
    )
    if args.init_from is not None:
        task.start_from(Path(args.init_from))
    return task


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be seen before any text is read."""
    if args.init_from is not None and not (Path(args.init_from) / "options.json").is_file():
        raise FileNotFoundError(
            f"ctxfast.{_WHO}: --init-from {args.init_from} has no options.json; expected a folder with it and "
            "the model's weights."
        )
    for name, least in (("unroll", 1), ("negatives", 0), ("min_count", 1), ("vocab_size", 4)):
        value = getattr(args, name)
        if value is not None and value < least:
            shown = name.replace("_", "-")
            raise ValueError(f"ctxfast.{_WHO}: --{shown} is {value}; expected {least} or more.")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"ctxfast.{_WHO}: --dropout is {args.dropout}; expected a probability, 0 <= p < 1.")
    if not 0 <= args.restart <= 1:
        raise ValueError(f"ctxfast.{_WHO}: --restart is {args.restart}; expected a probability, 0 <= p <= 1.")
    if args.vocab_size is not None and args.negatives >= args.vocab_size:
        raise ValueError(
            f"ctxfast.{_WHO}: --negatives is {args.negatives}; expected fewer than the {args.vocab_size} words of "
            "--vocab-size, or 0 for a full softmax."
        )
    if args.vocab is not None and (args.vocab_size is not None or args.min_count != 1):
        raise ValueError(
            f"ctxfast.{_WHO}: --vocab-size or --min-count is given with --vocab, which has its words; leave it out."
        )

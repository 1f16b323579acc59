# SPDX-License-Identifier: Apache-2.0
"""``ctxfast pretrain bert``: masked words and sentence relations from text."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from . import loop_options, progress

_WHO = "pretrain bert"
_HELP = """\
Pretrain a BERT on text: a sentence or paragraph a line, a blank line between documents (plain, .gz, .xz).

DIR/final holds config.json, model.safetensors and the tokenizer, as Hugging Face lays them out. Prepared sequences lie
in DIR/data. Killed, the same command goes on, while preparing and while training.

  ctxfast pretrain bert wiki.txt -o run --train-vocab 30000 --size base --steps 100000 --batch-size 256
  ctxfast pretrain bert news.txt -o run2 --init-from run/final --masking phrase --gazetteer terms.txt --epochs 3

Pairs need sentences: pass --split-sentences where a line is a paragraph.

masking: which tokens are predicted together
  token, word              BERT's: single pieces, or the pieces of a word
  phrase, entity           ERNIE's: spans of --gazetteer, --spans, --segmented, --jieba
  token=1,phrase=2,...     each sequence draws one, with these weights
"""
# Half of the pairs should be wrong. Where lines are long, there is nothing to follow, and nearly all of them are.
_MOST_WRONG = 0.75
# Each holds a shard's sequences in memory, some 700 MB; --workers asks for more.
_MOST_WORKERS = 8
_LEVELS = ("token", "word", "phrase", "entity")


def add(commands: Any) -> None:
    """Add the command to ``ctxfast pretrain``."""
    parser = commands.add_parser(
        "bert",
        help="BERT: masked words, sentence relations, phrases and entities",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="+", metavar="TEXT", help="text files")
    add("--split-sentences", action="store_true", help="lines are paragraphs: split them by simple rules")
    add("--held-out", metavar="FILE", help="text to judge by")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--vocab", metavar="PATH", help="vocab.txt, tokenizer.json, or a model's folder or package")
    add("--train-vocab", type=int, metavar="N", help="make a WordPiece vocabulary of N tokens from the text")
    add("--cased", action="store_true", help="--train-vocab: keep case and accents")
    add(
        "--init-from",
        metavar="MODEL",
        help="start from a BERT (folder, Google checkpoint, package), with its vocabulary",
    )
    add("--size", help="tiny, mini, small, medium, base or large")
    add("--config", metavar="FILE", help="config.json with the model's sizes")
    group = parser.add_argument_group("sequences")
    add = group.add_argument
    add(
        "--pairs",
        default="next",
        help="next (BERT's, default), order (swapped or not), none, dialogue (lines: speaker<TAB>turn)",
    )
    add("--relation-sign", default="google", help="label 1 is: google: a wrong pair (default), ernie: a right one")
    add("--max-seq-length", type=int, metavar="N", default=128, help="tokens of a sequence (%(default)s)")
    add("--short-seq-prob", type=float, default=0.1, help="share of passes that aim at shorter ones (%(default)s)")
    add("--dupe-factor", type=int, metavar="N", default=10, help="passes over the text (%(default)s)")
    add("--prepare-only", action="store_true", help="stop when the sequences are written; do so before torchrun")
    add("--data-seed", type=int, metavar="N", default=12345, help="of sequences and masks (%(default)s)")
    add("--shard-mb", type=float, default=4.0, help="megabytes of text prepared at once (%(default)s)")
    add("--workers", type=int, metavar="N", help="processes that prepare (as many as cores, 8 at most)")
    group = parser.add_argument_group("masking")
    add = group.add_argument
    add("--masking", default="token", help="token (default), word, phrase, entity, or weights, see above")
    add("--dynamic", action="store_true", help="draw masks anew each epoch; else once for each pass over the text")
    add("--mask-rate", type=float, default=0.15, help="share that is masked (%(default)s)")
    add("--mask-count", default="tokens", help="share of what: tokens (default), spans, each (phrases and entities)")
    add("--mask-together", action="store_true", help="a phrase's pieces share one draw of [MASK], kept, random")
    add("--max-predictions", type=int, metavar="N", help="masked tokens of a sequence (20 for 128 tokens)")
    add("--gazetteer", action="append", default=[], metavar="FILE", help="phrases or names, one a line (before a tab)")
    add(
        "--spans",
        action="append",
        default=[],
        metavar="FILE",
        help="spans: line of all TEXT and --held-out, start, end, kind by tabs",
    )
    add("--segmented", action="store_true", help="words of the text stand between spaces (Chinese, too)")
    add("--jieba", action="store_true", help="find words of Chinese text by jieba")
    loop_options.add(parser, learning_rate=1e-4, warmup=0.01, batch_size=32)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepare the text, train, write the model."""
    loop_options.check_output(args, _WHO, "text", "held_out", "config", "gazetteer", "spans", "vocab", "init_from")
    loop_options.check_directory(args, _WHO)
    if not args.prepare_only:
        from ..models.bert.modeling import Bert

        loop_options.check(args, _WHO)
        loop_options.check_impl(args, _WHO, (*Bert.ops, "linear_cross_entropy"))
    _check(args)
    from ..training.loop.checkpoints import check_settings
    from ..training.loop.parallel import join

    recipe = _recipe(args)
    sources, sources_name = _sources(args)
    settings = _settings(args, recipe, sources_name)
    if not args.overwrite:
        check_settings(args.output, settings)
    group = join(args.parallel, args.device)
    say = None if args.quiet or not group.is_first else partial(progress.say, _WHO)
    locks: list[Any] = []  # held to the end: another command must not prepare what this one reads
    prepare = partial(_prepare, args, recipe, sources, sources_name, group.is_first, locks, say)
    with loop_options.preparing(args, _WHO):
        tokenizer, corpus, held_out = group.after_first(prepare)
    if args.prepare_only:
        return 0
    task = _task(args, tokenizer, corpus, held_out, say)
    steps = args.steps or task.batches.steps(args.epochs, args.accumulate, group.ranks)
    if say is not None:
        _describe(args, task, corpus, steps, say)
    loop = loop_options.config(args, steps, best="-loss" if held_out is not None else None)
    settings["model"] = task.model.config.to_dict()
    loop_options.run(args, _WHO, task, loop, settings)
    group.leave()
    return 0


def _recipe(args: argparse.Namespace) -> Any:
    """How sequences are made of text."""
    from ..training.pretraining.bert_corpus import Recipe
    from ..training.pretraining.bert_instances import PairOptions
    from ..training.pretraining.bert_task import sized_config
    from ..training.pretraining.knowledge_masking import KnowledgeMasking

    if args.size is not None:
        sized_config(args.size, 1)  # refuses a name that it does not know
    levels = _levels(args.masking)
    most = args.max_predictions
    if most is None:
        most = max(1, round(args.max_seq_length * args.mask_rate * 1.04))
    options = PairOptions(
        max_seq_length=args.max_seq_length,
        short_seq_prob=args.short_seq_prob,
        dupe_factor=args.dupe_factor,
        masked_lm_prob=args.mask_rate,
        max_predictions_per_seq=most,
        do_whole_word_mask=set(levels) == {"word"},
    )
    knowledge = None
    if _needs_knowledge(args, levels):
        knowledge = KnowledgeMasking(levels, args.mask_rate, args.mask_count, args.mask_together, args.max_predictions)
    shard_bytes = round(args.shard_mb * (1 << 20))
    return Recipe(args.pairs, options, knowledge, args.dynamic, args.data_seed, shard_bytes, args.split_sentences)


def _judging(recipe: Any) -> Any:
    """The recipe of held-out text: the same masks whatever is trained."""
    options = dataclasses.replace(recipe.options, dupe_factor=1, do_whole_word_mask=False)
    return dataclasses.replace(recipe, options=options, knowledge=None, is_dynamic=False)


def _settings(args: argparse.Namespace, recipe: Any, sources_name: Any) -> dict[str, Any]:
    """What a run that is gone on with must have been started with."""
    from .._core.digests import digest

    own = ("text", "held_out", "vocab", "train_vocab", "cased", "init_from", "pairs", "relation_sign", "batch_size")
    settings = {"command": _WHO, **{name: getattr(args, name) for name in own}}
    settings |= {"recipe": dataclasses.asdict(recipe), "sources": sources_name}
    settings["sha256"] = loop_options.digests(args, "text", "held_out")
    if args.vocab is not None:
        files = loop_options.tokenizer_files(args.vocab, _WHO, "--vocab")
        settings["sha256"]["vocab"] = {file.name: digest(file) for file in files}
    return settings


def _prepare(
    args: argparse.Namespace,
    recipe: Any,
    sources: list[Any],
    sources_name: Any,
    is_first: bool,
    locks: list[Any],
    say: Any,
) -> tuple[Any, Any, Any]:
    """The tokenizer and the sequences of both texts; what one process has written the others read."""
    from ..training.pretraining.bert_corpus import BertCorpus
    from ..training.pretraining.prepared import hold

    data = Path(args.output) / "data"
    if is_first:
        locks.append(hold(data))
    tokenizer = _tokenizer(args, data, say)
    found = []
    held_out = None if args.held_out is None else [args.held_out]
    for name, files, how in (("train", args.text, recipe), ("held_out", held_out, _judging(recipe))):
        if files is None:
            found.append(None)
            continue
        corpus = BertCorpus.prepare(
            data / name,
            files,
            tokenizer,
            how,
            sources=sources,
            sources_name=sources_name,
            say=None if say is None else partial(_say_of, say, name),
            workers=args.workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS),
        )
        found.append(corpus)
    return tokenizer, *found


def _model_config(args: argparse.Namespace, tokenizer: Any, say: Any) -> Any:
    """Sizes of a new model; None where an old one is gone on with."""
    from ..models.bert.config import BertConfig
    from ..training.pretraining.bert_task import sized_config

    if args.init_from is not None:
        return None
    if args.config is None:
        return sized_config(args.size or "base", tokenizer.vocab_size, max(512, args.max_seq_length))
    config = BertConfig.from_json_file(args.config)
    if say is not None and config.vocab_size != tokenizer.vocab_size:
        say(f"note: vocab_size is {tokenizer.vocab_size}, the vocabulary's, not {config.vocab_size}")
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size)


def _task(args: argparse.Namespace, tokenizer: Any, corpus: Any, held_out: Any, say: Any) -> Any:
    from ..training.pretraining.bert_task import BertPretraining

    return BertPretraining(
        corpus,
        tokenizer,
        _model_config(args, tokenizer, say),
        init_from=args.init_from,
        held_out=held_out,
        has_entities=bool(args.gazetteer or args.spans),
        batch_size=args.batch_size,
        relation_sign=args.relation_sign,
        seed=args.seed,
        impl=args.impl,
    )


def _describe(args: argparse.Namespace, task: Any, corpus: Any, steps: int, say: Any) -> None:
    """Say what is trained, and what looks odd about it."""
    parameters = sum(value.numel() for value in task.model.parameters())
    say(f"{len(corpus):,} sequences, {corpus.tokens:,} tokens; {parameters:,} parameters; {steps:,} steps")
    if (share := corpus.wrong_share) > _MOST_WRONG:
        way = "" if args.split_sentences else "--split-sentences, "
        say(
            f"note: {100 * share:.0f} % of second segments come from elsewhere, as lines fill sequences alone; "
            f"{way}longer sequences or --pairs order help"
        )


def _needs_knowledge(args: argparse.Namespace, levels: dict[str, float]) -> bool:
    """Whether masks are beyond BERT's own: spans, or words that are not the tokenizer's."""
    if set(levels) & {"phrase", "entity"} or len(levels) > 1:
        return True
    return set(levels) == {"word"} and bool(args.segmented or args.jieba or args.spans)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be seen before any text is read."""
    who = f"ctxfast.{_WHO}"
    loop_options.check_files(args, _WHO, "text", "held_out", "config", "gazetteer", "spans")
    loop_options.check_model(args.init_from, _WHO, "--init-from")
    if not 0 < args.mask_rate <= 1:
        raise ValueError(f"{who}: --mask-rate is {args.mask_rate}; expected above 0, at most 1.")
    if not 0 < args.shard_mb < math.inf:
        raise ValueError(f"{who}: --shard-mb is {args.shard_mb}; expected a number above 0.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"{who}: --workers is {args.workers}; expected 1 or more.")
    if args.data_seed < 0:
        raise ValueError(f"{who}: --data-seed is {args.data_seed}; expected 0 or more.")
    given = [name for name in ("vocab", "train_vocab", "init_from") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"{who}: {' and '.join('--' + name.replace('_', '-') for name in given) or 'nothing'} gives the "
            "vocabulary; expected one of --vocab, --train-vocab, --init-from (whose vocabulary is the model's)."
        )
    if args.vocab is not None:
        loop_options.tokenizer_files(args.vocab, _WHO, "--vocab")
    if args.init_from is not None and (args.size or args.config):
        raise ValueError(f"{who}: --size or --config is given with --init-from, which has its sizes; leave it out.")
    if args.size and args.config:
        raise ValueError(f"{who}: --size and --config are both given; expected one of them.")
    _check_length(args)
    levels = _levels(args.masking)
    needs_spans = set(levels) & {"phrase", "entity"}
    if needs_spans and not (args.gazetteer or args.spans or args.segmented or args.jieba):
        raise ValueError(
            f"{who}: masking is {args.masking!r} and nothing finds {' or '.join(sorted(needs_spans))} spans; pass "
            "--gazetteer, --spans, --segmented or --jieba."
        )
    if (args.mask_together or args.mask_count != "tokens") and not _needs_knowledge(args, levels):
        raise ValueError(
            f"{who}: --mask-together or --mask-count is given with BERT's own masks (--masking {args.masking}); "
            "expected phrases, entities, a mix, or words of --segmented, --jieba or --spans."
        )
    if args.max_predictions is not None and args.max_predictions < 1:
        raise ValueError(f"{who}: --max-predictions is {args.max_predictions}; expected 1 or more.")
    if args.spans and (args.split_sentences or args.pairs == "dialogue"):
        other = "--split-sentences" if args.split_sentences else "--pairs dialogue"
        raise ValueError(f"{who}: --spans is given with {other}; expected one of them, as spans are of whole lines.")


def _check_length(args: argparse.Namespace) -> None:
    """Refuse sequences that the model has no positions for, if its sizes are in a file."""
    from ..models.bert.config import BertConfig
    from ..models.bert.weights import resolve_model

    file = Path(args.config) if args.config is not None else None
    if args.init_from is not None:
        file = resolve_model(args.init_from) / "config.json"
    if file is None or not file.is_file():
        return
    longest = BertConfig.from_json_file(file).max_length
    if args.max_seq_length > longest:
        raise ValueError(
            f"ctxfast.{_WHO}: --max-seq-length is {args.max_seq_length}; expected at most the {longest} positions of "
            f"{file}."
        )


def _levels(text: str) -> dict[str, float]:
    """``--masking`` as weights of levels."""
    levels: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        if name.strip() in levels:
            raise ValueError(f"ctxfast.{_WHO}: masking names {name.strip()!r} twice; expected each level once.")
        try:
            levels[name.strip()] = float(weight or 1)
        except ValueError:
            raise ValueError(f"ctxfast.{_WHO}: masking has {part!r}; expected LEVEL or LEVEL=WEIGHT.") from None
        if not 0 < levels[name.strip()] < math.inf:
            raise ValueError(f"ctxfast.{_WHO}: masking has {part!r}; expected a weight above 0.")
    if unknown := [name for name in levels if name not in _LEVELS]:
        raise ValueError(f"ctxfast.{_WHO}: masking has {unknown[0]!r}; expected some of {', '.join(_LEVELS)}.")
    return levels


def _tokenizer(args: argparse.Namespace, data: Path, say: Any) -> Any:
    from ..models.bert.tokenization import BertTokenizer
    from ..training.pretraining.vocabulary import train_wordpiece

    if args.train_vocab is None:
        return BertTokenizer.from_pretrained(args.vocab or args.init_from)
    return train_wordpiece(data / "tokenizer", args.text, args.train_vocab, is_cased=args.cased, say=say)


def _sources(args: argparse.Namespace) -> tuple[list[Any], Any]:
    """What finds spans, and plain values that tell these sources from others."""
    from ..training.pretraining.knowledge_spans import ChineseWords, Gazetteer, SegmentedText, SpanFile

    sources: list[Any] = [Gazetteer.from_file(file, "phrase") for file in args.gazetteer]
    sources += [Gazetteer.from_file(file, "entity") for file in args.gazetteer]
    sources += [SpanFile(file, [*args.text, *([args.held_out] if args.held_out else [])]) for file in args.spans]
    sources += [SegmentedText()] if args.segmented else []
    sources += [ChineseWords()] if args.jieba else []
    name: dict[str, Any] = {
        kind: [*found.values()] for kind, found in loop_options.digests(args, "gazetteer", "spans").items()
    }
    return sources, name | {"segmented": args.segmented, "jieba": args.jieba}


def _say_of(say: Any, name: str, text: str) -> None:
    say(text if name == "train" else f"held-out text, {text}")

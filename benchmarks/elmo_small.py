# SPDX-License-Identifier: Apache-2.0
"""What ctxfast-elmo-small was trained on and is good for: ``python -m benchmarks.elmo_small --made DIR``.

DIR is that of ``examples/elmo_small.py``: words read, time, held-out perplexities. Entities of WNUT-17: the same
biLSTM-CRF over the model's frozen layers, over those of random weights, and over a character CNN trained with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import random_weights, save_weights
from ctxfast.models.packaged import packaged_model

from . import documented

MODEL = "ctxfast-elmo-small"
# What a tagger reads -> options of ``ctxfast finetune tag``.
TAGGERS = {
    MODEL: ["-m", MODEL, "--features", "mix"],
    "random weights": ["-m", "{random}", "--features", "mix"],
    "a character CNN, trained": ["--words", "chars"],
}
OPTIONS = "--crf --epochs 15 --lr 5e-3 --lstm-hidden 128 --batch-size 16".split()


def _ctxfast(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ctxfast", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def best_f1(run: Path) -> float:
    """The highest F1 of a run's evaluations."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return max(line["f1"] for line in lines if line["kind"] == "eval")


def tag(train: Path, dev: Path, seeds: int) -> list[dict[str, Any]]:
    """A row for each tagger: its best F1 on ``dev``, by seed."""
    folder = packaged_model(MODEL)
    assert folder is not None
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        config, place = ElmoConfig.from_file(folder / "options.json"), Path(temporary) / "random"
        place.mkdir()
        save_weights(random_weights(config, 0), config, place / "options.json", place / "weights.hdf5")
        for number, (name, options) in enumerate(TAGGERS.items()):
            reads = [place if word == "{random}" else word for word in options]
            found = []
            for seed in range(seeds):
                run = Path(temporary) / f"{number}-{seed}"
                _ctxfast("finetune", "tag", *reads, *OPTIONS, "--train", train, "--dev", dev, "--seed", seed, "-o", run)
                found.append(round(best_f1(run), 4))
            rows.append({"reads": name, "options": options, "f1": found})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def training(made: Path) -> dict[str, Any]:
    """What the recipe's folder says of the run."""
    figures = json.loads((made / "figures.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (made / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    course = [
        (line["step"], line["perplexity_warm"], line["perplexity_zero"]) for line in lines if line["kind"] == "eval"
    ]
    return {**figures, "course": course}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result file's content."""
    before = {} if args.made else RESULT.load()
    return {
        **documented.taken(),
        "training": training(args.made) if args.made else before["training"],
        "files": [args.train.name, args.dev.name],
        "options": OPTIONS,
        "rows": tag(args.train, args.dev, args.seeds),
    }


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    made, held_out = found["training"], found["training"]["held_out"]
    train, dev = found["files"]
    seeds = len(found["rows"][0]["f1"])
    lines = [
        f"{documented.where(found)}.",
        "",
        "| words read | stored | held-out perplexity | forward | backward |",
        "|---:|---:|---|---:|---:|",
    ]
    for start, meaning in (("warm", "running text, state carried"), ("zero", "every sentence from zeros")):
        size = f"{made['words_read'] / 1e6:.1f} million | {made['bytes'] / 1e6:.1f} MB"
        lines.append(
            f"| {size if start == 'warm' else ' | '} | {meaning}: **{held_out[f'perplexity_{start}']:.1f}** | "
            f"{held_out[f'perplexity_{start}_forward']:.1f} | {held_out[f'perplexity_{start}_backward']:.1f} |"
        )
    lines += [
        "",
        f"Entities of `{dev}` (trained on `{train}`), the same biLSTM-CRF, `{' '.join(found['options'])}`; best epoch, "
        f"{seeds} seeds:",
        "",
        "| it reads | options | F1, mean | by seed |",
        "|---|---|---:|---|",
    ]
    for row in found["rows"]:
        options = " ".join(row["options"]).replace("{random}", "RANDOM")
        by_seed = ", ".join(f"{f1:.3f}" for f1 in row["f1"])
        lines.append(f"| {row['reads']} | `{options}` | **{np.mean(row['f1']):.3f}** | {by_seed} |")
    return "\n".join(lines) + "\n"


RESULT = documented.Documented("elmo_small", ("docs/elmo_small.md",), table)


def main() -> None:
    """Measure, or write the documentation's table anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elmo_small", description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the table of the documentation, measure nothing")
    parser.add_argument("--made", type=Path, help="folder of examples/elmo_small.py; without it the last result's")
    parser.add_argument("--train", type=Path, default=Path("../shared/data/ner/wnut17_train.tsv"))
    parser.add_argument("--dev", type=Path, default=Path("../shared/data/ner/wnut17_dev.tsv"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if not args.docs:
        RESULT.save(measure(args))
    RESULT.write_pages()


if __name__ == "__main__":
    main()

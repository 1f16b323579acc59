# SPDX-License-Identifier: Apache-2.0
"""How the model in the box, ``ctxfast-elmo-small``, is made: open texts, ``ctxfast pretrain elmo``, half precision.

    python examples/elmo_small.py TEXTS -o DIR [--steps 47000]

TEXTS is a folder with en_openstax.txt.xz (textbooks), en_presidential.txt.xz (speeches), en_eltec.txt.xz (novels): a
paragraph a line, a blank line between documents; and en_wordnet_glosses.tsv.xz: a word, a tab, its gloss. Every 40th
document of the textbooks is held out. An epoch reads textbooks and glosses three times, speeches twice, novels once.

DIR/ctxfast-elmo-small is the model, DIR/figures.json says what was read and how well the stored weights predict the
held-out text. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.training.pretraining.bilm_corpus import BiLmCorpus
from ctxfast.training.pretraining.bilm_task import BiLmPretraining

NAME = "ctxfast-elmo-small"
# Times that a text stands in an epoch.
MIX = {"textbooks": 3, "glosses": 3, "speeches": 2, "novels": 1}
HELD_OUT = 40
CONFIG = ElmoConfig(
    projection_dim=128,
    cell_size=512,
    num_layers=2,
    filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)),
    char_embedding_dim=16,
    num_highways=1,
    cell_clip=3.0,
    proj_clip=3.0,
)


def documents(path: Path) -> Iterator[str]:
    """Documents of a text, paragraphs a line."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from (text for text in file.read().split("\n\n") if text.strip())


def glosses(path: Path) -> Iterator[str]:
    """Definitions and examples of words, without the words themselves: each is a document."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from (line.split("\t")[1] for line in file if "\t" in line)


def write_texts(texts: Path, folder: Path) -> None:
    """Plain text for the command, a file a kind, unless they are there."""
    if (folder / "held_out.txt").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, parts: Iterable[str]) -> None:
        whole = "\n\n".join(part.strip("\n") for part in parts) + "\n"
        (folder / f"{name}.txt").write_text(whole, encoding="utf-8")

    textbooks = list(documents(texts / "en_openstax.txt.xz"))
    write("textbooks", (text for number, text in enumerate(textbooks, 1) if number % HELD_OUT))
    write("glosses", glosses(texts / "en_wordnet_glosses.tsv.xz"))
    write("speeches", documents(texts / "en_presidential.txt.xz"))
    write("novels", documents(texts / "en_eltec.txt.xz"))
    write("held_out", textbooks[HELD_OUT - 1 :: HELD_OUT])


def ctxfast(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ctxfast", *map(str, words)], check=True)


def judge(run: Path, model: Path) -> dict[str, float]:
    """Held-out perplexities of stored weights, by the output layer that was trained with them."""
    corpus, held_out = (BiLmCorpus(run / "data" / name) for name in ("train", "held_out"))
    task = BiLmPretraining(corpus, CONFIG, held_out=held_out, batch_size=64, negatives=0)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(shutil.copytree(model, Path(temporary) / "model"))
        for name in ("softmax.safetensors", "vocabulary.txt"):
            shutil.copy(run / "best" / name, whole)
        task.start_from(whole)
    task.model.eval()
    return task.evaluate(task.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=47_000, help="of 64 lanes and 20 words (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=20_000, help="words of the output layer (%(default)s)")
    parser.add_argument("--negatives", type=int, default=2_048, help="words of the sampled softmax (%(default)s)")
    parser.add_argument("--amp", default="auto", help="precision to train in, see ctxfast pretrain elmo")
    args = parser.parse_args()
    texts, run, model = (args.output / name for name in ("texts", "run", NAME))
    write_texts(args.texts, texts)
    CONFIG.save(args.output / "options.json")
    files = [texts / f"{name}.txt" for name, times in MIX.items() for _ in range(times)]
    ctxfast(
        *("pretrain", "elmo", *files, "--tokenize", "--held-out", texts / "held_out.txt", "-o", run),
        *("--options", args.output / "options.json", "--vocab-size", args.vocab_size, "--negatives", args.negatives),
        *("--batch-size", 64, "--steps", args.steps, "--schedule", "linear", "--amp", args.amp),
        *("--eval-every", max(1, args.steps // 20), "--log-every", 100),
    )
    ctxfast("convert", run / "best", model, "--dtype", "float16", "--overwrite")
    figures = {
        "words_read": args.steps * 64 * 20,
        "bytes": sum(file.stat().st_size for file in model.iterdir()),
        "held_out": judge(run, model),
    }
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

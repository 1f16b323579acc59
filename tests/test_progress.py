# SPDX-License-Identifier: Apache-2.0
"""What commands show of how far they are: bars on a terminal, lines in a log, nothing with --quiet."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import sys
from contextlib import redirect_stderr

import pytest
from support.tiny_models import tiny_bert

from ctxfast import cli
from ctxfast._core.progress import watching
from ctxfast.commands import progress
from ctxfast.training.loop.task import Tick
from ctxfast.training.pretraining.text import text_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


FIGURES = {"loss": 2.5, "learning_rate": 1e-3, "steps_per_second": 4.0, "words_per_second": 7300.4}


# Training


def test_lines_of_training(capsys, clock):
    """One a report, with rates and the time that is left; between them one where 30 s were silent."""
    show = progress.Training("pretrain elmo")
    for step in range(1, 9):
        clock[0] += 10
        show.tick(Tick(step, 100, 50, "words", 3.0 - step / 10))
    show.report(8, 100, FIGURES)
    show.report(8, 100, {"perplexity": 12.25})
    show.close()
    assert capsys.readouterr().err.splitlines() == [
        "ctxfast pretrain elmo: step 3 of 100: loss 2.7, 5 words/s, about 16 min left",
        "ctxfast pretrain elmo: step 6 of 100: loss 2.4, 5 words/s, about 16 min left",
        "ctxfast pretrain elmo: step 8 of 100: loss 2.5, 4 steps/s, 7,300 words/s, about 15 min left",
        "ctxfast pretrain elmo: step 8 of 100: perplexity 12.25, about 15 min left",
    ]


def test_bar_of_training():
    """Loss, rate and time left with every step; on a GPU, which is not waited for, the loss of the last report."""
    show = progress.Training("finetune tag")
    with redirect_stderr(Terminal()) as terminal:
        show.tick(Tick(1, 4, 7, "tokens", 3.0))
        show.tick(Tick(2, 4, 7, "tokens", 2.0))
        show.report(2, 4, {"f1": 0.75})
        show.report(2, 4, FIGURES)
        for step in (3, 4):
            show.tick(Tick(step, 4, 7, "tokens", None))
        show.close()
    shown = terminal.getvalue()
    assert "ctxfast finetune tag: step 2 of 4: f1 0.75" in shown and "steps/s" not in shown
    last = re.split(r"[\r\n]", shown.strip())[-1]
    assert re.search(r"ctxfast finetune tag: 100%\|.*\| 4/4 \[.*<.*, loss 2.5, [\d,]+ tokens/s\]", last), last


# Preparation


def test_lines_of_reading(capsys, clock):
    show = progress.Reading("pretrain bert")
    for done in range(0, 101, 10):
        show("reading wiki.txt", done, 100)
        clock[0] += 10
    show("reading other.txt", 50, 100)
    show.close()
    assert capsys.readouterr().err.splitlines() == [
        "ctxfast pretrain bert: reading wiki.txt: 30 %, about 70 s left",
        "ctxfast pretrain bert: reading wiki.txt: 60 %, about 40 s left",
        "ctxfast pretrain bert: reading wiki.txt: 90 %, about 10 s left",
    ]


def test_bar_of_reading(monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0)
    show = progress.Reading("pretrain bert")
    with redirect_stderr(Terminal()) as terminal:
        show("reading wiki.txt", 500, 1000)
        progress.say("pretrain bert", "shard 1")
        show("reading wiki.txt", 1000, 1000)
        show("reading dev.txt", 3, 4)
        show.close()
    shown = terminal.getvalue()
    for text in ("reading wiki.txt:  50%", "500/1.00k", "ctxfast pretrain bert: shard 1\n", "reading dev.txt:   0%"):
        assert text in shown


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_reading_is_told_in_bytes_of_the_file(tmp_path, suffix, pack):
    """Of packed files as they are on the disk: how much text is in them is not known before."""
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(b"".join(b"line %d\n" % (k * 7919) for k in range(3000))))
    told = []
    with watching(lambda *words: told.append(words)):
        assert len(list(text_lines(path))) == 3000
    size = path.stat().st_size
    assert len(told) > 10 and {(what, total) for what, _, total in told} == {(f"reading {path.name}", size)}
    done = [done for _, done, _ in told]
    assert done == sorted(done) and 0 < done[0] <= size == done[-1]
    told.clear()
    list(text_lines(path))
    assert told == []


# Commands


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat\n\na dog ran to the cat and sat\n" * 40)
    return path


def _elmo(text, folder, *more):
    options = {
        "lstm": {"use_skip_connections": True, "projection_dim": 4, "cell_clip": 3, "proj_clip": 3, "dim": 8,
                 "n_layers": 1},
        "char_cnn": {"activation": "relu", "filters": [[1, 4], [2, 4]], "n_highway": 1, "embedding": {"dim": 4},
                     "n_characters": 262, "max_characters_per_token": 50},
    }  # fmt: skip
    (folder / "options.json").write_text(json.dumps(options))
    small = ("--options", folder / "options.json", "--batch-size", 2, "--unroll", 5, "--negatives", 0)
    return run("pretrain", "elmo", text, "-o", folder / "run", *small, "--steps", 4, "--log-every", 2, *more)


def _tag(text, folder, *more):
    (folder / "a.tsv").write_text("the\tO\nboat\tB-x\n\n" * 8)
    model = tiny_bert(folder / "bert", layers=1)
    small = ("--batch-size", 2, "--steps", 4, "--log-every", 2, "--device", "cpu")
    return run("finetune", "tag", "-m", model, "--train", folder / "a.tsv", "-o", folder / "run", *small, *more)


# Two lanes of five words; two texts of two words, [CLS] and [SEP].
@pytest.mark.parametrize(
    "command, who, unit, size", [(_elmo, "pretrain elmo", "words", 10), (_tag, "finetune tag", "tokens", 8)]
)
def test_commands_show_it(text, tmp_path, capsys, command, who, unit, size):
    """And write the rate into the log; --quiet says nothing. Another command's directory is refused before work."""
    assert command(text, tmp_path) == 0
    said = capsys.readouterr().err
    assert re.search(rf"ctxfast {who}: step 2 of 4: loss [\d.]+.*, [\d.,]+ {unit}/s, about \d+ \w+ left\n", said), said
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [(entry[f"{unit}_per_second"], entry["steps_per_second"]) for entry in log if entry["kind"] == "train"]
    assert len(rates) == 2 and all(one == pytest.approx(size * other) for one, other in rates)
    assert command(text, tmp_path, "--overwrite", "--quiet") == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")
    for other in ("pretrain bert no.txt --vocab no.txt", "pretrain elmo no.txt", "finetune classify -m no --train no"):
        if not other.startswith(who):
            assert run(*other.split(), "-o", tmp_path / "run", "--steps", 1) == 2
            error = capsys.readouterr().err
            named = " ".join(other.split()[:2])
            assert f"run holds a run of {who}, and this is one of {named}. " in error and error.count("\n") == 1


def test_a_bar_for_a_real_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_DELAY", 0)
    with redirect_stderr(Terminal()) as terminal:
        assert _elmo(text, tmp_path) == 0
    shown = terminal.getvalue()
    assert "reading text.txt:   0%" in shown and re.search(r"4/4 \[.*loss [\d.]+, [\d,]+ words/s\]", shown)


@pytest.mark.parametrize(
    "module, extra, words",
    [
        ("pyarrow", "parquet", "embed {text} -m no -o o.parquet"),
        ("matplotlib.figure", "plot", "probe -m no --train {text} --dev {text} --plot p.png"),
        ("jieba", "pretrain", "pretrain bert {text} -o run --vocab {text} --masking word --jieba --steps 1"),
        (
            "ahocorasick_rs",
            "pretrain",
            "pretrain bert {text} -o run --vocab {text} --masking phrase --gazetteer {text} --steps 1",
        ),
        ("nervaluate", "finetune", "finetune tag -m no --train {text} --dev {text} -o run"),
        ("torchmetrics.functional.classification", "finetune", "finetune pair -m no --train {text} --dev {text} -o r"),
        ("tensorboard", None, "pretrain elmo {text} -o run --steps 1 --tensorboard"),
    ],
)
def test_what_is_not_installed_is_said_before_work(text, tmp_path, monkeypatch, capsys, module, extra, words):
    """There is no model of that name, and the text is no table: neither has been looked at."""
    monkeypatch.chdir(tmp_path)
    package = module.partition(".")[0]
    for name in [module, package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run(*words.format(text=text).split()) == 2
    error = capsys.readouterr().err
    named = package.replace("_", "-")
    line = named if extra is None else f"'ctxfast[{extra}]'"
    assert f"{named} is not installed; expected it for " in error and error.endswith(
        f"Install it: pip install {line}\n"
    )
    assert error.count("\n") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]

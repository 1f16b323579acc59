# SPDX-License-Identifier: Apache-2.0
"""Every example runs and says how long it took and how far its two ways are apart."""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Arguments that make it short, and the largest difference that is rounding.
CASES = {
    "trainer.py": (["--steps", "3", "--batch-size", "4"], 1e-3),
    "search.py": (["--batch-size", "8"], 1e-5),
    "lstm_tagger.py": (["--epochs", "1", "--hidden", "16"], 1e-3),
    "elmo_pipeline.py": (["--steps", "2"], 1e-3),
    "own_model.py": (["--texts", "4", "--longest", "16"], 1e-4),
}


def _output(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=EXAMPLES.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*CASES, "demo.py", "elmo_small.py"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in scripts)


@pytest.mark.parametrize(
    "name", ["own_model.py", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "own_model.py")]
)
def test_it_runs(name, minilm_dir) -> None:
    arguments, bound = CASES[name]
    last = _output(name, *arguments).strip().splitlines()[-1]
    found = re.fullmatch(r"before [\d.]+ s, after [\d.]+ s \([\d.]+x\), largest difference (\S+)", last)
    assert found, last
    assert float(found[1]) < bound, last


@pytest.mark.slow
def test_on_real_data(shared_data, tmp_path, minilm_dir) -> None:
    """The tagger and the search on files of the form they ask for."""
    for name, arguments in (
        ("lstm_tagger.py", ["--data", str(shared_data / "ner" / "wnut17_dev.tsv"), "--epochs", "1", "--hidden", "8"]),
        ("elmo_pipeline.py", ["--options", str(shared_data / "elmo/allennlp_tiny/options.json"), "--weights"]
         + [str(shared_data / "elmo/allennlp_tiny/lm_weights.hdf5")]),
    ):  # fmt: skip
        assert "largest difference" in _output(name, *arguments)


@pytest.mark.slow
def test_the_model_in_the_box_is_made(tmp_path) -> None:
    paragraph = "The bank of the river was steep. Nobody had seen the river rise so high before that spring.\n"
    document = paragraph * 8
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in {
        "en_openstax.txt.xz": "\n".join([document] * 80),
        "en_presidential.txt.xz": document,
        "en_eltec.txt.xz": "\n".join([document] * 2),
        "en_wordnet_glosses.tsv.xz": 'bank\tsloping land; "they sat on the bank"\n' * 20,
    }.items():
        (texts / name).write_bytes(lzma.compress(text.encode()))
    sizes = ("--steps", "4", "--vocab-size", "20", "--negatives", "8")
    found = json.loads(_output("elmo_small.py", str(texts), "-o", str(tmp_path / "made"), *sizes))
    assert found == json.loads((tmp_path / "made" / "figures.json").read_text())
    assert found["words_read"] == 4 * 64 * 20 and found["bytes"] < 12e6
    # Weights rounded to half precision predict as the run's best do.
    log = map(json.loads, (tmp_path / "made" / "run" / "log.jsonl").read_text().splitlines())
    best = min(line["perplexity"] for line in log if line["kind"] == "eval")
    assert found["held_out"]["perplexity"] == pytest.approx(best, rel=0.01)
    assert {file.name for file in (tmp_path / "made" / "ctxfast-elmo-small").iterdir()} == {
        "options.json",
        "steady_state.safetensors",
        "weights.safetensors",
    }
    held_out = (tmp_path / "made" / "texts" / "held_out.txt").read_text()
    assert held_out.count("\n\n") == 1 and "\n\n\n" not in held_out

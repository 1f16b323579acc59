# SPDX-License-Identifier: Apache-2.0
"""``ctxfast probe``: it finds the layer that knows, and says so."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from support.tiny_models import tagged, tiny_bert, tiny_elmo

from ctxfast.cli import main
from ctxfast.embedding.embedder import Embedder
from ctxfast.training.readers.conll import Sentence
from ctxfast.training.tasks import probe as probe_module
from ctxfast.training.tasks.probe import probe


class _Knows:
    """Stands in for the layers of a model: layer 1 holds the tag, the others noise; scales differ."""

    def __init__(self, embedder, features) -> None:
        self.draw = np.random.default_rng(0)

    def __call__(self, texts):
        result = []
        for words in texts:
            layers = self.draw.standard_normal((3, len(words), 6)).astype(np.float32)
            kinds = np.array([int(word) for word in words])
            layers[1, :, :2] += 4 * np.eye(2)[kinds]
            result.append(layers * np.array([1e-3, 5.0, 100.0], dtype=np.float32)[:, None, None])
        return result


@pytest.mark.parametrize("is_spans", [False, True])
def test_it_finds_the_layer_that_knows(monkeypatch, tmp_path, is_spans) -> None:
    monkeypatch.setattr(probe_module, "FrozenLayers", _Knows)
    draw = np.random.default_rng(1)
    tags = ("O", "B-x") if is_spans else ("A", "B")
    data = []
    for _ in range(120):
        kinds = draw.integers(0, 2, 8)
        data.append(Sentence([str(k) for k in kinds], [tags[k] for k in kinds], None, 1))
    embedder = Embedder(tiny_bert(tmp_path / "bert", layers=2))
    report = probe(embedder, data[:90], data[90:], is_spans=is_spans, epochs=8, batch_size=32, learning_rate=1e-2)
    assert report.figure == ("f1" if is_spans else "accuracy")
    assert report.layers[1] > 0.97 and report.mix > 0.95 and report.baseline == 1.0
    assert report.layers[0] < 0.65 and report.layers[2] < 0.65
    assert report.mix_weights[1] > 0.45 and sum(report.mix_weights) == pytest.approx(1.0)
    assert "best layer" in report.table().splitlines()[2]
    assert report.words == (90 * 8, 30 * 8)


def test_it_is_repeatable(tmp_path) -> None:
    embedder = Embedder(tiny_bert(tmp_path / "bert", layers=2))
    data = [Sentence(["bob", "saw", "paris"], ["B-PER", "O", "B-LOC"], None, 1)] * 20
    assert probe(embedder, data, data, epochs=1) == probe(embedder, data, data, epochs=1)


@pytest.mark.parametrize("model", ["bert", "elmo"])
def test_command(tmp_path, capsys, model) -> None:
    folder = tiny_bert(tmp_path / "m", layers=2) if model == "bert" else tiny_elmo(tmp_path / "m")
    for name, seed in (("train", 0), ("dev", 1)):
        (tmp_path / name).write_text(tagged(40, seed))
    argv = ["-m", folder, "--train", tmp_path / "train", "--dev", tmp_path / "dev", "--sentences", 30, "--epochs", 20]
    argv += ["--batch-size", 16, "--lr", 1e-2, "-o", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    assert main(["probe", *map(str, argv), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 6 and "weight in the mix" in table
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["layers"]) == 3 and max(found["layers"]) > (0.8 if model == "bert" else 0.6)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = probe_module.ProbeReport("f1", (0.5, 0.6), 0.7, (0.5, 0.5), 0.4, (1, 1), 2)
    with pytest.raises(RuntimeError, match=r"pip install 'ctxfast\[plot\]'"):
        report.plot(tmp_path / "a.png")


def test_without_matplotlib_nothing_is_computed(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "data").write_text("bob\tO\nsaw\tB-x\n")
    argv = ["-m", tmp_path / "no-model", "--train", tmp_path / "data", "--dev", tmp_path / "data", "--plot", "a.png"]
    assert main(["probe", *map(str, argv)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_vectors_come_in_parts(monkeypatch, tmp_path) -> None:
    """So that the layers of a large file are held once; what is learned is the same."""
    embedder = Embedder(tiny_bert(tmp_path / "bert", layers=2))
    data = [Sentence(["bob", "saw", "paris"][:n], ["B-PER", "O", "B-LOC"][:n], None, 1) for n in (3, 1, 2)] * 7
    whole = probe(embedder, data, data, epochs=1)
    sizes = []
    frozen = probe_module.FrozenLayers.__call__
    monkeypatch.setattr(
        probe_module.FrozenLayers, "__call__", lambda own, texts: sizes.append(len(texts)) or frozen(own, texts)
    )
    monkeypatch.setattr(probe_module, "_SENTENCES", 4)
    assert probe(embedder, data, data, epochs=1).layers == whole.layers
    assert sizes == [4, 4, 4, 4, 4, 1] * 2


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--train", "none"], "--train none does not exist"),
        (["--epochs", "0"], "epochs is 0"),
        (["--lr", "-1"], "lr is -1.0; expected a number above 0"),
        (["--plot", "a.xls"], "--plot is 'a.xls'; expected a name that ends with .png, .svg, .pdf"),
        (["--dev", "unseen"], "unseen, line 2: label 'B-PER' does not occur in the training data"),
        (["--unseen", "odd"], "--unseen is 'odd'; expected 'error' or 'keep'"),
        (["--dev", "unseen", "--unseen", "keep"], "train has 1 tags"),
        (["--scheme", "none"], "train has 1 tags"),
        (["--output", "-"], "--output is '-'; expected the name of a file"),
        (["--output", "data"], "--output data is --train data; expected another place"),
        (["--output", "m/config.json"], "--output m/config.json is a file of the model, m/config.json"),
        (["--plot", "plot.png"], "--plot plot.png is --dev picture"),
    ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, argv, reason) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_bert(tmp_path / "m", layers=1)
    (tmp_path / "data").write_text("bob\tO\n")
    (tmp_path / "unseen").write_text("saw\tO\nbob\tB-PER\n")
    (tmp_path / "picture").write_text("bob\tO\n")
    (tmp_path / "plot.png").symlink_to("picture")
    argv = [*argv, "--dev", "picture"] if "--plot" in argv and "plot.png" in argv else argv
    assert main(["probe", "-m", "m", "--train", "data", "--dev", "data", *argv]) == 2
    assert reason in capsys.readouterr().err

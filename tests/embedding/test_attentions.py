# SPDX-License-Identifier: Apache-2.0
"""``ctxfast attention`` and what it tells of heads."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.tiny_models import tiny_bert, tiny_elmo

from ctxfast.cli import main
from ctxfast.embedding.attentions import PLACES, shares


def test_shares_of_heads_that_look_at_one_place() -> None:
    """[CLS] a b c [SEP]: one head each looks at the token before, itself, the next, [SEP]; one everywhere."""
    places = [np.eye(5, k=-1), np.eye(5), np.eye(5, k=1), np.eye(5)[[4] * 5], np.full((5, 5), 0.2)]
    found = shares(np.stack(places)[None], [True, False, False, False, True])
    wanted = {
        "previous": [1, 0, 0, 0, 0.2],
        "itself": [0, 1, 0, 0, 0.2],
        "next": [0, 0, 1, 1 / 3, 0.2],  # [SEP] comes after c
        "special": [1 / 3, 0, 1 / 3, 1, 0.4],
        "entropy": [0, 0, 0, 0, np.log(5)],
    }
    assert set(PLACES) < set(wanted)
    for place, values in wanted.items():
        np.testing.assert_allclose(found[place][0], values, atol=1e-12, err_msg=place)
    with pytest.raises(ValueError, match="special tokens only"):
        shares(np.eye(2)[None, None], [True, True])


def test_command(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the plot")
    model = str(tiny_bert(tmp_path / "m", layers=2))
    argv = ["attention", "the boat went to paris", "anna saw", "-m", model, "--layers", "2"]
    assert main([*argv, "-o", str(tmp_path / "a.json"), "--plot", str(tmp_path / "new" / "heads.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = json.loads((tmp_path / "a.json").read_text())
    weights = np.array(made["weights"])
    assert lines[0].split() == made["tokens"] and made["tokens"][0] == "[CLS]" and made["tokens"].count("[SEP]") == 2
    layers, heads, length, _ = weights.shape
    assert layers == 2 and len(lines) == 2 + heads and length == len(made["tokens"])
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-4)
    assert all(line.split()[0] == "2" for line in lines[2:])
    assert (tmp_path / "new" / "heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "3"], "--layers is '3'; expected all, or numbers from 1 to 2: 1,2"),
        (["--layers", "x"], "--layers is 'x'"),
        (["--plot", "x.gif"], "--plot is 'x.gif'; expected a name that ends with .png"),
        (["--elmo"], "is an ELMo, which has no attention; expected a BERT"),
    ],
)
def test_what_is_wrong(tmp_path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    if words == ["--elmo"]:
        words, model = [], tiny_elmo(tmp_path / "e")
    else:
        model = tiny_bert(tmp_path / "m", layers=2)
    assert main(["attention", "a boat", *words, "-m", str(model)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctxfast.attention") and message in error, error

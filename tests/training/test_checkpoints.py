# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: kills at every step, damage, refusals."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from support.kills import run_until
from test_loop import Line, config

from ctxfast.training.loop.checkpoints import RunDirectory, check_settings
from ctxfast.training.loop.train import train


def run(folder: Path, **options: object) -> None:
    train(Line(), config(steps=4, eval_every=2, save_every=2, best="-error", keep=1), folder, **options)


def content(folder: Path) -> dict[str, object]:
    """Names, and what is in the models."""
    found = {str(path.relative_to(folder)): None for path in folder.rglob("*") if path.is_file()}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    models = {name: torch.load(folder / name / "model.pt") for name in ("best", "final")}
    return {"names": sorted(found), "steps": [line["step"] for line in log], "models": str(models)}


@pytest.mark.parametrize("overwrite", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_at_every_step(tmp_path, monkeypatch, overwrite) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    run(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    step, seen = 0, []
    while seen is not None:
        folder = tmp_path / f"run{step}"
        if overwrite:
            run(folder)
        seen = run_until(step, partial(run, folder, overwrite=overwrite))
        if seen is not None:
            run(folder, overwrite=overwrite)
        assert content(folder) == whole, (step, seen)
        step += 1
        if overwrite and step == 25:  # an earlier run is removed by then
            assert sum(name.startswith(("unlink", "rmdir")) for name in seen) > 10
            return
    assert step > 40


def damaged_log(folder: Path) -> Path:
    file = folder / "log.jsonl"
    file.write_text("[1, 2]\n" + file.read_text())
    return file


def checkpoint(change) -> object:
    def damage(folder: Path) -> Path:
        (file,) = folder.glob("checkpoint-*")
        change(file)
        return file

    return damage


def other_names(file: Path) -> None:
    state = torch.load(file)
    torch.save({**state, "model": {f"x.{name}": value for name, value in state["model"].items()}}, file)


def other_shapes(file: Path) -> None:
    state = torch.load(file)
    torch.save({**state, "model": {name: value[:0] for name, value in state["model"].items()}}, file)


def noted(text: str) -> object:
    def damage(folder: Path) -> Path:
        (folder / "config.json").write_text(text)
        return folder / "config.json"

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damaged_log,
        checkpoint(lambda file: file.write_bytes(b"")),
        checkpoint(lambda file: file.write_bytes(file.read_bytes()[:500])),
        checkpoint(lambda file: torch.save([1, 2], file)),
        checkpoint(lambda file: torch.save({"step": 4}, file)),
        checkpoint(lambda file: torch.save({**torch.load(file), "step": "4"}, file)),
        checkpoint(lambda file: torch.save({**torch.load(file), "ranks": []}, file)),
        checkpoint(lambda file: torch.save({**torch.load(file), "optimizer": {}}, file)),
        checkpoint(other_names),
        checkpoint(other_shapes),
        noted(""),
        noted("[]"),
        noted('{"loop": [], "settings": {}}'),
        noted('{"loop": ' + "[" * 100_000),
        noted('{"loop": {}, "settings": {"x": ' + "9" * 5000 + "}}"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, damage) -> None:
    run(tmp_path)
    file = damage(tmp_path)
    with pytest.raises(ValueError, match=rf"^ctxfast\.training: .*{file.name}"):
        run(tmp_path)


def test_a_log_ends_with_half_a_line_at_most(tmp_path) -> None:
    run(tmp_path)
    text = (tmp_path / "log.jsonl").read_text()
    for half in ('{"st', '{"step": 7}', "\x00\x00", "[" * 100_000):
        (tmp_path / "log.jsonl").write_text(text + half)
        run(tmp_path)
        assert (tmp_path / "log.jsonl").read_text() == text


def test_a_refusal_is_short_and_says_what_run_stands_there(tmp_path) -> None:
    settings = {"command": "finetune tag", "data": "a", **{f"name{k}": k for k in range(20)}}
    RunDirectory(tmp_path, {"loop": {}, "settings": settings}).close()
    with pytest.raises(
        ValueError, match="holds a run of finetune tag, and this is one of pretrain bert. Go on"
    ) as caught:
        check_settings(tmp_path, {"command": "pretrain bert", "text": "b", "size": 3})
    assert "name1" not in str(caught.value) and "--overwrite" in str(caught.value)
    other = {**settings, **{f"name{k}": -k for k in range(20)}}
    with pytest.raises(ValueError, match="name1 was 1 and is -1 now; .* and 16 more differences. Go on") as caught:
        check_settings(tmp_path, other)
    assert len(str(caught.value)) < 500


def test_links_and_files_of_others(tmp_path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    run(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"

# SPDX-License-Identifier: Apache-2.0
"""Half precision that training commands choose by the device."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from ctxfast._core import capability
from ctxfast.commands import loop_options
from ctxfast.training.loop import parallel, train as train_module


@pytest.mark.parametrize(
    ("given", "capability_of", "amp"),
    [
        ("auto", (9, 0), "bf16"),
        ("auto", (8, 0), "bf16"),
        ("auto", (7, 5), "no"),
        ("no", (9, 0), "no"),
        ("auto", None, "no"),
    ],
)
def test_a_gpu_computes_in_bfloat16_unless_told_otherwise(
    given, capability_of, amp, monkeypatch, tmp_path, capsys
) -> None:
    device = torch.device("cpu" if capability_of is None else "cuda")
    monkeypatch.setattr(parallel, "device_of", lambda name="auto": device)
    monkeypatch.setattr(capability, "compute_capability", lambda index: capability_of)
    monkeypatch.setattr(train_module, "train", lambda *args, **kwargs: SimpleNamespace(
        directory=tmp_path, step=1, resumed=0, seconds=0.0, figures={}
    ))  # fmt: skip
    parser = argparse.ArgumentParser()
    loop_options.add(parser)
    args = parser.parse_args(
        ["-o", str(tmp_path / "run"), "--steps", "1", *(["--amp", given] if given != "auto" else [])]
    )
    if given == "auto":  # not asked for
        loop_options.check_untrained(argparse.Namespace(**{**vars(args), "steps": None}), "test")
    loop_options.check(args, "test")
    config = loop_options.config(args, 1)
    assert config.amp == amp
    loop_options.run(args, "test", None, config, {})
    said = "test: computes in bf16 with float32 weights; --amp no computes in float32" in capsys.readouterr().err
    assert said == (amp == "bf16")

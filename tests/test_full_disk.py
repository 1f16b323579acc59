# SPDX-License-Identifier: Apache-2.0
"""A disk that is full: an error that names the file, nothing half-made, and with room the same call goes on."""

from __future__ import annotations

import importlib.util
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_encoder import FakeEncoder

from ctxfast._core.files import replacing_folder
from ctxfast.embedding.embedder import Embedder
from ctxfast.training.loop.checkpoints import RunDirectory
from ctxfast.training.pretraining.bert_corpus import _Shard
from ctxfast.training.pretraining.bert_instances import Pair
from ctxfast.training.pretraining.bilm_corpus import BiLmCorpus

LINES = [" ".join("abcdefghij"[i % 7 : i % 7 + 1 + i % 4]) for i in range(40)]
FORMATS = [".hdf5", ".safetensors", ".npz", ".jsonl", ".parquet"]


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process may be larger: to write beyond it is an error of the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("level", ["token", "sentence"])
def test_embed(tmp_path, suffix, level):
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    source = tmp_path / "in.txt"
    source.write_text("\n".join(LINES) + "\n")

    def embed(name: str) -> Path:
        model = Embedder(FakeEncoder(), batch_tokens=8)
        model.embed_file(source, tmp_path / name, window=8, layers="all", level=level)
        return tmp_path / name

    whole = embed(f"whole{suffix}").read_bytes()
    shares = [0.02, 0.5, 0.9] if level == "token" else [0.9]
    for share in shares:
        with room(int(len(whole) * share)), pytest.raises(OSError, match=rf"File too large: '.*out{suffix}.*'"):
            embed(f"out{suffix}")
        assert not (tmp_path / f"out{suffix}").exists()
        work = tmp_path / f"out{suffix}.partial"
        assert not work.exists() or not [name for name in os.listdir(work) if name.endswith(".tmp")]
    assert embed(f"out{suffix}").read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["in.txt", f"out{suffix}", f"whole{suffix}"]


def _checkpoint(folder: Path) -> None:
    state = {"model": {"x": torch.zeros(50_000)}}
    with_run = RunDirectory(folder, {"loop": {}, "settings": {}})
    try:
        with_run.save(4, state, 1)
    finally:
        with_run.close()


def _model(folder: Path) -> None:
    from safetensors.torch import save_file

    with replacing_folder(folder / "best") as new:
        save_file({"x": torch.zeros(50_000)}, new / "model.safetensors")


def _shard(folder: Path) -> None:
    with replacing_folder(folder / "shard-00000") as new:
        _Shard.write(new, [(Pair(list(range(100)), 50, False, None), None)] * 500)


def _bilm(folder: Path) -> None:
    (folder / "text").write_text("a b c d e f g h\n" * 4000)
    BiLmCorpus.prepare(folder / "train", [folder / "text"])


def _array(folder: Path) -> None:
    from ctxfast.training.pretraining.prepared import save_array

    with replacing_folder(folder / "x") as new:
        save_array(new / "x.npy", np.zeros((300, 300)))


def _elmo(folder: Path) -> None:
    from ctxfast.models.elmo.config import ElmoConfig
    from ctxfast.models.elmo.weights import random_weights, save_weights

    config = ElmoConfig.preset("small")
    (folder / "elmo").mkdir(exist_ok=True)
    try:
        save_weights(random_weights(config), config, folder / "elmo" / "options.json", folder / "elmo" / "weights.hdf5")
    except OSError:
        assert os.listdir(folder / "elmo") == []
        os.rmdir(folder / "elmo")
        raise


@pytest.mark.parametrize("make", [_elmo, _checkpoint, _model, _shard, _bilm, _array])
def test_training(tmp_path, make):
    with room(100_000), pytest.raises(OSError, match=f"File too large: '{tmp_path}/.*'"):
        make(tmp_path)
    left = {"text", "config.json", "lock"}
    assert set(os.listdir(tmp_path)) <= left
    make(tmp_path)
    assert len(set(os.listdir(tmp_path)) - left) == 1

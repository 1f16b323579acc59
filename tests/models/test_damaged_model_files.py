# SPDX-License-Identifier: Apache-2.0
"""Model files damaged at random, from fixed seeds: read all the same, or refused by a sentence that names the file."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.hf_bert import hf_model
from safetensors.torch import load_file, save_file

import ctxfast
from ctxfast import cli
from ctxfast.models.bert import tf_checkpoint
from ctxfast.models.bert.weights import load_checkpoint
from ctxfast.training.pretraining.bilm_corpus import read_vocabulary
from ctxfast.training.tasks.build import Choice, build, load

# Loading one of these small models takes milliseconds; a machine that others load may take a hundred times that.
_LONGEST, _LARGEST_MB = 20, 300

_VALUES = [
    None,
    True,
    0,
    -1,
    2**31,
    10**20,
    1.5,
    1e308,
    "",
    "x",
    "../x",
    "\ud800",
    "a\0b",
    [],
    {},
    [[]],
    {"a": 1},
    10**9,
]
_BYTES = [b"\0" * 9, b"\xff" * 9, b"\r\n", b"[" * 4000, b"9" * 6000, b"\xed\xa0\x80", b"a" * 5000, b'"', b"\t\t"]


def json_damage(data: bytes, draw: random.Random) -> bytes:
    """A JSON text with one or two values replaced, dropped or added."""
    root = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        place: Any = root
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw.choice(keys) if keys else None
            inner = place[key] if keys else None
            if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
                break
            place = inner
        if key is None:
            continue
        how = draw.random()
        if how < 0.2:
            del place[key]
        elif how < 0.4 and isinstance(inner, int):
            place[key] = draw.choice((inner * 1000, inner + 1, -inner, str(inner), float(inner), 10**9))
        else:
            place[key] = draw.choice(_VALUES)
    return json.dumps(root).encode()


def byte_damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes cut off, turned over, put in, taken out or doubled, often near the ends, where headers lie."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = len(made)
        if not size:
            break
        at = draw.choice(
            (draw.randrange(size), min(draw.randrange(200), size - 1), max(size - 1 - draw.randrange(99), 0))
        )
        how = draw.randrange(6)
        if how == 0:
            del made[at:]
        elif how == 1:
            made[at] ^= 1 << draw.randrange(8)
        elif how == 2:
            made[at : at + 8] = draw.choice((0, 1, 2**32, 2**63, size)).to_bytes(8, "little")
        elif how == 3:
            made[at:at] = draw.choice(_BYTES)
        elif how == 4:
            del made[at : at + draw.choice((1, 8, 100))]
        else:
            made[at:at] = made[draw.randrange(size) :][: draw.choice((4, 50, 500))]
    return bytes(made)


def damaged(data: bytes, name: str, seed: str) -> bytes:
    draw = random.Random(seed)
    if name.endswith(".json") and draw.random() < 0.7:
        return json_damage(data, draw)
    if name.endswith(".safetensors") and draw.random() < 0.5:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json_damage(data[8:end], draw)
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + data[end:]
    return byte_damage(data, draw)


def embed(folder: Path) -> None:
    ctxfast.Embedder(folder)(["the boat", "anna"])


def embed_words(folder: Path) -> None:
    ctxfast.Embedder(folder)([["the", "boat"], ["anna"]])


def convert(folder: Path) -> None:
    if cli.main(["convert", str(folder), str(folder.parent / "converted"), "--quiet", "--overwrite"]) == 1:
        raise AssertionError("a traceback instead of a sentence")


def in_spite_of_checksums(folder: Path) -> None:
    """What lies behind the checksums of an index, as somebody who writes them anew would meet it."""
    for bundle in folder.glob("*.index"):
        reader = tf_checkpoint.TensorBundle(bundle, verify=False)
        for name in reader.names():
            reader.read(name)


def vocabulary(folder: Path) -> None:
    read_vocabulary(folder / "vocabulary.txt")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    from models.test_bert_tf_checkpoint import write_google_folder
    from support.tiny_models import tiny_bert, tiny_elmo

    root = tmp_path_factory.mktemp("models")
    tiny_bert(root / "bert", layers=1)
    tensors = {name: value.clone() for name, value in load_file(root / "bert" / "model.safetensors").items()}
    for name in ("bin", "old", "shards"):
        shutil.copytree(root / "bert", root / name)
        (root / name / "model.safetensors").unlink()
    torch.save(tensors, root / "bin" / "pytorch_model.bin")
    torch.save(tensors, root / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    save_file(tensors, root / "shards" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    write_google_folder(root / "google", hf_model("BertForPreTraining"), block_entries=9, compress=True)
    tiny_elmo(root / "elmo")
    build("tag", root / "bert", ("O", "B-a", "I-a")).save(root / "tuned")
    build("classify", root / "elmo", ("a", "b"), Choice("mix", hidden_size=8)).save(root / "headed")
    (root / "words").mkdir()
    (root / "words" / "vocabulary.txt").write_text("<S>\n</S>\n<UNK>\nthe\nboat\n")
    return root


TARGETS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "safetensors": ("bert", "model.safetensors", embed),
    "bin": ("bin", "pytorch_model.bin", load_checkpoint),
    "old bin": ("old", "pytorch_model.bin", load_checkpoint),
    "index of shards": ("shards", "model.safetensors.index.json", load_checkpoint),
    "config": ("bert", "config.json", embed),
    "google's config": ("google", "bert_config.json", load_checkpoint),
    "tensorflow's index": ("google", "bert_model.ckpt.index", load_checkpoint),
    "index without checksums": ("google", "bert_model.ckpt.index", in_spite_of_checksums),
    "tensorflow's data": ("google", "bert_model.ckpt.data-00000-of-00001", load_checkpoint),
    "hdf5": ("elmo", "weights.hdf5", embed_words),
    "options": ("elmo", "options.json", embed_words),
    "settings": ("tuned", "ctxfast_task.json", load),
    "settings of a head": ("headed", "ctxfast_task.json", load),
    "head": ("headed", "head.safetensors", load),
    "convert bin": ("bin", "pytorch_model.bin", convert),
    "convert hdf5": ("elmo", "weights.hdf5", convert),
    "vocabulary": ("words", "vocabulary.txt", vocabulary),
}


def check(models: Path, target: str, folder: Path, seeds: range) -> None:
    source, name, reader = TARGETS[target]
    shutil.copytree(models / source, folder)
    data = (folder / name).read_bytes()
    reader(folder)
    refused = 0
    for seed in seeds:
        # A name of its own, for weights that were read may still lie in a map of the file.
        (folder / name).unlink()
        (folder / name).write_bytes(damaged(data, name, f"{target} {seed}"))
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reader(folder)
            except Exception as error:
                text = str(error.args[0]) if error.args else str(error)
                refused += 1
                assert text.startswith("ctxfast."), f"seed {seed}: {error!r}"
                assert str(folder) in text, f"seed {seed}: {error!r} names no file"
        assert time.monotonic() - start < _LONGEST, f"seed {seed}"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _LARGEST_MB << 10, f"seed {seed}"
    assert refused or reader is convert


@pytest.mark.parametrize("target", TARGETS)
def test_some_damage(models: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    check(models, target, tmp_path / "model", range(25))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_much_damage(models: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    check(models, target, tmp_path / "model", range(1000, 1400))

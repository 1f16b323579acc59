# SPDX-License-Identifier: Apache-2.0
"""Files with random damage: each is read, or refused by a sentence that names it. No traceback, no hang."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from support.fake_encoder import FakeEncoder
from support.tiny_models import classified, questions, tagged
from test_loop import Line, config

from ctxfast.embedding.embedder import Embedder
from ctxfast.training.loop.train import train
from ctxfast.training.pretraining.knowledge_spans import SpanFile, read_gazetteer
from ctxfast.training.pretraining.text import text_lines
from ctxfast.training.readers.conll import read_conll
from ctxfast.training.readers.squad import read_squad
from ctxfast.training.readers.tables import read_table

TEXT = "The boat went to paris .\n\nanna saw bob\n" * 5
PIECES = [b"\r\n", b"\r", b"\t\t", b"\xef\xbb\xbf", b"\x00", b"\xc2\x85", b'"', b"\xed\xa0\x80", b"-DOCSTART-\n", b"#"]
PIECES += [b"a" * 5000, b"[" * 5000, b"9" * 5000, b"\n" * 3000, b"\t" * 2000, b"NaN", b"-1", b"1e999", b"{}", b"null"]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut out, put in or doubled, most often near the beginning."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = min(draw.randrange(len(data) + 1), draw.choice([40, 400, 1 << 30]))
        size = draw.choice([1, 2, 8, 100])
        head, middle, tail = data[:place], data[place : place + size], data[place + size :]
        data = draw.choice(
            [
                head,
                head + tail,
                head + middle + middle + tail,
                head + bytes(size) + tail,
                head + bytes(draw.randrange(256) for _ in middle) + tail,
                head + draw.choice(PIECES) + middle + tail,
                head + bytes(byte ^ 1 << draw.randrange(8) for byte in middle[:1]) + middle[1:] + tail,
            ]
        )
    return data


# Each: what makes the files in a folder, the one that is damaged, what reads them.


def file(name: str, data: str | bytes, read):
    def make(folder: Path) -> None:
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return make, name, lambda folder: read(folder / name)


def quiet(read, **options):
    return lambda path: read(path, say=lambda note: None, **options)


def embed(path: Path) -> None:
    model = Embedder(FakeEncoder(), batch_tokens=16)
    model.embed_file(path, path.with_name("out.npz"), window=4)


def unfinished(folder: Path) -> None:
    """A job that ended with an error in its last window."""
    (folder / "in.txt").write_text("a b c\nd\n" * 4)

    def fail(*_):
        if len(model.encoder.batches) > 2:
            raise RuntimeError("enough")
        return encode(*_)

    model = Embedder(FakeEncoder(), batch_tokens=4)
    encode, model.encoder.encode = model.encoder.encode, fail
    with pytest.raises(RuntimeError, match="enough"):
        model.embed_file(folder / "in.txt", folder / "out.npz", window=2)


def go_on(folder: Path) -> None:
    Embedder(FakeEncoder(), batch_tokens=4).embed_file(folder / "in.txt", folder / "out.npz", window=2)


def run(folder: Path) -> None:
    train(Line(), config(steps=2, save_every=1, keep=1), folder)


SPANS = "1\t0\t3\tphrase\n3\t5\t8\tentity\n"
SNLI = "".join(json.dumps({"gold_label": label, "text": f"a {label}"}) + "\n" for label in "xy-" * 4)
TARGETS = {
    "conll": file("a.tsv", tagged(8), quiet(read_conll)),
    "conll spaces": file("a.txt", tagged(8).replace("\t", " "), quiet(read_conll)),
    "conll xz": file("a.tsv.xz", lzma.compress(tagged(8).encode()), quiet(read_conll)),
    "tsv": file("a.tsv", classified(8), quiet(read_table)),
    "tsv gz": file("a.tsv.gz", gzip.compress(classified(8).encode(), mtime=0), quiet(read_table)),
    "csv": file("a.csv", 'text,label\n"a ""b"", c",x\nd,y\n' * 3, quiet(read_table)),
    "jsonl": file("a.jsonl", SNLI, quiet(read_table)),
    "squad": file("a.json", json.dumps(questions(5), indent=1), read_squad),
    "text": file("a.txt", TEXT, lambda path: list(text_lines(path))),
    "text gz": file("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0), lambda path: list(text_lines(path))),
    "text xz": file("a.txt.xz", lzma.compress(TEXT.encode()), lambda path: list(text_lines(path))),
    "gazetteer": file("a.txt", "new york\nthe sea\tx\nboat\n", read_gazetteer),
    "embed": file("a.txt", TEXT, embed),
    "embed gz": file("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0), embed),
    "embed xz": file("a.txt.xz", lzma.compress(TEXT.encode()), embed),
    "shard index": (unfinished, "out.npz.partial/00000000.index", go_on),
    "shard values": (unfinished, "out.npz.partial/00000000.values", go_on),
    "manifest": (unfinished, "out.npz.partial/manifest.json", go_on),
    "run config": (run, "config.json", run),
    "run log": (run, "log.jsonl", run),
    "checkpoint": (run, "checkpoint-00000002.pt", run),
}


def spans(folder: Path) -> None:
    SpanFile(folder / "spans.tsv", [folder / "text.txt"])


def spans_made(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    (folder / "spans.tsv").write_text(SPANS)


TARGETS["spans"] = (spans_made, "spans.tsv", spans)


def check(target: str, folder: Path, seeds: range) -> int:
    """Damage one file in many ways; returns how many were refused."""
    make, name, read = TARGETS[target]
    (whole := folder / "whole").mkdir()
    make(whole)
    data, refused = (whole / name).read_bytes(), 0
    for seed in seeds:
        shutil.copytree(whole, here := folder / "here")
        (here / name).write_bytes(damaged(data, random.Random(f"{target} {seed}")))
        start = time.thread_time()
        try:
            read(here)
        except (ValueError, OSError, MemoryError) as error:
            refused += 1
            text = str(error)
            is_named = os.path.basename(name) in text or f"{here}" in text
            assert text.startswith("ctxfast.") and is_named and len(text) < 2000, (seed, text)
        assert time.thread_time() - start < 10, seed
        shutil.rmtree(here)
    return refused


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("target", TARGETS)
def test_damage(tmp_path, target) -> None:
    assert check(target, tmp_path, range(30)) > (4 if target not in ("embed", "gazetteer") else -1)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_much_damage(tmp_path, target) -> None:
    check(target, tmp_path, range(1000, 1500))

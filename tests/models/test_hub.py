# SPDX-License-Identifier: Apache-2.0
"""Models by the names of Hugging Face's hub: from its cache, and fetched from a hub that runs here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import tiny_bert, tiny_elmo

import ctxfast
from ctxfast.models.bert.weights import resolve_model
from ctxfast.models.hub import _wanted, is_name

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _put(cache: Path, name: str) -> Path:
    """A folder of the cache as huggingface_hub lays it out."""
    place = cache / ("models--" + name.replace("/", "--"))
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(SHA)
    folder = place / "snapshots" / SHA
    folder.parent.mkdir()
    return folder


def test_a_model_of_the_cache(cache: Path, tmp_path: Path, monkeypatch) -> None:
    bert = tiny_bert(_put(cache, "some-org/tiny.bert-v1"))
    assert resolve_model("some-org/tiny.bert-v1") == bert
    texts = ["one two", "three"]
    expected = ctxfast.Embedder(bert, device="cpu")(texts, level="sentence")
    found = ctxfast.Embedder("some-org/tiny.bert-v1", device="cpu")(texts, level="sentence")
    assert np.array_equal(found, expected)
    elmo = tiny_elmo(_put(cache, "tiny-elmo"))
    assert ctxfast.Embedder("tiny-elmo", device="cpu").kind == "elmo" and resolve_model("tiny-elmo") == elmo
    # A folder of the name goes first.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    own = tiny_bert(Path("tiny-elmo"))
    assert resolve_model("tiny-elmo") == own
    with pytest.raises(FileNotFoundError, match=r"in the cache of Hugging Face's hub.*or download=True"):
        resolve_model("some-org/unheard")
    with pytest.raises(FileNotFoundError) as error:
        resolve_model("a/b/c")
    assert "download" not in str(error.value).replace("Nothing is downloaded", "")


def test_names() -> None:
    for name in ("bert-base-uncased", "BAAI/bge-small-en-v1.5", "a/b_c.d"):
        assert is_name(name), name
    for name in ("", "a/b/c", "../up", "/tmp/x", "~/model", "a b", "a/", "C:\\x", Path("a/b")):
        assert not is_name(name), name


def test_which_files_are_fetched() -> None:
    texts = ["config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "sentencepiece.bpe.model"]
    others = ["README.md", "onnx/model.onnx", "onnx/config.json", "tf_model.h5", "flax_model.msgpack", "openvino/x.txt"]
    both = ["model.safetensors", "pytorch_model.bin", "2_Dense/model.safetensors"]
    assert _wanted([*texts, *others, *both]) == [*texts, "model.safetensors", "2_Dense/model.safetensors"]
    assert _wanted([*texts, *others, "pytorch_model-00001-of-00002.bin"]) == [
        *texts,
        "pytorch_model-00001-of-00002.bin",
    ]
    elmo = ["options.json", "steady_state.safetensors"]
    for weights in ("weights.hdf5", "weights.safetensors"):
        assert _wanted([*elmo, weights, "a.png"]) == [*elmo, weights]
    ckpt = ["bert_config.json", "vocab.txt", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"]
    assert _wanted(ckpt) == ckpt


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as huggingface_hub asks for."""

    folder: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith("/api/models/some-org/tiny-bert/tree/"):
            sizes = {name: file.stat().st_size for name, file in files.items()}
            tree = [{"type": "file", "path": name, "size": size, "oid": SHA} for name, size in sorted(sizes.items())]
            self._answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/some-org/tiny-bert"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._answer(json.dumps({"id": "some-org/tiny-bert", "sha": SHA, "siblings": siblings}).encode())
        elif path.startswith("/some-org/tiny-bert/resolve/") and (name := path.split("/", 5)[5]) in files:
            self._answer(files[name].read_bytes(), True)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, body: bytes, is_file: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if is_file:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
        else:
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], type[_Hub]]]:
    """Environment of a process that asks this hub, and what it was asked."""
    folder = tiny_bert(tmp_path / "on_the_hub")
    (folder / "README.md").write_text("not fetched")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    handler = type("Hub", (_Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    environment.pop("HF_HUB_CACHE", None)
    yield environment, handler
    server.shutdown()
    server.server_close()
    thread.join()


def _run(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ctxfast", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_model_is_fetched_once(hub, tmp_path: Path) -> None:
    environment, handler = hub
    (tmp_path / "lines.txt").write_text("one two\nthree\n")
    base = ["embed", tmp_path / "lines.txt", "-m", "some-org/tiny-bert", "--level", "sentence", "--quiet"]
    refused = _run(environment, *base, "-o", tmp_path / "none.npz")
    assert refused.returncode == 2 and "download=True (--download)" in refused.stderr and not handler.asked
    done = _run(environment, *base, "-o", tmp_path / "one.npz", "--download")
    assert done.returncode == 0, done.stderr
    fetched = {line.split(SHA + "/")[1] for line in handler.asked if line.startswith("GET /some-org")}
    assert {"config.json", "model.safetensors"} <= fetched
    assert not fetched & {"README.md", "pytorch_model.bin"}, fetched
    asked = len(handler.asked)
    again = _run(environment, *base, "-o", tmp_path / "two.npz")
    assert again.returncode == 0, again.stderr
    assert len(handler.asked) == asked, "it lies in the cache"
    first, second = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert all(np.array_equal(first[name], second[name]) for name in first.files)


@pytest.mark.slow
def test_what_the_hub_does_not_have(hub, tmp_path: Path) -> None:
    environment, _ = hub
    absent = _run(environment, "convert", "some-org/unheard", tmp_path / "out", "--download")
    assert absent.returncode == 2 and "the hub has no model 'some-org/unheard'" in absent.stderr
    silent = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    unreached = _run(silent, "convert", "some-org/tiny-bert", tmp_path / "out", "--download")
    assert unreached.returncode == 2 and "some-org/tiny-bert cannot be fetched" in unreached.stderr
    assert "Traceback" not in absent.stderr + unreached.stderr and not (tmp_path / "out").exists()

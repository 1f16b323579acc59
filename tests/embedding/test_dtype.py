# SPDX-License-Identifier: Apache-2.0
"""What a model computes in: half precision on a GPU, unless told otherwise; on a CPU 16 or 8 bits on request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.fake_encoder import FakeEncoder
from support.tiny_models import tiny_elmo

from ctxfast import cli
from ctxfast.embedding.embedder import Embedder
from ctxfast.embedding.open_model import computes_in_on

WORDS = [line.split() for line in ("the cat sat on the mat", "a", "", "one two three", "a a a a a a a a a a")]


@pytest.fixture(scope="module")
def minilm(minilm_dir) -> Embedder:
    return Embedder(minilm_dir, device="cpu")


def test_a_gpu_computes_in_half_precision():
    """What a first user times: float16 on a GPU, with vectors of float32; float32 on a CPU."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (computes_in_on(gpu, None), computes_in_on(cpu, None)) == ("float16", "float32")
    for asked in ("float32", "bfloat16"):
        assert computes_in_on(gpu, asked) == computes_in_on(cpu, asked) == asked
    with pytest.raises(ValueError, match="dtype is 'int8' on cuda; expected 'float16', 'bfloat16' or 'float32' there"):
        computes_in_on(gpu, "int8")


@pytest.mark.parametrize(
    ("asked", "name", "bound"), [("bfloat16", "bfloat16", 2e-2), (torch.int8, "int8", 4e-2)], ids=str
)
def test_computing_in_less(minilm, minilm_dir, caplog, asked, name, bound):
    with caplog.at_level("INFO"):
        narrow = Embedder(minilm_dir, device="cpu", dtype=asked)
    assert narrow.dtype == name and minilm.dtype == "float32" and not caplog.records
    assert f"computes in {name}" in repr(narrow)
    texts = ["A bank by the river.", "The bank lent money."]
    for one, other in zip(narrow(texts, level="sentence"), minilm(texts, level="sentence")):
        assert one.dtype == np.float32 and 1e-4 < np.abs(one - other).max() < bound


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("int8", 1e-1)])
def test_an_elmo_computes_in_less(tmp_path, dtype, bound):
    """Its recurrent products alone: the token layer stays as it is."""
    tiny_elmo(tmp_path)
    exact, narrow = (Embedder(tmp_path, device="cpu", dtype=each) for each in (None, dtype))
    assert (exact.dtype, narrow.dtype) == ("float32", dtype)
    for one, other in zip(narrow(WORDS[:2], layers="all"), exact(WORDS[:2], layers="all")):
        assert one.dtype == np.float32 and np.array_equal(one[0], other[0])
        assert 1e-5 < np.abs(one[1:] - other[1:]).max() / np.abs(other).max() < bound


def test_half_precision_nobody_asked_for_is_said(minilm_dir, caplog, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ctxfast.embedding.open_model.computes_in_on", lambda device, asked: "bfloat16")
    with caplog.at_level("INFO"):
        Embedder(minilm_dir, device="cpu")
    (record,) = caplog.records
    assert "computes in bfloat16 on cpu; dtype='float32' is" in record.getMessage()
    (tmp_path / "in.txt").write_text("A bank by the river.\n")
    arguments = ["embed", f"{tmp_path}/in.txt", "-m", str(minilm_dir), "-o", f"{tmp_path}/out.npz", "--device", "cpu"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.count("computes in bfloat16 on cpu (--dtype float32 is slower, exact)") == 1
    assert np.load(tmp_path / "out.npz")["embeddings"].dtype == np.float32


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_what_half_precision_cannot_hold_is_no_result(output):
    encoder = FakeEncoder()
    own = encoder.encode
    encoder.encode = lambda batch, selection: own(batch, selection).masked_fill_(torch.tensor(len(batch) == 1), np.inf)
    assert len(Embedder(encoder, batch_tokens=8)(WORDS, output=output)) == len(WORDS)  # float32 is as the model is
    encoder.dtype = "float16"
    with pytest.raises(RuntimeError, match=r"hold infinity or NaN.*computes in float16.*dtype='float32'"):
        Embedder(encoder, batch_tokens=8)(WORDS, output=output)


@pytest.mark.gpu
def test_on_a_gpu(minilm, minilm_dir):
    fast, exact = Embedder(minilm_dir), Embedder(minilm_dir, dtype="float32")
    assert (fast.dtype, exact.dtype) == ("float16", "float32") and fast.device.type == "cuda"
    texts = ["A bank by the river.", "The bank lent money.", "a"] * 40
    for options in (dict(level="sentence"), dict(layers="all"), dict()):
        wanted = minilm(texts, **options)
        for embedder, bound in ((fast, 1e-2), (exact, 2e-4)):
            for _ in range(3):  # the second time through a graph
                found = embedder(texts, **options)
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == np.float32 and np.abs(one - other).max() <= bound * np.abs(other).max()

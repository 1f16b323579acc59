# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts as other tools take them: a matrix, cut, in fewer bits, as a step of scikit-learn's pipelines."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_bert

import ctxfast

TEXTS = ["one two three", "two", "three one one two", "", "one", "two three", "three three", "one two"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> ctxfast.Embedder:
    return ctxfast.Embedder(tiny_bert(tmp_path_factory.mktemp("model") / "bert"), device="cpu")


def test_a_vector_is_cut_and_scaled(embedder) -> None:
    whole = embedder(TEXTS, level="sentence")
    cut = embedder(TEXTS, level="sentence", truncate_dim=5)
    assert np.array_equal(cut, whole[:, :5])
    scaled = embedder(TEXTS, level="sentence", truncate_dim=5, normalize=True)
    np.testing.assert_allclose(scaled, cut / np.linalg.norm(cut, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    tensor = embedder(TEXTS, level="sentence", truncate_dim=5, normalize=True, output="torch")
    np.testing.assert_allclose(tensor.numpy(), scaled, rtol=1e-6)


def test_fewer_bits_as_sentence_transformers_has_them(embedder) -> None:
    quantize_embeddings = pytest.importorskip("sentence_transformers.util").quantize_embeddings
    vectors = embedder(TEXTS, level="sentence")
    vectors[:, 3] = 0.25  # a column without a range
    draw = np.random.default_rng(0)
    calibration = draw.standard_normal((50, vectors.shape[1])).astype(np.float32)
    ranges = np.stack([vectors.min(0) - 0.5, vectors.max(0) - 0.1])
    for precision in ("float32", "int8", "uint8", "binary", "ubinary"):
        assert np.array_equal(
            ctxfast.quantize_vectors(vectors, precision), quantize_embeddings(vectors, precision=precision)
        ), precision
    for precision in ("int8", "uint8"):
        expected = quantize_embeddings(vectors, precision=precision, calibration_embeddings=calibration)
        assert np.array_equal(ctxfast.quantize_vectors(vectors, precision, calibration=calibration), expected)
        expected = quantize_embeddings(vectors, precision=precision, ranges=ranges)
        assert np.array_equal(ctxfast.quantize_vectors(vectors, precision, ranges=ranges), expected)
    found = embedder(TEXTS, level="sentence", precision="ubinary", truncate_dim=12)
    assert np.array_equal(found, np.packbits(embedder(TEXTS, level="sentence")[:, :12] > 0, axis=1))
    none = embedder([], level="sentence", precision="int8")
    assert none.shape == (0, embedder.dim) and none.dtype == np.int8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"truncate_dim": 5}, "truncate_dim is 5 at token level; expected level 'sentence'"),
        ({"precision": "int8"}, "precision is 'int8' at token level"),
        ({"level": "sentence", "precision": "int4"}, "precision is 'int4'; expected one of float32, int8"),
        ({"level": "sentence", "truncate_dim": 0}, "truncate_dim is 0; expected 1 to"),
        ({"level": "sentence", "truncate_dim": 10**6}, "truncate_dim is 1000000; expected 1 to"),
        ({"level": "sentence", "truncate_dim": 2.5}, "truncate_dim is 2.5; expected 1 to"),
        ({"level": "sentence", "precision": "binary", "output": "torch"}, "with output 'torch' and layers 'top'"),
        ({"level": "sentence", "precision": "binary", "layers": [0, 1]}, "with output 'numpy' and layers .0, 1."),
    ],
)
def test_bad_options(embedder, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(TEXTS, **options)


def test_bad_vectors() -> None:
    vectors = np.ones((2, 4), np.float32)
    for arguments, options, message in (
        ((vectors, "int3"), {}, "precision is 'int3'; expected one of"),
        ((vectors[0], "int8"), {}, r"vectors is float32 \(4,\); expected floats"),
        ((vectors.astype(np.int8), "int8"), {}, "vectors is int8"),
        ((vectors, "int8"), {"ranges": vectors[:1]}, r"ranges has shape \(1, 4\); expected \(2, 4\)"),
        ((vectors, "int8"), {"ranges": np.array([[1.0] * 4, [0.0] * 4])}, "lowest values, not above the highest"),
        ((vectors, "int8"), {"calibration": vectors[:, :2]}, r"calibration has shape \(2, 2\); expected \(texts, 4\)"),
        ((vectors, "int8"), {"calibration": vectors[:0]}, "with at least one text"),
        ((vectors, "binary"), {"ranges": vectors}, "ranges given with precision 'binary'"),
        ((vectors, "int8"), {"ranges": vectors, "calibration": vectors}, "ranges and calibration given"),
    ):
        with pytest.raises(ValueError, match=message):
            ctxfast.quantize_vectors(*arguments, **options)


def test_a_step_of_pipelines(embedder) -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.pipeline import make_pipeline

    texts, labels = TEXTS * 4, [int("three" in text) for text in TEXTS * 4]
    model = make_pipeline(embedder, LogisticRegression())
    model.fit(texts, labels)
    assert np.array_equal(model[:-1].transform(texts), embedder(texts, level="sentence"))
    assert model.score(texts, labels) > 0.8
    assert len(cross_val_score(model, texts, labels, cv=3)) == 3
    search = GridSearchCV(model, {"logisticregression__C": [0.1, 1.0]}, cv=2).fit(texts, labels)
    assert search.best_estimator_[0] is embedder, "folds share one model"
    assert sklearn.base.clone(embedder) is embedder
    assert np.array_equal(embedder.fit_transform(TEXTS), embedder.fit(TEXTS).transform(TEXTS))
    again = pickle.loads(pickle.dumps(model))
    assert np.allclose(again.predict_proba(texts), model.predict_proba(texts), atol=1e-6)
    assert torch.is_tensor(embedder(TEXTS, level="sentence", output="torch"))

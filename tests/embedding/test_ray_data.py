# SPDX-License-Identifier: Apache-2.0
"""A Ray dataset embedded by workers: the same vectors as ``Embedder``'s."""

from __future__ import annotations

import numpy as np
import pytest

import ctxfast
from ctxfast.embedding.ray_data import EmbedBatches

ray = pytest.importorskip("ray")
TEXTS = ["The bank of the river.", "One.", "A bank lends money to people who do not need it.", "Rain fell."] * 4


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("level", [pytest.param("sentence", marks=pytest.mark.slow), "token"])
def test_the_same_vectors(minilm_dir, level) -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
    made = ctxfast.embed_dataset(
        ray.data.from_items(rows), str(minilm_dir), level=level, batch_size=5, concurrency=2, num_cpus=1
    )
    found = sorted(made.take_all(), key=lambda row: row["id"])
    expected = ctxfast.Embedder(minilm_dir, device="cpu")(TEXTS, level=level)
    assert len(found) == len(TEXTS) and found[3]["text"] == TEXTS[3]
    for row, one in zip(found, expected):
        np.testing.assert_allclose(np.asarray(row["embedding"]), np.asarray(one), rtol=1e-5, atol=1e-6)


def test_errors(minilm_dir) -> None:
    with pytest.raises(ValueError, match="state is 'carry'; expected 'steady' or 'zero'"):
        ctxfast.embed_dataset(None, str(minilm_dir), embedder={"state": "carry"})
    worker = EmbedBatches(str(minilm_dir), {"device": "cpu"}, "text", "embedding", {"level": "sentence"})
    with pytest.raises(ValueError, match="no column 'text'; expected one of line"):
        worker({"line": np.array(["a"])})
    with pytest.raises(TypeError, match="text 1 is None; expected a string"):
        worker({"text": np.array(["a", None], dtype=object)})

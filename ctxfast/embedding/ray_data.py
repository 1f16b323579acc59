# SPDX-License-Identifier: Apache-2.0
"""Embed a dataset on many machines with Ray Data: a model on each worker, blocks of rows through ``Embedder``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._core.extras import need
from .embedder import Embedder

if TYPE_CHECKING:
    import ray.data

_WHO = "ctxfast.embed_dataset"


class EmbedBatches:
    """What a Ray worker does: ``Dataset.map_batches`` makes one object for each actor and calls it with blocks.

    Args:
        model, options: of ``Embedder``; the files must be there on every machine.
        column: of the texts.
        output: column that is added.
        call: options of a call of ``Embedder``.
    """

    def __init__(self, model: str, options: dict[str, Any], column: str, output: str, call: dict[str, Any]) -> None:
        self._embedder = Embedder(model, **options)
        self._column, self._output, self._call = column, output, call

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._column not in batch:
            raise ValueError(
                f"{_WHO}: the dataset has no column {self._column!r}; expected one of {', '.join(sorted(batch))}."
            )
        # Lists of words come as arrays.
        texts = [text.tolist() if isinstance(text, np.ndarray) else text for text in batch[self._column]]
        found = self._embedder(texts, **self._call)
        if isinstance(found, np.ndarray):
            return {**batch, self._output: found}
        vectors = np.empty(len(found), dtype=object)  # texts differ in their number of tokens
        for row, one in enumerate(found):
            vectors[row] = np.asarray(one)
        return {**batch, self._output: vectors}


def embed_dataset(
    dataset: ray.data.Dataset,
    model: str,
    *,
    column: str = "text",
    output: str = "embedding",
    batch_size: int = 1024,
    concurrency: int | tuple[int, int] = 1,
    num_gpus: float = 0,
    num_cpus: float | None = None,
    embedder: dict[str, Any] | None = None,
    **call: Any,
) -> ray.data.Dataset:
    """Add contextual vectors to a Ray dataset of texts.

    Args:
        dataset: with a column of texts, e.g. ``ray.data.read_text("s3://...")``.
        model: as ``Embedder`` takes it; the files must be there on every machine.
        column: of the texts.
        output: column that is added: an array a row, (dim,) or (layers, dim) at sentence level, (tokens, ...) at token
            level.
        batch_size: rows of a block; they are sorted by length inside.
        concurrency: workers, or (least, most) of them; each holds the model.
        num_gpus, num_cpus: of a worker; with a GPU the model goes there.
        embedder: options of ``Embedder``, e.g. ``{"dtype": "bfloat16"}``.
        call: options of its call: ``level``, ``layers``, ``pooling``, ``normalize``, ``prompt_name``, ``truncate``, ...

    Returns:
        The dataset with one more column; lazy as Ray's are.

    Raises:
        ValueError: carried ELMo states, whose results depend on the order of texts, which workers do not keep.
        RuntimeError: Ray is not installed.

    Example:
        >>> vectors = ctxfast.embed_dataset(ray.data.read_text("corpus/"), "path/to/model", level="sentence",
        ...                                 concurrency=8, num_gpus=1)
        >>> vectors.write_parquet("vectors/")
    """
    need(_WHO, "ray.data", "datasets on many machines", "ray")
    options = {"device": "cuda" if num_gpus else "cpu", **(embedder or {})}
    if options.get("state") == "carry":
        raise ValueError(f"{_WHO}: state is 'carry'; expected 'steady' or 'zero': workers do not keep the order.")
    return dataset.map_batches(
        EmbedBatches,
        fn_constructor_args=(model, options, column, output, {"level": "sentence", **call}),
        batch_format="numpy",
        batch_size=batch_size,
        concurrency=concurrency,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )

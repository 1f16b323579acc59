# SPDX-License-Identifier: Apache-2.0
"""``ElmoEmbedder``: tokens in, numpy arrays of all layers out; the class AllenNLP had until its 1.0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import h5py
import numpy as np
import torch

from ..._core.files import replacing
from ..._core.hdf5 import new_hdf5
from .bilm import ElmoBiLm
from .character_encoder import remove_sentence_marks
from .files import elmo_files
from .tokenization import Word, batch_to_ids, lazy_batches

_OP = "ctxfast.ElmoEmbedder"
_FORMATS = ("all", "top", "average")
_Path = str | os.PathLike[str]


def _device(cuda_device: int | None, device: torch.device | str | None) -> torch.device:
    if cuda_device is None:
        return torch.device("cpu" if device is None else device)
    if device is not None:
        raise ValueError(f"{_OP}: cuda_device is {cuda_device!r} and device is {device!r}; expected one of them.")
    if isinstance(cuda_device, bool) or not isinstance(cuda_device, int) or cuda_device < -1:
        raise ValueError(
            f"{_OP}: cuda_device is {cuda_device!r}; expected the number of a GPU, or -1 for the CPU. device= takes "
            "torch's names of devices."
        )
    if cuda_device == -1:
        return torch.device("cpu")
    if cuda_device >= (count := torch.cuda.device_count()):
        raise RuntimeError(f"{_OP}: cuda_device is {cuda_device}, and torch sees {count} GPUs. Pass -1 for the CPU.")
    return torch.device("cuda", cuda_device)


class ElmoEmbedder:
    """Contextual vectors of tokenised sentences, every layer.

    Args:
        options_file, weight_file: the model's files.
        cuda_device: AllenNLP's way to say where to run: the number of a GPU, -1 for the CPU.
        device: where to run, in torch's words; None for the CPU.
        state: the LSTM state at the start of a sentence. "carry": AllenNLP's rule, where row k of a batch goes on from
            row k of the batch before, so that a sentence's vectors depend on what came before it; "steady": a fixed
            state, so that a sentence always gets the same vectors (``ctxfast.Embedder``'s default); "zero".
        weight_dtype: torch.bfloat16 or torch.int8 for the products of the recurrent layers; see ``ctxfast.lstm``. What
            it costs: vectors off by 0.4 % and 1.8 % of their root mean square (original size, random weights).
        impl: implementation of every op; None chooses.

    Attributes:
        bilm: the ``ElmoBiLm``; ``bilm.calibrate(sentences)`` sets the steady state, ``bilm.reset_states()`` forgets
            carried ones.

    Reference: AllenNLP 0.9, commands/elmo.
    """

    def __init__(
        self,
        options_file: _Path,
        weight_file: _Path,
        cuda_device: int | None = None,
        *,
        device: torch.device | str | None = None,
        state: str = "carry",
        weight_dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        self.device = _device(cuda_device, device)
        self.bilm = ElmoBiLm.from_files(
            options_file, weight_file, state=state, weight_dtype=weight_dtype, impl=impl
        ).to(self.device)
        self.bilm.eval()

    @classmethod
    def from_pretrained(cls, path_or_name: _Path, *, download: bool = False, **kwargs: Any) -> ElmoEmbedder:
        """The model of a folder or name, see ``ElmoBiLm.from_pretrained``; ``kwargs`` as for the class."""
        return cls(*elmo_files(path_or_name, download=download), **kwargs)

    @torch.no_grad()
    def embed_batch(self, batch: Sequence[Sequence[Word]]) -> list[np.ndarray]:
        """Sentences of tokens -> for each an array (L + 1, n, 2P) float32, the token layer first.

        A sentence without tokens gives (L + 1, 0, 2P).
        """
        if not batch:
            return []
        ids = batch_to_ids(batch, max_characters=self.bilm.config.max_characters)
        found = self.bilm(ids.to(self.device))
        mask = found["mask"]
        layers = [remove_sentence_marks(layer, mask) for layer in found["activations"]]
        stacked = torch.stack(layers, 1).float().cpu().numpy()
        return [stacked[k, :, : len(sentence)].copy() for k, sentence in enumerate(batch)]

    def embed_sentence(self, sentence: Sequence[Word]) -> np.ndarray:
        """One sentence of tokens -> (L + 1, n, 2P) float32."""
        return self.embed_batch([sentence])[0]

    def embed_sentences(self, sentences: Iterable[Sequence[Word]], batch_size: int = 64) -> Iterator[np.ndarray]:
        """Many sentences, read as they are needed -> their arrays, in the order of the input."""
        if batch_size < 1:
            raise ValueError(f"{_OP}: batch_size is {batch_size!r}; expected 1 or more.")
        for batch in lazy_batches(sentences, batch_size):
            yield from self.embed_batch(batch)

    def embed_file(
        self,
        input_file: _Path | TextIO,
        output_file_path: _Path,
        output_format: str = "all",
        batch_size: int = 64,
        forget_sentences: bool = False,
        use_sentence_keys: bool = False,
    ) -> None:
        """A file of sentences, one a line, tokens with spaces between, to HDF5 in the layout of ``allennlp elmo``.

        Args:
            input_file: path of a UTF-8 text file, or an open one.
            output_file_path: must not exist. It is written under another name first and appears when complete.
            output_format: "all": (L + 1, n, 2P) a sentence; "top": (n, 2P), the last layer; "average": (n, 2P), the
                mean of all layers.
            batch_size: sentences at a time.
            forget_sentences: leave out ``sentence_to_index``, a JSON dictionary from sentence to key.
            use_sentence_keys: name a dataset by its sentence, not by its line's number (from 0).

        Raises:
            FileNotFoundError, FileExistsError: input missing, output there already.
            ValueError: a blank line; with ``use_sentence_keys`` a sentence that comes twice or holds a "/", which HDF5
                reads as a path.
        """
        if output_format not in _FORMATS:
            raise ValueError(f"{_OP}: output_format is {output_format!r}; expected one of {', '.join(_FORMATS)}.")
        target = Path(output_file_path)
        if target.exists():
            raise FileExistsError(f"{_OP}: {target} exists. Remove it, or choose another name.")
        sentences, name = _read_sentences(input_file)
        keys = _sentence_keys(sentences, name) if use_sentence_keys else None
        with replacing(target) as temporary, new_hdf5(temporary) as (file, check):
            split = (sentence.split() for sentence in sentences)
            for number, layers in enumerate(self.embed_sentences(split, batch_size)):
                key = keys[number] if keys else str(number)
                file.create_dataset(key, data=_formatted(layers, output_format))
                check()
            if not forget_sentences and keys is None:
                index = {sentence: str(number) for number, sentence in enumerate(sentences)}
                text = file.create_dataset("sentence_to_index", (1,), dtype=h5py.string_dtype("utf-8"))
                text[0] = json.dumps(index)


def _formatted(layers: np.ndarray, output_format: str) -> np.ndarray:
    if output_format == "top":
        return layers[-1]
    return layers.mean(axis=0) if output_format == "average" else layers


def _read_sentences(source: _Path | TextIO) -> tuple[list[str], str]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{_OP}: there is no input file {path}.")
        with path.open(encoding="utf-8") as file:
            lines, name = [line.strip() for line in file], str(path)
    else:
        lines, name = [line.strip() for line in source], getattr(source, "name", "input_file")
    blank = [str(number) for number, line in enumerate(lines, 1) if not line]
    if blank:
        more = f" and {len(blank) - 10} more" if len(blank) > 10 else ""
        raise ValueError(
            f"{_OP}: {name} has blank lines: {', '.join(blank[:10])}{more} (counted from 1); expected a sentence on "
            f"every line."
        )
    return lines, name


def _sentence_keys(sentences: list[str], name: str) -> list[str]:
    seen: dict[str, int] = {}
    for number, sentence in enumerate(sentences, 1):
        if sentence in seen:
            raise ValueError(
                f"{_OP}: line {number} of {name} is the same as line {seen[sentence]}; expected different sentences "
                f"with use_sentence_keys."
            )
        if "/" in sentence or sentence == ".":
            raise ValueError(
                f"{_OP}: line {number} of {name} cannot be a key of HDF5, where '/' and '.' stand for paths. Leave "
                f"use_sentence_keys out."
            )
        seen[sentence] = number
    return sentences

# SPDX-License-Identifier: Apache-2.0
"""``Embedder``: text in, arrays of contextual vectors out, for BERT-family and ELMo models alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._core import transfer
from .._core.texts import as_list, described, wrong_text
from .batch_encoder import BatchEncoder
from .job import Report, embed_file
from .precision import PRECISIONS, quantize_vectors
from .selection import Layers, Selection

_Path = str | os.PathLike[str]


class Embedder(BatchEncoder):
    """Contextual vectors of texts. Also a transformer of scikit-learn: texts in, a matrix out.

    Args:
        model: a Hugging Face directory, a Google checkpoint, the name of an installed package with a model, a name of
            Hugging Face's hub (see ``ctxfast.models.bert.weights.resolve_model``), a folder with an ELMo model's
            options.json and HDF5 weights, or a ``TextEncoder``. None with ``options_file`` and ``weight_file``.
        device: "auto" (a GPU if torch sees one), "cpu", "cuda", "cuda:1", ...
        impl: implementation of every op that has it, see ``ctxfast.use_impl``; None chooses.
        state: for ELMo alone, what a text starts from: "steady" (None; one fixed state: results depend on the text
            alone), "zero", or "carry" (AllenNLP's rule: row k of a batch goes on from row k of the batch before;
            ``reset`` forgets).
        dtype: what the model computes in; a name, or torch's dtype. None: "float16" on a GPU, where it is many times as
            fast as "float32" and its vectors differ from those by about a thousandth; "float32" on a CPU. "bfloat16" on
            both. "int8" on a CPU: both factors of products in 8 bits (see ``ctxfast.linear_act``, ``ctxfast.lstm``:
            weight_dtype), those of BERT's layers and of ELMo's recurrent ones; all else in float32, as with "bfloat16"
            for ELMo on a CPU. docs/precision.md has what each costs in quality.
        vector_dtype: of the vectors: "float32" or "float16".
        batch_tokens: most tokens of a batch (padding counts for ELMo); None for 2048 on a CPU, 16384 on a GPU, or what
            256 MiB of vectors allow.
        batch_size: with state "carry" alone, in place of ``batch_tokens``: texts of a batch, on which results depend
            there; None for 64, AllenNLP's.
        options_file, weight_file: files of an ELMo model that do not lie together.
        download: fetch a model of the hub that is not on this machine.
        split: for BERT: texts that are longer than the model takes are embedded in windows of as many tokens as it
            takes, which overlap by this number (64, say; 0 for none), each with the special tokens and the prompt. A
            token's vector is that of the window in which it is farthest from an edge. A text's vector is the mean of
            its windows' pooled ones, each counting by its tokens; modules that follow the pooling see that mean. None:
            such texts raise, or are cut with ``truncate``.

    Attributes:
        kind: "bert" or "elmo".
        num_layers: layers that can be chosen; 0 is the token layer (BERT: the output of the embedding block).
        dim: size of a token's vector.
        dtype: what the model computes in, by name.
        vector_dtype: of the vectors, NumPy's.
        sentence_dim: size of a text's vector, which the model's folder may make another.
        prompts: what the model's folder has to write before texts, by name ("query", "document", ...).

    Raises:
        FileNotFoundError: no such model.
        ConnectionError: the hub cannot be reached.
        TypeError: a model that is neither a path, a name nor a ``TextEncoder``.
        ValueError: a folder that is not a model, or could be two; a wrong option, or one that does not apply to this
            model.
        RuntimeError: "cuda" where torch sees no GPU; an ``impl`` that no op of the model has on its device; from a
            call, vectors that hold infinity or NaN in half precision.
    """

    def __repr__(self) -> str:
        return (
            f"Embedder({self.kind}, layers={self.num_layers}, dim={self.dim}, device={self.device}, "
            f"computes in {self.dtype or '?'}, impl={self.impl or 'auto'})"
        )

    def __call__(
        self,
        texts: Iterable[str | Sequence[str]],
        *,
        level: str = "token",
        layers: Layers = "top",
        pooling: str | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        word_pieces: str | None = None,
        truncate: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        output: str = "numpy",
    ) -> Any:
        """Embed texts that fit in memory; ``embed_file`` is for those that do not.

        Vectors of texts (``level="sentence"``) are by default those that the model was trained with: where the folder
        has sentence-transformers' files (modules.json and what it names), they are followed, and with
        ``truncate=True`` the vectors are those of ``SentenceTransformer(folder).encode``.

        Args:
            texts: strings, or lists of words. A BERT model splits a string into its own tokens; ELMo at white space.
            level: "token" for a vector a token (special tokens left out), "sentence" for one a text.
            layers: "top", "all", "average" (their plain mean), a number or numbers: 0 is the token layer, -1 the top.
            pooling: at sentence level, how a text's tokens, [CLS] and [SEP] included for BERT, become one vector. None:
                as the folder says, with the Dense, LayerNorm and other modules that follow; "mean" where it says
                nothing. "mean", "cls" (the first), "max", "mean_sqrt_len_tokens", "weightedmean" or "lasttoken": the
                encoder's own vectors, pooled so; modules that would follow are left out, with a warning.
            normalize: scale every vector to length 1. None: at sentence level as the folder says, else False.
            prompt: written before every text, at sentence level; "" for none. None: the folder's default, if it has
                one.
            prompt_name: in place of ``prompt``, one of the folder's by its name, as "query" or "document".
            word_pieces: for BERT, lists of words and token level alone: the "first" piece of each word (None; a vector
                a word), the "mean" of its pieces (a vector a word), or "all" pieces. A word without a piece has zeros.
            truncate: cut texts that are too long instead of raising: longer than the model's positions, than the
                tokenizer's model_max_length, or at sentence level than the folder's max_seq_length.
            truncate_dim: at sentence level, keep so many first numbers of a vector (models trained for it); with
                ``normalize=True`` it is scaled to length 1 after that, else before.
            precision: at sentence level, "int8", "uint8", "binary" or "ubinary" for fewer bits, see
                ``ctxfast.quantize_vectors``; 8 bits take their ranges of these very texts, so that texts to be compared
                belong into one call. "float32": as ``vector_dtype`` says.
            output: "numpy", or "torch" for tensors on the model's device.

        Returns:
            At token level a list with one array a text, in order: (layers, n, dim) or, for one layer or their average,
            (n, dim). At sentence level one array of all N texts: (N, layers, sentence_dim) or (N, sentence_dim).

        Raises:
            TypeError: a single string, a table, or texts that are neither strings nor lists of words; the message has
                the number of the first wrong one.
            ValueError: a text that is too long, a layer that the model does not have, an unknown value of an option,
                an option that does not apply, files of the folder that cannot be followed at sentence level (an
                unknown module, say).

        Warns:
            UserWarning: ``pooling`` is given, and the folder has modules that would follow it.
        """
        if output not in ("numpy", "torch"):
            raise ValueError(f"ctxfast.Embedder: output is {output!r}; expected 'numpy' or 'torch'.")
        _check_vectors(
            level, layers, truncate_dim, precision, output, self.sentence_dim if pooling is None else self.dim
        )
        texts, unit = _unit(texts)
        selection = self.select(
            layers=layers,
            level=level,
            pooling=pooling,
            normalize=normalize,
            prompt=prompt,
            prompt_name=prompt_name,
            unit=unit,
            word_pieces=word_pieces,
        )
        items = self.prepare(texts, selection, _name_text, truncate)
        encode = self.encode if output == "numpy" else self.encode_on_device
        source: Iterable[Any] = encode(items, selection)
        if selection.level == "sentence":
            matrix = self._matrix(len(items), selection, source, output)
            if truncate_dim is not None:
                matrix = _cut(matrix, truncate_dim, normalize)
            return matrix if precision == "float32" else quantize_vectors(matrix, precision)
        results: list[Any] = [None] * len(items)
        for batch, values in source:
            start = 0
            for index in batch:
                rows = values[start : start + items[index].rows]
                results[index] = _of_tokens(rows, selection)
                start += items[index].rows
        return results

    def _matrix(self, count: int, selection: Selection, source: Iterable[tuple[list[int], Any]], output: str) -> Any:
        """The vectors of all texts in one array, a row a text."""
        shape = (count, selection.depth, selection.dim)
        if output == "numpy":
            matrix = np.empty(shape, self.vector_dtype)
        else:
            matrix = torch.empty(shape, dtype=self.torch_dtype, device=self.device)
        for batch, values in source:
            # A list of indices would be copied to the GPU in a way that waits for it.
            rows: Any = batch if output == "numpy" else transfer.to_device(torch.tensor(batch), self.device)
            matrix[rows] = values
        return matrix[:, 0] if selection.is_single else matrix

    def fit(self, texts: Any = None, labels: Any = None) -> Embedder:
        """Nothing to learn; scikit-learn's pipelines call it."""
        return self

    def transform(self, texts: Iterable[str | Sequence[str]]) -> np.ndarray:
        """(N, sentence_dim) vectors of N texts, as ``self(texts, level="sentence")``, for scikit-learn's pipelines.

        ``sklearn.preprocessing.FunctionTransformer`` with ``functools.partial(embedder, level="sentence", ...)`` takes
        other options.
        """
        return self(texts, level="sentence")

    def fit_transform(self, texts: Iterable[str | Sequence[str]], labels: Any = None) -> np.ndarray:
        """``transform``."""
        return self.transform(texts)

    def __sklearn_clone__(self) -> Embedder:
        # It learns nothing from what it is fitted to, so that folds may share one model.
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(),
            input_tags=InputTags(two_d_array=False, string=True),
            requires_fit=False,
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """No parameters to search over: scikit-learn asks."""
        return {}

    def tokens(
        self, texts: Iterable[str | Sequence[str]], *, word_pieces: str | None = None, truncate: bool = False
    ) -> list[list[str]]:
        """The tokens that the rows of a call with the same arguments belong to."""
        texts, unit = _unit(texts)
        selection = self.select(unit=unit, word_pieces=word_pieces)
        return [self.encoder.tokens(item, selection) for item in self.prepare(texts, selection, _name_text, truncate)]

    def embed_file(self, input: _Path, output: _Path, **options: Any) -> Report:
        """Embed a text file line by line into a file: see ``ctxfast.embedding.job.embed_file``."""
        return embed_file(self, input, output, **options)


def _cut(matrix: Any, size: int, normalize: bool | None) -> Any:
    """The first ``size`` numbers of each vector, of length 1 if that is wanted of what is left."""
    matrix = matrix[..., :size]
    if not normalize:
        return matrix
    if isinstance(matrix, Tensor):
        return torch.nn.functional.normalize(matrix, dim=-1)
    return torch.nn.functional.normalize(torch.from_numpy(matrix), dim=-1).numpy()


def _check_vectors(level: str, layers: Layers, truncate_dim: int | None, precision: str, output: str, dim: int) -> None:
    """Refuse options of vectors of texts that do not apply, before anything is computed."""
    if precision not in PRECISIONS:
        raise ValueError(f"ctxfast.Embedder: precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    for name, value, unset in (("truncate_dim", truncate_dim, None), ("precision", precision, "float32")):
        if value != unset and level != "sentence":
            raise ValueError(f"ctxfast.Embedder: {name} is {value!r} at token level; expected level 'sentence' for it.")
    if truncate_dim is not None and (
        isinstance(truncate_dim, bool) or not isinstance(truncate_dim, int) or not 1 <= truncate_dim <= dim
    ):
        raise ValueError(f"ctxfast.Embedder: truncate_dim is {truncate_dim!r}; expected 1 to {dim}, a vector's size.")
    if precision != "float32" and (output != "numpy" or not isinstance(layers, (str, int)) or layers == "all"):
        raise ValueError(
            f"ctxfast.Embedder: precision is {precision!r} with output {output!r} and layers {layers!r}; expected it "
            "with output 'numpy' and one layer or their average."
        )


def _name_text(index: int) -> str:
    return f"text {index}"


def _of_tokens(rows: Any, selection: Selection) -> Any:
    """(rows, depth, dim) of one text as ``Embedder`` returns it; a copy, so that a batch is not kept for one text."""
    rows = rows[:, 0] if selection.is_single else rows.swapaxes(0, 1)
    return rows.clone() if isinstance(rows, Tensor) else np.array(rows, order="C")


def _unit(texts: Iterable[Any]) -> tuple[list[Any], str]:
    """The texts as a list, and what they are: "text" for strings, "words" for lists of words."""
    texts = as_list(texts, "ctxfast.Embedder")
    if all(isinstance(text, str) for text in texts):
        return texts, "text"
    for index, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if isinstance(text, bytes) or not isinstance(text, Sequence):
            raise wrong_text("ctxfast.Embedder", index, texts, "a string or a list of words")
        for word in text:
            if not isinstance(word, str):
                raise TypeError(
                    f"ctxfast.Embedder: text {index} holds {described(word)}; expected words that are strings."
                )
    kinds = ["a string" if isinstance(text, str) else "a list of words" for text in texts]
    if len(set(kinds)) > 1:
        index = next(index for index, kind in enumerate(kinds) if kind != kinds[0])
        raise TypeError(
            f"ctxfast.Embedder: text {index} is {kinds[index]} where text 0 is {kinds[0]}; expected only strings, or "
            f"only lists of words."
        )
    return [list(text) for text in texts], "words"

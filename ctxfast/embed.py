# SPDX-License-Identifier: Apache-2.0
"""``Embedder``: text in, arrays of contextual vectors out, for BERT-family and ELMo models alike."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import corpus
from ._core.registry import use_impl
from ._core.texts import as_list, described
from .encoders import BertEncoder, ElmoEncoder, Encoder, Prepared, Where
from .models.bert.config import read_json
from .models.bert.modeling import Bert
from .models.bert.sentence_modules import SentenceModel, read_sentence_model, transformer_folder
from .models.bert.tokenization import BertTokenizer
from .models.bert.weights import resolve_model
from .models.elmo.bilm import ElmoBiLm
from .selection import Layers, Selection, select

STATES = ("steady", "zero", "carry")
DTYPES = ("float32", "float16")
# Tokens of a batch: enough to fill the device; more only costs memory.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# The vectors of a batch, all layers asked for, stay below this: two batches are in memory at a time.
_BATCH_BYTES = 256 << 20
# AllenNLP's number of sentences in a batch: with carried states results depend on it.
_CARRY_BATCH = 64
_MODEL_SUFFIXES = (".json", ".txt", ".safetensors", ".bin", ".model", ".pt", ".pth")

_Path = str | os.PathLike[str]


class Embedder:
    """Contextual vectors of texts.

    Args:
        model: a Hugging Face directory, a Google checkpoint, the name of an installed package with a model (see
            ``ctxfast.models.bert.weights.resolve_model``), a folder with an ELMo model's options.json and HDF5 weights,
            or an ``Encoder``. None with ``options_file`` and ``weight_file``.
        device: "auto" (a GPU if torch sees one), "cpu", "cuda", "cuda:1", ...
        impl: implementation of every op, see ``ctxfast.use_impl``; None chooses.
        state: for ELMo, what a text starts from: "steady" (one fixed state: results depend on the text alone), "zero",
            or "carry" (AllenNLP's rule: row k of a batch goes on from row k of the batch before; ``reset`` forgets).
        dtype: "float32", or "float16": vectors are float16, and on a GPU the model computes in it; on a CPU it computes
            in float32 still.
        batch_tokens: most tokens of a batch (padding counts for ELMo); None for 2048 on a CPU, 16384 on a GPU, or what
            256 MiB of vectors allow.
        batch_size: texts of a batch with state "carry", where results depend on it (64, AllenNLP's).
        options_file, weight_file: files of an ELMo model that do not lie together.

    Attributes:
        kind: "bert" or "elmo".
        num_layers: layers that can be chosen; 0 is the token layer (BERT: the output of the embedding block).
        dim: size of a token's vector.
        sentence_dim: size of a text's vector, which the model's folder may make another.
        prompts: what the model's folder has to write before texts, by name ("query", "document", ...).

    Raises:
        FileNotFoundError: no such model.
        ValueError: a folder that is no model, or could be two; a wrong option.
        RuntimeError: "cuda" where torch sees no GPU.
    """

    def __init__(
        self,
        model: _Path | Encoder | None = None,
        *,
        device: str | torch.device = "auto",
        impl: str | None = None,
        state: str = "steady",
        dtype: str = "float32",
        batch_tokens: int | None = None,
        batch_size: int = _CARRY_BATCH,
        options_file: _Path | None = None,
        weight_file: _Path | None = None,
    ) -> None:
        for name, value, known in (("state", state, STATES), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"ctxfast.Embedder: {name} is {value!r}; expected one of {', '.join(known)}.")
        for name, number in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"ctxfast.Embedder: {name} is {number}; expected 1 or more.")
        self.impl, self.state, self.dtype = impl, state, np.dtype("<f4" if dtype == "float32" else "<f2")
        with self._implementation():  # an unknown name is an error now, not at the first text
            pass
        if isinstance(model, (str, os.PathLike)) or model is None:
            model = open_encoder(
                model, _device(device), dtype, state=state, options_file=options_file, weight_file=weight_file
            )
        self.encoder: Encoder = model
        self.kind, self.num_layers, self.dim = model.kind, model.num_layers, model.dim
        self._sentence: SentenceModel = getattr(model, "sentence", None) or SentenceModel(model.dim)
        self.sentence_dim, self.prompts = self._sentence.dim, dict(self._sentence.prompts)
        self._has_said = False
        if state == "carry" and self.kind != "elmo":
            raise ValueError(f"ctxfast.Embedder: state is 'carry'; expected an ELMo model for it, not {self.kind}.")
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size

    def __repr__(self) -> str:
        return (
            f"Embedder({self.kind}, layers={self.num_layers}, dim={self.dim}, device={self.device}, "
            f"impl={self.impl or 'auto'})"
        )

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def reset(self) -> None:
        """Forget carried states."""
        self.encoder.load_state_dict({})

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
        word_pieces: str = "first",
        truncate: bool = False,
        output: str = "numpy",
    ) -> list[Any]:
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
            word_pieces: for BERT and lists of words: the "first" piece of each word (a vector a word), the "mean" of
                its pieces (a vector a word), or "all" pieces. A word without a piece has zeros.
            truncate: cut texts that are too long instead of raising: longer than the model's positions, than the
                tokenizer's model_max_length, or at sentence level than the folder's max_seq_length.
            output: "numpy", or "torch" for tensors on the model's device.

        Returns:
            One array a text, in order: (layers, n, dim) or, for one layer or their average, (n, dim); at sentence level
            (layers, dim) or (dim,).

        Raises:
            TypeError: a single string, a table, or texts that are neither strings nor lists of words; the message has
                the number of the first wrong one.
            ValueError: a text that is too long, a layer that the model has not, a word that is no option, files of the
                folder that cannot be followed at sentence level (an unknown module, say).

        Warns:
            UserWarning: ``pooling`` is given, and the folder has modules that would follow it.
        """
        if output not in ("numpy", "torch"):
            raise ValueError(f"ctxfast.Embedder: output is {output!r}; expected 'numpy' or 'torch'.")
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
        results: list[Any] = [None] * len(items)
        source = self.encode(items, selection) if output == "numpy" else self._encode(items, selection)
        for batch, values in source:
            start = 0
            for index in batch:
                rows = values[start : start + items[index].rows]
                results[index] = _shaped(rows, selection)
                start += items[index].rows
        return results

    def tokens(
        self, texts: Iterable[str | Sequence[str]], *, word_pieces: str = "first", truncate: bool = False
    ) -> list[list[str]]:
        """The tokens that the rows of a call with the same arguments belong to."""
        texts, unit = _unit(texts)
        selection = self.select(unit=unit, word_pieces=word_pieces)
        return [self.encoder.tokens(item, selection) for item in self.prepare(texts, selection, _name_text, truncate)]

    def embed_file(self, input: _Path, output: _Path, **options: Any) -> Any:
        """Embed a text file line by line into a file: see ``ctxfast.jobs.embed_file``."""
        from .jobs import embed_file

        return embed_file(self, input, output, **options)

    # What calls and file jobs share

    def _implementation(self) -> AbstractContextManager[None]:
        return use_impl(self.impl) if self.impl is not None else nullcontext()

    def select(self, **options: Any) -> Selection:
        """A ``Selection`` checked against this model."""
        selection = select(self.kind, self.num_layers, self._sentence, self.dim, **options)
        left_out = self._sentence.after_pooling or (self._sentence.problem and "modules that are not known here")
        if left_out and selection.level == "sentence" and options.get("pooling") is not None and not self._has_said:
            self._has_said = True
            warnings.warn(
                f"ctxfast.Embedder: pooling is {options['pooling']!r}, so that the encoder's own vectors are pooled. "
                f"Left out of the model's folder: {left_out}. Pass pooling=None to follow it.",
                stacklevel=3,
            )
        return selection

    def prepare(self, texts: Sequence[Any], selection: Selection, where: Where, truncate: bool) -> list[Prepared]:
        return self.encoder.prepare(texts, selection, where, truncate)

    def token_budget(self, selection: Selection) -> int:
        """Most tokens of a batch."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        usual = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cuda"])
        return max(min(usual, _BATCH_BYTES // (4 * selection.depth * max(selection.dim, self.dim))), 1)

    def _batches(self, items: Sequence[Prepared], selection: Selection) -> list[list[int]]:
        if self.state == "carry":
            return corpus.fixed_batches(len(items), self.batch_size)
        lengths = [item.length for item in items]
        return corpus.token_batches(lengths, self.token_budget(selection), is_padded=self.encoder.is_padded)

    def _encode(self, items: Sequence[Prepared], selection: Selection) -> Iterator[tuple[list[int], Tensor]]:
        for batch in self._batches(items, selection):
            with self._implementation():
                values = self.encoder.encode([items[index] for index in batch], selection)
            yield batch, values.to(torch.float32 if self.dtype.itemsize == 4 else torch.float16)

    def encode(self, items: Sequence[Prepared], selection: Selection) -> Iterator[tuple[list[int], np.ndarray]]:
        """Batches of texts: their indices, and (rows, layers, dim) of all of them one after another.

        While a batch is copied from a GPU the next one is computed.
        """
        waiting = None
        for batch, values in self._encode(items, selection):
            copy = _start_copy(values)
            if waiting is not None:
                yield waiting[0], _finish_copy(*waiting[1])
            waiting = batch, copy
        if waiting is not None:
            yield waiting[0], _finish_copy(*waiting[1])


def _start_copy(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _finish_copy(host: Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    if event is not None:
        event.synchronize()
    return host.numpy()


def _name_text(index: int) -> str:
    return f"text {index}"


def _shaped(rows: Any, selection: Selection) -> Any:
    """(rows, depth, dim) of one text as ``Embedder`` returns it; a copy, so that a batch is not kept for one text."""
    if selection.level == "sentence":
        rows = rows[0, 0] if selection.is_single else rows[0]
    else:
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
            raise TypeError(
                f"ctxfast.Embedder: text {index} is {described(text)}; expected a string or a list of words."
            )
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


# Models


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"ctxfast.Embedder: device is {name!r}; expected 'auto', 'cpu' or 'cuda'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"ctxfast.Embedder: device is {str(device)!r}, but torch sees no GPU. Pass device='cpu'.")
    return device


def open_encoder(
    model: _Path | None,
    device: torch.device,
    dtype: str = "float32",
    *,
    state: str = "steady",
    options_file: _Path | None = None,
    weight_file: _Path | None = None,
) -> Encoder:
    """Open a model, BERT or ELMo, told apart by its files; see ``Embedder``."""
    computes_in = torch.float16 if dtype == "float16" and device.type == "cuda" else torch.float32
    if (options_file is None) != (weight_file is None):
        given, missing = ("options_file", "weight_file") if weight_file is None else ("weight_file", "options_file")
        raise ValueError(f"ctxfast.Embedder: {given} is given without {missing}; an ELMo model needs both.")
    files = (Path(options_file), Path(weight_file)) if options_file is not None else None
    if model is None and files is None:
        raise ValueError("ctxfast.Embedder: model is None; expected a folder or a name, or an ELMo model's two files.")
    if model is not None and files is not None:
        raise ValueError("ctxfast.Embedder: model is given beside options_file; expected one or the other.")
    if files is None and Path(model).expanduser().is_dir():
        files = _elmo_files(Path(model).expanduser())
    if files is not None:
        bilm = ElmoBiLm.from_files(*files, state=state)
        return ElmoEncoder(bilm.to(device, computes_in), files)
    path = resolve_model(model)
    given = Path(model).expanduser()
    root = given if given.is_dir() else path if path.is_dir() else path.parent
    folder = transformer_folder(root)
    if path.is_dir() and folder != root:
        path = folder
    folder = path if path.is_dir() else path.parent
    _refuse_adapters(folder)
    bert = Bert.from_pretrained(path, dtype=computes_in, device=device, add_pooling_layer=False)
    # A checkpoint of TensorFlow is several files that begin alike.
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.suffix in _MODEL_SUFFIXES or file.name.startswith(path.name + "."))
    ]
    tokenizer = BertTokenizer.from_pretrained(path)
    sentence = read_sentence_model(root, bert.config.hidden_size, bert.config.max_length, tokenizer.max_length)
    if sentence.do_lower_case:
        tokenizer.add_lower_case()
    return BertEncoder(bert, tokenizer, [*files, *(file for file in sentence.files if file not in files)], sentence)


def _refuse_adapters(folder: Path) -> None:
    """Raise ValueError for a folder whose vectors are made by more than its config and weights say here."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"ctxfast.Embedder: {adapter} makes this an adapter of another model; expected a whole model. Merge it "
            f"first: peft's merge_and_unload(), then save_pretrained()."
        )
    path = folder / "config.json"
    config = read_json(path, "ctxfast.Embedder") if path.is_file() else {}
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"ctxfast.Embedder: {path} has a quantization_config; expected weights that are not quantized. Save the "
            f"model dequantized first."
        )
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and "AutoModel" in auto_map:
        raise ValueError(
            f"ctxfast.Embedder: {path} names code of its own for the model, {auto_map['AutoModel']!r}; no code of a "
            f"folder is run here. Remove auto_map from a copy of it if the model is a plain {config.get('model_type')}."
        )


def _elmo_files(folder: Path) -> tuple[Path, Path] | None:
    """Options and weights of the ELMo model in a folder; None if it holds something else.

    Raises:
        ValueError: both ELMo and BERT, neither, or no telling which file.
    """
    names = sorted(file.name for file in folder.iterdir())
    found = f"It holds: {', '.join(names[:20]) or 'nothing'}{' ...' if len(names) > 20 else ''}."
    options = _the_one(names, ("options.json",), lambda name: "options" in name and name.endswith(".json"))
    tables = [name for name in names if name.endswith((".hdf5", ".h5"))]
    weights = _the_one(tables, ("weights.hdf5",), lambda name: "weights" in name) or _the_one(
        tables, (), lambda _: True
    )
    is_elmo = options is not None and bool(tables)
    is_bert = any(name in names for name in ("config.json", "bert_config.json", "modules.json", "0_Transformer"))
    if is_elmo and is_bert:
        raise ValueError(
            f"ctxfast.Embedder: {folder} could be a BERT or an ELMo model; expected one of them. {found} Pass "
            f"options_file and weight_file for ELMo."
        )
    if is_bert:
        return None
    if is_elmo and weights is not None:
        return folder / options, folder / weights
    if is_elmo:
        raise ValueError(
            f"ctxfast.Embedder: {folder} has several HDF5 files ({', '.join(tables)}); expected one that is named "
            f"*weights*. Pass options_file and weight_file."
        )
    raise ValueError(
        f"ctxfast.Embedder: {folder} is no model: expected config.json (BERT) or options.json with HDF5 weights (ELMo)."
        f" {found}"
    )


def _the_one(names: Sequence[str], best: Sequence[str], fits: Any) -> str | None:
    for name in best:
        if name in names:
            return name
    found = [name for name in names if fits(name)]
    return found[0] if len(found) == 1 else None

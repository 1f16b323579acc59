# SPDX-License-Identifier: Apache-2.0
"""Model types that ``Bert`` does not compute: Transformers' own model with its encoder swapped, behind what
``BertEncoder`` calls of a ``Bert``, and its tokenizer as a ``BertTokenizer``.

Which types of encoders ``swap_in`` takes says docs/drop_in.md; others run as in Transformers, with a warning that gives
the reason.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.extras import need
from ..models.bert.config import MODEL_TYPES
from ..models.bert.tokenization import BertTokenizer
from ..packing import Packing
from ..swap.in_place import swap_in

_WHO = "ctxfast.Embedder"
# What Transformers says where a tokenizer has no limit of its own is larger than any.
_NO_LIMIT = 1 << 30
_ROLES = ("pad", "unk", "cls", "sep", "mask")


def other_type(folder: Path) -> str | None:
    """The model type that a folder's config.json names, if ``Bert`` does not compute it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said where models are read
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) and kind not in MODEL_TYPES else None


class Packed(NamedTuple):
    """What ``BertEncoder`` reads of a ``BertOutput``."""

    packed_last_hidden_state: Tensor
    packed_hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Sizes:
    """What ``BertEncoder`` reads of a ``BertConfig``."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int


class TransformersModel:
    """A model of Transformers called as ``Bert`` is for packed results.

    Args:
        model: in eval mode, on its device.
        takes: names of the inputs that its tokenizer makes for it.
        weight_dtype: torch.int8 where products are of 8 bits.

    A pickle holds from where it was read, not the weights: Transformers' models do not go into one after they have been
    asked for hidden states.
    """

    source: tuple[Any, ...]  # the arguments of ``open_model``

    def __init__(self, model: Any, takes: frozenset[str], weight_dtype: torch.dtype | None) -> None:
        self.model, self.weight_dtype = model, weight_dtype
        parameters = inspect.signature(model.forward).parameters
        self._takes_types = "token_type_ids" in takes and "token_type_ids" in parameters
        table = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"{_WHO}: {type(model).__name__} has no table of tokens; expected a model of texts.")
        self.device, self.dtype = table.weight.device, table.weight.dtype
        two = torch.ones(1, 2, dtype=torch.int64, device=self.device)
        layers = self._layers(two, None, two, True)
        shapes = {tuple(layer.shape) for layer in layers}
        if len(layers) < 2 or len(shapes) > 1:
            raise ValueError(
                f"{_WHO}: layers of {type(model).__name__} have the shapes {sorted(shapes)} for two tokens; expected "
                "one vector of one size for each token and layer."
            )
        self.config = Sizes(len(layers) - 1, layers[-1].shape[-1], table.num_embeddings)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, self.source

    def eval(self) -> TransformersModel:
        """As it is."""
        return self

    @torch.inference_mode()
    def _layers(self, ids: Tensor, types: Tensor | None, mask: Tensor, wants_all: bool) -> tuple[Tensor, ...]:
        """All layers, or the last alone, (B, L, N) each."""
        given = {"token_type_ids": types} if self._takes_types and types is not None else {}
        found = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=wants_all, return_dict=True, **given
        )
        # Of a model with a norm after its layers the last state is what that norm gives.
        return (*(found.hidden_states[:-1] if wants_all else ()), found.last_hidden_state)

    def __call__(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        lengths: Sequence[int],
        *,
        output_hidden_states: bool,
        return_packed: bool,
    ) -> Packed:
        """Layers of the real tokens of a batch that is padded on the right, (T, N) each."""
        packing = Packing.from_lengths(lengths, input_ids.shape[1], input_ids.device)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = places < torch.tensor(list(lengths), device=input_ids.device)[:, None]
        layers = self._layers(input_ids, token_type_ids, mask.long(), output_hidden_states)
        packed = tuple(map(packing.pack, layers))
        return Packed(packed[-1], packed if output_hidden_states else None)


def open_model(
    folder: Path, kind: str, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> tuple[TransformersModel, BertTokenizer, int]:
    """The model of a folder, its tokenizer, and the most tokens of a text.

    Args:
        folder: with config.json, weights and tokenizer files.
        kind: its model type.
        dtype: to compute in.
        weight_dtype: torch.int8 for products of 8 bits.

    Raises:
        RuntimeError: Transformers is not installed.
        ValueError: it does not know the model or its tokenizer, or 8 bits are asked for and not to be had.
    """
    what = f"models of type {kind}, which ctxfast computes through it (swap_in)"
    transformers = need(_WHO, "transformers", what, None)
    try:
        model = transformers.AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()
        raise ValueError(
            f"{_WHO}: {folder / 'config.json'} has the model_type {kind!r}, which Transformers does not open: "
            f"{first[0] if first else type(error).__name__}"
        ) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model = model.to(device).eval().requires_grad_(False)
    report = swap_in(model)
    reason = "; ".join(dict.fromkeys(sentence for _, sentence in report.near_misses)) or "no part of it is known."
    if weight_dtype is not None:
        if not report.swapped:
            raise ValueError(f"{_WHO}: dtype is 'int8' for a {kind}; expected 'float32' or 'bfloat16': {reason}")
        swap_in(model, weight_dtype=weight_dtype)
    elif not report.swapped:
        warnings.warn(f"{_WHO}: this {kind} runs as in Transformers, not faster: {reason}", stacklevel=4)
    takes = frozenset(tokenizer.model_input_names)
    limit = min(tokenizer.model_max_length, _positions(model))
    found = TransformersModel(model, takes, weight_dtype)
    found.source = (folder, kind, device, dtype, weight_dtype)
    return found, _tokenizer(tokenizer, folder, limit), limit


def _again(*source: Any) -> TransformersModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given the first time
        return open_model(*source)[0]


def _positions(model: Any) -> int:
    """The most tokens of a text that a model has positions for."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            # RoBERTa's kin count positions from the padding's id on.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None) or _NO_LIMIT


def _tokenizer(tokenizer: Any, folder: Path, limit: int) -> BertTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{_WHO}: {folder} has a tokenizer that is Python code, {type(tokenizer).__name__}; expected one of the "
            "package tokenizers (tokenizer.json)."
        )
    special = {role: getattr(tokenizer, f"{role}_token", None) for role in _ROLES}
    if special["pad"] is None:
        special["pad"] = tokenizer.eos_token  # padding is not looked at
    given = {role: token for role, token in special.items() if token is not None}
    found = BertTokenizer(
        backend,
        special_tokens=given,
        max_length=limit if limit < _NO_LIMIT else None,
        truncation_side=tokenizer.truncation_side,
    )
    found.source = folder
    return found

# SPDX-License-Identifier: Apache-2.0
"""``Elmo``: AllenNLP's module under its name: the language model, mixes of its layers, dropout.

Arguments, results and names of parameters are AllenNLP's. Beyond it: three rules for the state a text starts from
(``state``), and sentence marks may be kept on inputs of any rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import tools
from ...nn.scalar_mix import ScalarMix
from .bilm import ElmoBiLm
from .character_encoder import remove_sentence_marks, without_sentence_marks
from .config import ElmoConfig
from .files import elmo_files
from .states import State
from .tokenization import Word
from .weights import random_weights

__all__ = ["Elmo", "ElmoBiLm"]

_OP = "ctxfast.Elmo"
_Path = str | os.PathLike[str]


class Elmo(tools.NotScriptable):
    """ELMo representations: one run of the language model, several mixes of its layers.

    Args:
        options_file: options.json of AllenNLP or bilm-tf.
        weight_file: the file that belongs to it: HDF5, or safetensors of AllenNLP's names.
        num_output_representations: how many mixes, each with weights of its own.
        requires_grad: whether the language model is trained, too.
        do_layer_norm: normalise layers before they are mixed, see ``ScalarMix``.
        dropout: probability of dropping an element of a representation in training.
        vocab_to_cache: words in the order of their ids, whose token vectors are computed once; ``word_inputs`` then
            looks them up.
        keep_sentence_boundaries: keep the rows of <S> and </S>.
        scalar_mix_parameters: K values for every mix, before the softmax; the mixes are then not trained.
        module: a language model to use in place of the two files: any module with ``num_layers`` that returns
            ``activations`` and ``mask`` as ``ElmoBiLm`` does.
        state: "carry" (AllenNLP's rule), "steady" or "zero", see ``ElmoBiLm``.
        weight_dtype: torch.bfloat16 or torch.int8 for the products of the recurrent layers; see ``ctxfast.lstm``. What
            it costs: vectors off by 0.4 % and 1.8 % of their root mean square (original size, random weights).
        impl: implementation of every op; None chooses.

    Raises:
        ValueError: files given together with ``module`` or neither; options or files that do not fit each other.
        FileNotFoundError: a file that does not exist.

    Reference: Peters et al. 2018; AllenNLP's Elmo, whose state_dict this one's is.
    """

    def __init__(
        self,
        options_file: _Path | None = None,
        weight_file: _Path | None = None,
        num_output_representations: int = 1,
        requires_grad: bool = False,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        vocab_to_cache: Sequence[Word] | None = None,
        keep_sentence_boundaries: bool = False,
        scalar_mix_parameters: Sequence[float] | None = None,
        module: nn.Module | None = None,
        *,
        state: str = "carry",
        weight_dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        files = [("options_file", options_file), ("weight_file", weight_file)]
        if module is not None:
            self._check_alone(files, state, weight_dtype)
            self._elmo_lstm: Any = module
        else:
            for name, value in files:
                if value is None:
                    raise ValueError(f"{_OP}: {name} is None; expected a path, or a language model as module.")
            assert options_file is not None and weight_file is not None
            self._elmo_lstm = ElmoBiLm.from_files(
                options_file, weight_file, requires_grad, state=state, weight_dtype=weight_dtype, impl=impl
            )
        if vocab_to_cache:
            self._bilm("vocab_to_cache").cache_vocabulary(vocab_to_cache)
        self._has_cached_vocab = bool(vocab_to_cache)
        self._keep_sentence_boundaries = keep_sentence_boundaries
        self._dropout = nn.Dropout(p=dropout)
        self.num_output_representations = num_output_representations
        for k in range(num_output_representations):
            mix = ScalarMix(
                self._elmo_lstm.num_layers,
                do_layer_norm=do_layer_norm,
                initial_scalar_parameters=scalar_mix_parameters,
                trainable=scalar_mix_parameters is None,
                impl=impl,
            )
            self.add_module(f"scalar_mix_{k}", mix)

    @staticmethod
    def _check_alone(files: list[tuple[str, Any]], state: str, weight_dtype: torch.dtype | None) -> None:
        for name, value in files:
            if value is not None:
                raise ValueError(f"{_OP}: {name} is {os.fspath(value)!r}; expected None together with module.")
        if state != "carry" or weight_dtype is not None:
            raise ValueError(
                f"{_OP}: state and weight_dtype belong to the language model; expected them to be set where module "
                f"was made, not here."
            )

    @classmethod
    def from_config(
        cls,
        config: ElmoConfig,
        num_output_representations: int = 1,
        *,
        seed: int = 0,
        requires_grad: bool = False,
        state: str = "carry",
        weight_dtype: torch.dtype | None = None,
        impl: str | None = None,
        **kwargs: Any,
    ) -> Elmo:
        """A model with untrained weights, for demonstrations and for training from the start.

        Args:
            config: sizes, e.g. ``ElmoConfig.preset("small")``.
            seed: the same seed gives the same weights.
            kwargs: the other arguments of the class.
        """
        bilm = ElmoBiLm.from_weights(
            config, random_weights(config, seed), requires_grad, state=state, weight_dtype=weight_dtype, impl=impl
        )
        return cls(num_output_representations=num_output_representations, module=bilm, impl=impl, **kwargs)

    @classmethod
    def from_pretrained(
        cls, path_or_name: _Path, num_output_representations: int = 1, *, download: bool = False, **kwargs: Any
    ) -> Elmo:
        """The model of a folder or name, see ``ElmoBiLm.from_pretrained``.

        Args:
            path_or_name: a folder with options and weights, or a name.
            download: fetch a model of the hub that is not on this machine.
            kwargs: the other arguments of the class.
        """
        return cls(*elmo_files(path_or_name, download=download), num_output_representations, **kwargs)

    def _bilm(self, what: str) -> ElmoBiLm:
        if not isinstance(self._elmo_lstm, ElmoBiLm):
            raise TypeError(
                f"{_OP}: {what} needs ctxfast's own language model; module is a {type(self._elmo_lstm).__name__}."
            )
        return self._elmo_lstm

    def get_output_dim(self) -> int:
        """2P."""
        return self._elmo_lstm.get_output_dim()

    def reset_states(self, mask: Tensor | None = None) -> None:
        """See ``ElmoBiLm.reset_states``."""
        self._bilm("reset_states").reset_states(mask)

    def calibrate(self, sentences: Iterable[Sequence[Word]] | None = None) -> State:
        """See ``ElmoBiLm.calibrate``."""
        return self._bilm("calibrate").calibrate(sentences)

    @property
    def steady_state(self) -> State | None:
        """See ``ElmoBiLm.steady_state``."""
        return self._bilm("steady_state").steady_state

    def save_steady_state(self, path: _Path) -> None:
        """See ``ElmoBiLm.save_steady_state``."""
        self._bilm("save_steady_state").save_steady_state(path)

    def load_steady_state(self, path: _Path) -> None:
        """See ``ElmoBiLm.load_steady_state``."""
        self._bilm("load_steady_state").load_steady_state(path)

    @tools.fx_leaf
    def forward(self, inputs: Tensor | None, word_inputs: Tensor | None = None) -> dict[str, list[Tensor] | Tensor]:
        """Character ids to representations.

        Args:
            inputs: (..., T, C) int64 character ids, see ``batch_to_ids``; leading dimensions of any number, one at
                least. With ``word_inputs`` None if every word is in the cached vocabulary.
            word_inputs: (..., T) int64 ids of the cached vocabulary, 0 for padding; an id past its end is a word whose
                characters are read from ``inputs``.

        Returns:
            ``elmo_representations``: a tensor (..., T, 2P) per mix, zeros at padding; ``mask``: (..., T) bool. T + 2
            in place of T with ``keep_sentence_boundaries``.

        Raises:
            ValueError, TypeError: see ``ElmoBiLm``.
        """
        if word_inputs is not None and not self._has_cached_vocab:
            warnings.warn(
                f"{_OP}: word_inputs was given without a cached vocabulary (vocab_to_cache) and is not used.",
                stacklevel=2,
            )
            word_inputs = None
        lead = self._leading(inputs, word_inputs)
        if len(lead) > 1:
            inputs = None if inputs is None else inputs.flatten(0, len(lead) - 1)
            word_inputs = None if word_inputs is None else word_inputs.flatten(0, len(lead) - 1)
        found = self._elmo_lstm(inputs, word_inputs)
        layers, mask = found["activations"], found["mask"]
        mixes = [getattr(self, f"scalar_mix_{k}")(layers, mask) for k in range(self.num_output_representations)]
        if not self._keep_sentence_boundaries:
            mixes = [remove_sentence_marks(mixed, mask) for mixed in mixes]
            mask = without_sentence_marks(mask)
        representations = [self._dropout(mixed) for mixed in mixes]
        if len(lead) > 1:
            representations = [mixed.unflatten(0, lead) for mixed in representations]
            mask = mask.unflatten(0, lead)
        return {"elmo_representations": representations, "mask": mask}

    def _leading(self, inputs: Tensor | None, word_inputs: Tensor | None) -> tuple[int, ...]:
        """All dimensions before the tokens'."""
        for name, value, inner in (("inputs", inputs, 2), ("word_inputs", word_inputs, 1)):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{_OP}: {name} is a {type(value).__name__}; expected a torch.Tensor. batch_to_ids makes it."
                )
            if value.dim() <= inner:
                legend = "(batch, tokens, characters)" if name == "inputs" else "(batch, tokens)"
                raise ValueError(
                    f"{_OP}: {name} has shape {tuple(value.shape)}; expected {legend}, or more leading dimensions."
                )
            return tuple(value.shape[:-inner])
        raise ValueError(f"{_OP}: inputs is None; expected character ids, or word_inputs.")

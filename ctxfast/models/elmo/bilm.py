# SPDX-License-Identifier: Apache-2.0
"""ELMo's bidirectional language model: character ids in, every layer out.

Results and names of parameters are AllenNLP's. Beyond it: three rules for the state a text starts from, and models
without skip connections, highways or projections.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._core import torch_ops
from ...nn import tools
from ...nn.elmo_lstm import ElmoLstm
from ...nn.words import add_sentence_marks
from .calibration import SENTENCES
from .character_encoder import ElmoCharacterEncoder, check_right_padded
from .config import ElmoConfig
from .files import STEADY_STATE, elmo_files
from .states import CarriedState, State, SteadyState
from .tokenization import Word, batch_to_ids
from .weights import load_weights

_OP = "ctxfast.Elmo"
# Below this many rows (texts times steps) MKL multiplies a layer's inputs in another order and rounds otherwise.
# Measured for P up to 512 on AVX-512: 16 rows and more agree bit by bit.
_FEWEST_ROWS = 16
_STATES = ("carry", "steady", "zero")
_Path = str | os.PathLike[str]


class ElmoBiLm(tools.NotScriptable):
    """ELMo's language model: character ids to the token layer and every LSTM layer.

    Args:
        config: sizes and switches.
        requires_grad: whether the parameters are trained.
        state: the LSTM state at the start of a text. "carry": from where the same row of the batch before ended
            (AllenNLP; results depend on what came before). "steady": from one fixed state, see ``calibrate``;
            independent of order and batch, and close to "carry". "zero": from zeros. With the last two a text's result
            on the CPU is bitwise the same in every batch, unless the weights are being trained.
        weight_dtype: torch.bfloat16 or torch.int8 for the products of the recurrent layers; see ``ctxfast.lstm``. What
            it costs: vectors off by 0.4 % and 1.8 % of their root mean square (original size, random weights).
        impl: implementation of every op; None chooses.

    Parameters are not initialized for training: ``from_files`` and ``from_weights`` load them.

    Reference: Peters et al. 2018; AllenNLP's _ElmoBiLm.
    """

    ops = (*ElmoCharacterEncoder.ops, "lstm")

    def __init__(
        self,
        config: ElmoConfig,
        requires_grad: bool = False,
        *,
        state: str = "carry",
        weight_dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        if state not in _STATES:
            raise ValueError(f"{_OP}: state is {state!r}; expected one of {', '.join(_STATES)}.")
        self.config, self.state = config, state
        self.num_layers = config.num_layers + 1
        self._token_embedder = ElmoCharacterEncoder(config, requires_grad, impl=impl)
        self._elmo_lstm = ElmoLstm(
            config.projection_dim,
            config.projection_dim,
            config.cell_size,
            config.num_layers,
            requires_grad,
            state_projection_clip_value=config.proj_clip,
            memory_cell_clip_value=config.cell_clip,
            use_skip_connections=config.use_skip_connections,
            has_projection=config.has_lstm_projection,
            weight_dtype=weight_dtype,
            impl=impl,
        )
        self._carried, self._steady = CarriedState(config), SteadyState(config)
        self._word_embedding: nn.Embedding | None = None
        self.register_buffer("_cached_marks", None, persistent=False)

    @classmethod
    def from_weights(
        cls, config: ElmoConfig, state_dict: dict[str, Tensor], requires_grad: bool = False, **kwargs: Any
    ) -> ElmoBiLm:
        """A model around the tensors of ``state_dict`` (see ``load_weights``), which are not copied."""
        with torch.device("meta"):
            model = cls(config, requires_grad, **kwargs)
        model.load_state_dict(state_dict, assign=True)
        return model.requires_grad_(requires_grad)

    @classmethod
    def from_files(
        cls, options_file: _Path, weight_file: _Path, requires_grad: bool = False, **kwargs: Any
    ) -> ElmoBiLm:
        """The model of an options.json and its weights (HDF5, or safetensors of AllenNLP's names); ``kwargs`` as for
        the class.

        With ``state="steady"`` it starts texts from the ``steady_state.safetensors`` beside the weight file, if there
        is one.
        """
        config, state_dict = load_weights(weight_file, ElmoConfig.from_file(options_file))
        model = cls.from_weights(config, state_dict, requires_grad, **kwargs)
        stored = Path(weight_file).parent / STEADY_STATE
        if model.state == "steady" and stored.is_file():
            model.load_steady_state(stored)
        return model

    @classmethod
    def from_pretrained(
        cls, path_or_name: _Path, requires_grad: bool = False, *, download: bool = False, **kwargs: Any
    ) -> ElmoBiLm:
        """The model of a folder or name; ``kwargs`` as for the class.

        Args:
            path_or_name: a folder with options and weights, or a name, see
                ``ctxfast.models.bert.weights.resolve_model``.
            download: fetch a model of the hub that is not on this machine.

        Raises:
            FileNotFoundError: no such model.
            ValueError: the folder holds no ELMo model, or files that do not fit each other.
        """
        return cls.from_files(*elmo_files(path_or_name, download=download), requires_grad, **kwargs)

    def get_output_dim(self) -> int:
        """2P."""
        return self.config.output_dim

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """As the argument."""
        return self._elmo_lstm.weight_dtype

    @property
    def _weight(self) -> Tensor:
        """A parameter: the device and dtype of states."""
        cell: Any = self._elmo_lstm.forward_layer_0
        return cell.state_linearity.weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A steady state belongs to the weights it was calibrated with.
        self._steady.clear()
        super()._load_from_state_dict(*args, **kwargs)

    # States

    def reset_states(self, mask: Tensor | None = None) -> None:
        """Forget the carried states, or set those of the rows where ``mask`` (rows,) is True to zero."""
        self._carried.reset(mask)

    @property
    def carried_state(self) -> State | None:
        """The states that are carried, h (L, 2, rows, P) and c (L, 2, rows, H), or None; may be set, to go on later."""
        return self._carried.held() if self._carried.rows else None

    @carried_state.setter
    def carried_state(self, state: State | None) -> None:
        self._carried.set(state, self._weight)

    @property
    def steady_state(self) -> State | None:
        """The fixed state, h (L, 2, P) and c (L, 2, H); None before it was calibrated or loaded; may be set."""
        return self._steady.held() if self._steady.is_set else None

    @steady_state.setter
    def steady_state(self, state: State | None) -> None:
        if state is None:
            self._steady.clear()
        else:
            self._steady.set(state, self._weight)

    def save_steady_state(self, path: _Path) -> None:
        """Write the steady state (safetensors ``h``, ``c``), which is not part of the state_dict."""
        self._steady.save(path, self._weights_digest())

    def load_steady_state(self, path: _Path) -> None:
        """Read what ``save_steady_state`` wrote for these weights."""
        self._steady.load(path, self._weight, self._weights_digest())

    def _weights_digest(self) -> str:
        """SHA-256 of a row of every recurrent matrix: training changes them, and files keep their bits."""
        digest = hashlib.sha256()
        for name, value in sorted(self._elmo_lstm.named_parameters()):
            if name.endswith("state_linearity.weight"):
                digest.update(value[0].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def calibrate(self, sentences: Iterable[Sequence[Word]] | None = None, *, lanes: int = 4) -> State:
        """Make the steady state: the mean of the states a running text leaves behind.

        Args:
            sentences: tokenised sentences of running text, a few dozen of the kind the model will see; None for a
                built-in English text.
            lanes: sentences are read in this many rows in parallel, each carrying its state from one to the next.

        Returns:
            The state that is used from now on with ``state="steady"``.

        The first sentence of a lane starts from zeros, so it does not count where the lane has more.
        """
        texts = [list(sentence) for sentence in (SENTENCES if sentences is None else sentences)]
        if not texts:
            raise ValueError(
                f"{_OP}: sentences to calibrate on is empty; expected tokenised sentences of running text."
            )
        like, lstm = self._weight, self._elmo_lstm
        lanes = min(lanes, len(texts))
        lane_steps = [texts[start : start + lanes] for start in range(0, len(texts), lanes)]
        training, lstm.training = lstm.training, False  # no recurrent dropout
        carried: State | None = None
        totals: list[Tensor] = []
        count = 0
        try:
            with torch.autocast(like.device.type, enabled=False):
                for step, batch in enumerate(lane_steps):
                    ids = batch_to_ids(batch, max_characters=self.config.max_characters)
                    tokens, mask = self._tokens(ids.to(like.device), None)
                    if carried is not None:
                        carried = (carried[0][:, :, : len(batch)], carried[1][:, :, : len(batch)])
                    _, carried = lstm.layers(tokens, mask.sum(1), carried)
                    if step == 0 and len(lane_steps) > 1:
                        continue
                    sums = [value.double().sum(2) for value in carried]
                    totals = [a + b for a, b in zip(totals, sums)] if totals else sums
                    count += len(batch)
        finally:
            lstm.training = training
        h, c = totals
        self._steady.set((h / count, c / count), like)
        return self._steady.held()

    # Words

    @torch.no_grad()
    def cache_vocabulary(self, words: Sequence[Word]) -> None:
        """Compute the token vectors of a vocabulary once; ``word_inputs`` then looks them up.

        Args:
            words: the vocabulary in the order of its ids. Id 0 is padding, whatever word stands there.
        """
        encoder = self._token_embedder
        ids = batch_to_ids([[word] for word in words], max_characters=self.config.max_characters)
        table = [encoder.encode(part, batch_invariant=True) for part in ids[:, 0].to(encoder._marks.device).split(1024)]
        weight = torch.cat(table)
        weight[0] = 0
        is_trained = encoder._char_embedding_weights.requires_grad
        if is_trained:
            warnings.warn(
                f"{_OP}: requires_grad is set and a vocabulary is cached: cached words are trained as a table, all "
                f"others through their characters.",
                stacklevel=3,
            )
        self._word_embedding = nn.Embedding.from_pretrained(weight, freeze=not is_trained, padding_idx=0)
        self._cached_marks = encoder.mark_vectors(batch_invariant=True)

    def _is_batch_invariant(self) -> bool:
        """Whether a text's result is to be bitwise independent of its batch: on the CPU, unless weights are trained.

        Possible only where every text starts from the same state.
        """
        weight = self._weight
        is_trained = torch.is_grad_enabled() and weight.requires_grad
        is_traced = torch.compiler.is_compiling() or torch_ops.is_jit_tracing()
        return self.state != "carry" and weight.device.type == "cpu" and not is_trained and not is_traced

    def _tokens(self, inputs: Tensor | None, word_inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token vectors (B, T + 2, P) with sentence marks, and their mask."""
        encoder = self._token_embedder
        is_invariant = self._is_batch_invariant()
        if word_inputs is None:
            found = encoder(inputs, batch_invariant=is_invariant)
            return found["token_embedding"], found["mask"]
        mask = word_inputs > 0
        check_right_padded(mask, "word_inputs")
        assert self._word_embedding is not None
        size = self._word_embedding.num_embeddings
        is_cached = word_inputs < size
        vectors = self._word_embedding(torch.where(is_cached, word_inputs, 0))
        unknown = ~is_cached
        if bool(unknown.any()):  # reads the device: a vocabulary with unknown words cannot do without
            if inputs is None:
                raise ValueError(
                    f"{_OP}: word_inputs holds {int(word_inputs.max())}, outside the cached vocabulary of {size} "
                    f"words; expected inputs beside it, the characters of such words."
                )
            found = encoder.encode_unique(inputs[unknown], batch_invariant=is_invariant)
            vectors = vectors.masked_scatter(unknown[:, :, None], found.to(vectors.dtype))
        begin, end = self._cached_marks.to(vectors)
        return add_sentence_marks(vectors, mask, begin, end)

    @tools.fx_leaf
    def forward(self, inputs: Tensor | None, word_inputs: Tensor | None = None) -> dict[str, Tensor | list[Tensor]]:
        """Run the language model.

        Args:
            inputs: (B, T, C) int64 character ids, see ``batch_to_ids``; right-padded with zero rows.
            word_inputs: (B, T) int64 ids of the cached vocabulary, 0 for padding; an id past its end is a word whose
                characters are read from ``inputs``.

        Returns:
            ``activations``: L + 1 tensors (B, T + 2, 2P), the token layer first, sentence marks included, zeros at
            padding; ``mask``: (B, T + 2) bool.

        Raises:
            ValueError: wrong shapes, left padding, word ids without a cached vocabulary or without characters.
            TypeError: ids that are not integers.
        """
        self._check(inputs, word_inputs)
        self._elmo_lstm.check_cells()
        if self.state == "steady" and not self._steady.is_set:
            self.calibrate()
        tokens, mask = self._tokens(inputs, word_inputs)
        layers = self._lstm_layers(tokens, mask.sum(1))
        tokens = tokens.masked_fill(~mask[:, :, None], 0.0)
        return {"activations": [torch.cat([tokens, tokens], -1), *layers], "mask": mask}

    def _lstm_layers(self, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
        """Every LSTM layer (B, T + 2, 2P), from the state that is asked for."""
        batch, steps, size = tokens.shape
        if self.state == "carry":
            if torch_ops.is_jit_tracing():
                raise RuntimeError(
                    f"{_OP}: state is 'carry' under torch.jit.trace, whose graph keeps nothing from call to call; "
                    f"expected a model made with state='steady' or 'zero'."
                )
            layers, final = self._elmo_lstm.layers(tokens, lengths, self._carried.take(batch, self._weight))
            self._carried.put(final)
            return layers
        missing = -(-_FEWEST_ROWS // steps) - batch if batch and self._is_batch_invariant() else 0
        if missing > 0:  # texts of length 0 cost next to nothing
            tokens = torch.cat([tokens, tokens.new_zeros(missing, steps, size)])
            lengths = torch.cat([lengths, lengths.new_zeros(missing)])
        start = self._steady.take(tokens.shape[0], self._weight) if self.state == "steady" else None
        layers, _ = self._elmo_lstm.layers(tokens, lengths, start)
        return [layer[:batch] for layer in layers] if missing > 0 else layers

    def _check(self, inputs: Tensor | None, word_inputs: Tensor | None) -> None:
        width = self.config.max_characters
        for name, value in (("inputs", inputs), ("word_inputs", word_inputs)):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
                kind = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{_OP}: {name} has {kind}; expected int64 ids, as batch_to_ids makes.")
        if inputs is not None and (inputs.dim() != 3 or inputs.shape[2] != width):
            raise ValueError(
                f"{_OP}: inputs has shape {tuple(inputs.shape)}; expected (batch, tokens, characters) = (any, any, "
                f"{width}). batch_to_ids(sentences, max_characters={width}) makes it."
            )
        if word_inputs is None:
            if inputs is None:
                raise ValueError(f"{_OP}: inputs is None; expected character ids, or word_inputs.")
            return
        if self._word_embedding is None:
            raise ValueError(
                f"{_OP}: word_inputs was given; expected None without a cached vocabulary. Pass vocab_to_cache."
            )
        expected = tuple(inputs.shape[:2]) if inputs is not None else None
        if word_inputs.dim() != 2 or (expected is not None and tuple(word_inputs.shape) != expected):
            raise ValueError(
                f"{_OP}: word_inputs has shape {tuple(word_inputs.shape)}; expected (batch, tokens)"
                f"{f' = {expected}, as inputs' if expected else ''}."
            )

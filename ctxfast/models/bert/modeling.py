# SPDX-License-Identifier: Apache-2.0
"""The encoder of BERT and kin (RoBERTa, ERNIE, DistilBERT, ELECTRA, MPNet) over packed tokens: no padding is computed
anywhere inside.

Names of parameters and state_dict are those of Hugging Face's BertModel. Differences from it, by design: outputs at
padding are zero, and the pooler reads a text's first real token (with left padding, column 0 holds none). With
``padding="keep"`` there are none: every row is computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..._core import checks
from ...nn import Embeddings, TransformerLayer, encoder, relative, tools
from ...nn.all_rows import AllRows
from ...nn.embeddings import roberta_position_ids
from ...nn.graphs import PackedGraphs
from ...nn.transformer import CachedLayers
from ...packing import Packing
from .attentions import attention_weights
from .config import BertConfig
from .pretrained import Pretrained

_OP = "Bert"
PADDING = ("zero", "keep")


class BertOutput(NamedTuple):
    """What ``Bert`` returns. B texts, L columns, T real tokens, N hidden size, K layers.

    Attributes:
        last_hidden_state: (B, L, N), zeros at padding (``padding="keep"``: Hugging Face's values); None with
            ``return_packed``.
        pooler_output: (B, N), zeros for a text without tokens; None without a pooler.
        hidden_states: K + 1 of (B, L, N), the embeddings first; None unless asked for, or with ``return_packed``.
        packing: where each packed row stands in the batch; with ``padding="keep"`` every row counts
            as a token, here and below.
        packed_last_hidden_state: (T, N).
        packed_hidden_states: K + 1 of (T, N); None unless ``output_hidden_states``.
        attentions: K of (B, H, L, L), H heads: the share of each query (row) that goes to each key, zeros at padding;
            None unless ``output_attentions``.
    """

    last_hidden_state: Tensor | None
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    packing: Packing
    packed_last_hidden_state: Tensor
    packed_hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None = None


class Encoder(nn.Module):
    """The layers, one after another: ``layer.0``, ``layer.1``, ..."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            TransformerLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                activation=config.activation,
                eps=config.layer_norm_eps,
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
            )
            for _ in range(config.num_hidden_layers)
        )
        if not config.family.drops_projection:
            layer: Any
            for layer in self.layer:
                layer.attention.output.LayerNorm.dropout = 0.0
        self.relative_attention_bias = None
        if config.relative_buckets:
            self.relative_attention_bias = nn.Embedding(config.relative_buckets, config.num_attention_heads)
        self.gradient_checkpointing = False
        self._cached_layers = CachedLayers()

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        output_hidden_states: bool = True,
        rows: AllRows | None = None,
    ) -> list[Tensor]:
        """(T, N) -> the input and the output of every layer, or the last output alone, (T, N) each.

        With ``rows``, x holds every row of a padded batch.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            layers, recompute = list(self.layer), partial(checkpoint, use_reentrant=False)
        else:
            layers, recompute = self._cached_layers(self.layer), None
        return encoder.run(
            layers, x, cu_seqlens, max_seqlen, all_layers=output_hidden_states, rows=rows, recompute=recompute,
            relative_bias=self.relative_bias(),
        )  # fmt: skip

    def relative_bias(self) -> Tensor | None:
        """What every layer adds to attention scores, see ``functional.attention``; None for nothing."""
        buckets = self.relative_attention_bias
        return None if buckets is None else relative.relative_bias(buckets.weight)


class Pooler(nn.Module):
    """``activation(W h + b)`` of each text's first token. Parameters: ``dense.{weight,bias}``."""

    def __init__(self, hidden_size: int, activation: str = "tanh") -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = activation

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(T, N) packed tokens -> (B, N); zeros for a text without tokens."""
        pooled = tools.linear(packing.first(x), self.dense, self.activation)
        if not packing.has_empty:
            return pooled
        is_empty = packing.cu_seqlens[1:] == packing.cu_seqlens[:-1]
        return pooled.masked_fill(is_empty[:, None], 0.0)

    def of_sequences(self, x: Tensor, cu_seqlens: Tensor, has_empty: bool) -> Tensor:
        """The same of packed sequences, (T, N) and (S + 1,) -> (S, N), for a CUDA graph; rows of those without tokens
        are anything unless ``has_empty``."""
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        # Where the last ones are empty they start past the end.
        pooled = tools.linear(x.index_select(0, starts.clamp(max=x.shape[0] - 1)), self.dense, self.activation)
        return pooled.masked_fill((starts == ends)[:, None], 0.0) if has_empty else pooled


class Bert(Pretrained):
    """BERT's encoder; with a config of another model type (RoBERTa, DistilBERT, ELECTRA, ...), theirs.

    Args:
        config: sizes and options.
        add_pooling_layer: whether there is a pooler (``pooler_output`` is None without).
        padding: the values at padding, in the outputs and in the heads' results. "zero": zeros; nothing is computed
            there. "keep": the values of Hugging Face's model with its default "sdpa" attention (a text without tokens
            attends to nothing); every row is computed, and the pooler reads column 0. Needed by code that reads padded
            rows: late interaction, unpacked LSTMs, convolutions, losses over padding. The attribute ``padding`` can be
            set, and overridden per call.

    The state_dict has exactly the names of Hugging Face's BertModel, whatever the model type (ELECTRA's
    ``embeddings_project`` beside them); files have each type's own. Weights are initialized likewise: normal with
    standard deviation ``initializer_range``, biases 0, LayerNorm 1 and 0, padding rows 0.
    ``gradient_checkpointing_enable()`` recomputes each layer in the backward pass instead of keeping its activations.

    On a GPU, calls without gradients go through CUDA graphs from the second call of a size on (sizes
    are rounded up to buckets); ``cuda_graphs = False`` turns that off.

    Reference: Devlin et al. 2019; Liu et al. 2019 (RoBERTa); Sun et al. 2020 (ERNIE 2.0); Sanh et al. 2019
    (DistilBERT); Clark et al. 2020 (ELECTRA).
    """

    _file_prefix = "bert."
    ops = ("embed_layer_norm", *TransformerLayer.ops)

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True, padding: str = "zero") -> None:
        super().__init__(config)
        self.padding = padding
        self.embeddings = Embeddings(
            config.vocab_size,
            config.embedding_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            task_type_vocab_size=config.task_type_vocab_size if config.use_task_id else None,
            padding_idx=config.pad_token_id,
            position_padding_idx=config.pad_token_id if config.is_roberta else None,
            eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.embeddings_project = None
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config.hidden_size, config.family.pooler) if add_pooling_layer else None
        self.cuda_graphs = True
        self._graphs = PackedGraphs()
        self.init_weights(self)

    @property
    def padding(self) -> str:
        """The values at padding, "zero" or "keep"."""
        return self._padding

    @padding.setter
    def padding(self, padding: str) -> None:
        self._check_padding(padding)
        self._padding = padding

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        gelu: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        add_pooling_layer: bool | None = None,
        padding: str = "zero",
        download: bool = False,
    ) -> Bert:
        """Reads a model from files; the result is in eval mode.

        Args:
            path_or_name: a Hugging Face directory, a weight file, a TensorFlow checkpoint, the name of an installed
                package with a model, or a name of Hugging Face's hub (see ``weights.resolve_model``).
            gelu: "erf" or "tanh" instead of the config's.
            dtype: of the parameters; None for that of the word table in the file.
            device: None for the CPU.
            add_pooling_layer: None for a pooler if the file has one (DistilBERT and ELECTRA have none); True makes one,
                with a warning, if not.
            padding: "zero" or "keep", see the class.
            download: fetch a model of the hub that is not on this machine.

        Raises:
            FileNotFoundError, ValueError: as ``load_checkpoint``.
            ConnectionError: the hub cannot be reached.
        """
        checks.choice(_OP, "padding", padding, PADDING)
        read = cls._read(path_or_name, gelu, download)
        if add_pooling_layer is None:
            add_pooling_layer = read.config.family.pools and "bert.pooler.dense.weight" in read.state_dict
        return cls._from_checkpoint(read, dtype, device, add_pooling_layer=add_pooling_layer, padding=padding)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """torch.int8 after ``quantize``: how both factors of the encoder's products are held; None for as they are."""
        return getattr(self.encoder.layer[0].intermediate, "weight_dtype", None)

    def quantize(self, kind: str | None = "int8") -> Bert:
        """Computes the encoder's linear layers with int8 products on the CPU, for inference; returns the model.

        The parameters and the state_dict are unchanged: int8 copies are made on first use, and again whenever the
        weights change. Embeddings, attention, LayerNorm and the pooler keep their precision.

        Args:
            kind: "int8", or None to undo it.

        Raises:
            ValueError: another kind.

        Numerics: see ``functional.linear_act``, weight_dtype. Mean-pooled MiniLM vectors of 100 real sentences keep a
        cosine of 0.997 to the float32 model's on average, 0.993 at the least (tests/models/test_bert_int8.py).
        """
        kinds = {None: None, "int8": torch.int8}
        if kind not in kinds:
            raise ValueError(f"ctxfast.Bert.quantize: kind is {kind!r}; expected 'int8' or None.")
        for module in self.encoder.modules():
            if hasattr(module, "weight_dtype"):
                module.weight_dtype = kinds[kind]
        return self

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass (training mode only): less memory, about a third more time."""
        self.encoder.gradient_checkpointing = enabled

    @tools.fx_leaf
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_packed: bool = False,
        padding: str | None = None,
        check_inputs: bool = False,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> BertOutput:
        """Encodes a padded batch. Padding is not computed unless it is kept.

        Args:
            input_ids: (B, L) int64 or int32.
            attention_mask: (B, L), 1 for a token, 0 for padding, anywhere in a row (MPNet: not between a text's tokens,
                which is checked as ids are); None for all tokens. How many
                tokens there are is read from it: on a GPU the host waits once, until all that it was given before is
                done, and never for ``lengths`` or without a mask.
            token_type_ids: (B, L); None for 0. A model without token types (DistilBERT) does not read them.
            position_ids: (B, L) or (1, L); None for the column (RoBERTa: count of non-padding ids, from
                ``pad_token_id + 1``).
            task_type_ids: (B, L), ERNIE's; None for 0.
            output_hidden_states: also return the embeddings and every layer.
            output_attentions: also return every layer's attention weights, before any dropout, made in plain PyTorch
                from the hidden states beside the fused pass, whose results stay as they are: to look at.
            return_packed: leave results packed: ``last_hidden_state`` and ``hidden_states`` are None.
            padding: "zero" or "keep" for this call, see the class; None for the model's own.
            check_inputs: check ids against the embedding tables on a GPU too, which synchronizes; always done on a CPU.
            lengths: in place of ``attention_mask`` where padding stands on the right: (B,) tokens of each text, a
                sequence of integers or an int64 or int32 tensor on the CPU (from a tensor on a GPU they are read back).

        Returns:
            A ``BertOutput``. Rows of padding are zero, or Hugging Face's with ``padding="keep"``.

        Raises:
            TypeError: wrong dtypes and kinds.
            ValueError: wrong shapes or devices, ids outside their table, a sequence longer than the position table,
                ``return_packed`` or ``output_attentions`` with ``padding="keep"``.
        """
        keeps = self.keeps_padding(padding)
        if keeps and output_attentions:
            raise ValueError(
                "ctxfast.Bert: output_attentions is True; expected False with padding='keep': weights are of real "
                "tokens alone. Pass padding='zero' in this call."
            )
        if keeps and return_packed:
            raise ValueError(
                "ctxfast.Bert: return_packed is True; expected False with padding='keep', whose results are padded "
                "ones. Leave one of them out."
            )
        self._check(input_ids, attention_mask, token_type_ids, position_ids, task_type_ids, check_inputs)
        batch_size, seqlen = input_ids.shape
        rows = None
        if lengths is not None:
            packing = self._packing_of(lengths, attention_mask, input_ids)
        elif attention_mask is None:
            packing = Packing.full(batch_size, seqlen, input_ids.device)
        else:
            packing = Packing.from_mask(attention_mask)
        if keeps and not packing.is_full:
            rows, packing = AllRows.of(packing), Packing.full(batch_size, seqlen, input_ids.device)
        if position_ids is not None:
            positions = packing.pack(position_ids.expand(batch_size, seqlen))
        elif self.config.is_roberta:
            positions = packing.pack(roberta_position_ids(input_ids, self.config.pad_token_id))
        else:
            positions = packing.columns
        tokens = (
            packing.pack(input_ids),
            positions,
            None if token_type_ids is None else packing.pack(token_type_ids),
            None if task_type_ids is None else packing.pack(task_type_ids),
        )

        pooler: Any = self.pooler
        pools = type(pooler) is Pooler
        has_empty = packing.has_empty
        wants_states = output_hidden_states or output_attentions

        def encode(tokens: Sequence[Tensor | None], cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
            x = self.embeddings(*tokens)
            if self.embeddings_project is not None:
                x = tools.linear(x, self.embeddings_project)
            states = self.encoder(x, cu_seqlens, max_seqlen, wants_states, rows)
            if not pools:
                return states
            if cu_seqlens is packing.cu_seqlens:
                return [*states, pooler(states[-1], packing)]
            return [*states, pooler.of_sequences(states[-1], cu_seqlens, has_empty)]

        graphs = self._graphs if self.cuda_graphs and rows is None else None
        states = encoder.encode(
            encode, self, graphs, tokens, packing.cu_seqlens, packing.max_seqlen,
            flags=(wants_states, has_empty), per_sequence=int(pools),
        )  # fmt: skip
        if pools:
            *states, pooled = states
        else:
            pooled = None if self.pooler is None else self.pooler(states[-1], packing)
        last = states[-1]
        packed_states = tuple(states) if output_hidden_states else None
        hidden_states = None
        if output_hidden_states and not return_packed:
            hidden_states = tuple(packing.unpack(state) for state in states)
        if return_packed:
            last_hidden_state = None
        else:
            last_hidden_state = hidden_states[-1] if hidden_states else packing.unpack(last)
        return BertOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=hidden_states,
            packing=packing,
            packed_last_hidden_state=last,
            packed_hidden_states=packed_states,
            attentions=self._attentions(states, packing) if output_attentions else None,
        )

    def _attentions(self, states: Sequence[Tensor], packing: Packing) -> tuple[Tensor, ...]:
        return attention_weights(list(self.encoder.layer), states, packing, self.encoder.relative_bias())

    @staticmethod
    def _packing_of(lengths: Sequence[int] | Tensor, attention_mask: Tensor | None, input_ids: Tensor) -> Packing:
        if attention_mask is not None:
            raise ValueError("ctxfast.Bert: lengths and attention_mask are both given; expected one of them.")
        batch_size, seqlen = input_ids.shape
        if len(lengths) != batch_size:
            raise ValueError(
                f"ctxfast.Bert: lengths has {len(lengths)} entries; expected {batch_size}, one for each row of "
                f"input_ids."
            )
        return Packing.from_lengths(lengths, seqlen, input_ids.device)

    def keeps_padding(self, padding: str | None = None) -> bool:
        """Whether a call with this argument computes rows at padding too."""
        if padding is None:
            return self.padding == "keep"
        self._check_padding(padding)
        return padding == "keep"

    def _check_padding(self, padding: str) -> None:
        checks.choice(_OP, "padding", padding, PADDING)
        if padding == "keep" and self.config.relative_buckets:
            raise ValueError(
                f"ctxfast.Bert: padding is 'keep'; expected 'zero' for {self.config.model_type}, whose attention goes "
                f"by distances, which rows at padding have to no text."
            )

    def _check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        task_type_ids: Tensor | None,
        check_inputs: bool,
    ) -> None:
        config, table = self.config, self.embeddings.word_embeddings.weight
        checks.integer(_OP, "input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(
                f"ctxfast.Bert: input_ids has shape {tuple(input_ids.shape)}; expected (batch, "
                f"seqlen). One text alone is input_ids[None]."
            )
        batch_size, seqlen = input_ids.shape
        if seqlen > config.max_length and position_ids is None:
            raise ValueError(
                f"ctxfast.Bert: input_ids has {seqlen} columns; expected at most {config.max_length}, the positions of "
                "this model. Truncate the text or split it into windows."
            )
        if task_type_ids is not None and not config.use_task_id:
            raise ValueError(
                "ctxfast.Bert: task_type_ids is given; expected None, as this model has no task "
                "embedding (use_task_id)."
            )
        if attention_mask is not None:
            checks.tensor(_OP, "attention_mask", attention_mask)
            if attention_mask.shape != input_ids.shape:
                hint = ""
                if attention_mask.dim() > 2:
                    hint = " Masks that differ by query (decoder masks) are not supported."
                raise ValueError(
                    f"ctxfast.Bert: attention_mask has shape {tuple(attention_mask.shape)}; "
                    f"expected (batch, seqlen) = {tuple(input_ids.shape)}.{hint}"
                )
            checks.same(_OP, "the model", table, [("attention_mask", attention_mask)], dtype=False)
            if config.relative_buckets and (check_inputs or checks.is_readable(attention_mask)):
                real = attention_mask != 0
                begins = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
                if bool((begins > 1).any()):
                    raise ValueError(
                        f"ctxfast.Bert: attention_mask has zeros between a text's tokens; expected none for "
                        f"{config.model_type}, whose attention goes by distances. Take these tokens out of input_ids."
                    )
        ids = {
            "input_ids": (input_ids, config.vocab_size),
            "token_type_ids": (token_type_ids, config.type_vocab_size),
            "position_ids": (position_ids, config.max_position_embeddings),
            "task_type_ids": (task_type_ids, config.task_type_vocab_size),
        }
        for name, (value, rows) in ids.items():
            if value is None:
                continue
            checks.integer(_OP, name, value)
            if not (name == "position_ids" and tuple(value.shape) == (1, seqlen)):
                checks.shape(_OP, name, value, (batch_size, seqlen), "(batch, seqlen)")
            checks.same(_OP, "the model", table, [(name, value)], dtype=False)
            if rows == 0:
                continue
            if check_inputs and value.device.type != "cpu":
                value = value.cpu()
            hint = f"The model has {rows} rows for them."
            checks.in_range(_OP, name, value, 0, rows - 1, hint)

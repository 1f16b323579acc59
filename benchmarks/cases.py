# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: one row per (op or model, workload, sizes), spread over dtypes, passes and devices.

A row's inputs are the keyword arguments of the op's public function, so whatever is registered for the op runs it.
Inputs are drawn on the CPU in float32 from a fixed seed and only then moved and rounded: every device and dtype sees
the same numbers. Letters are those of ``ctxfast.functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .work import ELMO_ALPHABET, ELMO_CHARACTERS, ELMO_DEPTH, ELMO_FILTERS, Work, op_work, ragged_lengths

SEED = 20180215
MODELS = ("bert", "bert_mlm", "elmo")

# 32 texts as a sentence encoder meets them: the longest fills 121 columns, together they fill 0.39 of the rectangle.
RAGGED_32 = (
    121, 104, 96, 88, 82, 76, 71, 67, 63, 60, 57, 54, 51, 48, 46, 44,
    41, 39, 37, 35, 33, 31, 29, 27, 24, 22, 20, 18, 15, 12, 9, 7,
)  # fmt: skip

# Mean 47 too, but with a few that fill the model's positions.
LONG_TAIL_256 = tuple(512 if i % 64 == 0 else RAGGED_32[i * 7 % 32] * 5 // 6 for i in range(256))

ELMO = dict(I=512, H=4096, P=512, clip=3.0)


@dataclass(frozen=True)
class Row:
    """One line of the table below.

    ``passes``: "f" forward, "fb" forward and backward. ``size``: "small" rows are run by the small and the full set.
    ``cpu`` and ``cuda`` list the dtypes measured there; an empty one leaves the device out. "float32+bf16" and
    "float32+int8" stand for float32 inputs with ``weight_dtype=torch.bfloat16`` and ``torch.int8``.
    """

    op: str
    workload: str
    sizes: dict[str, Any]
    size: str = "full"
    passes: tuple[str, ...] = ("f",)
    cpu: tuple[str, ...] = ("float32",)
    cuda: tuple[str, ...] = ("float16", "bfloat16")


_EVERY_WEIGHT = ("float32", "float32+bf16", "float32+int8")
_EVERY_BERT = ("float32", "bfloat16", "float32+int8")


def _bilstm_rows() -> Iterator[Row]:
    """Plain biLSTMs as taggers and parsers have them, T = 128, over sizes and batches; trained ones too."""
    for hidden in (256, 512, 1024):
        for batch in (1, 8, 16, 32, 128):
            passes = ("f",) if batch == 16 else ("f", "fb")
            for ragged in (False, True) if batch > 1 else (False,):
                name = f"biLSTM H{hidden} B{batch} T128" + " packed" * ragged
                sizes = dict(B=batch, T=128, R=2, I=512, H=hidden, ragged=ragged)
                yield Row("lstm", name, sizes, cpu=(), cuda=("float16",), passes=passes)


ROWS: tuple[Row, ...] = (
    # lstm
    Row("lstm", "elmo-original one direction B1 T32", dict(B=1, T=32, R=1, **ELMO), "small", cpu=_EVERY_WEIGHT),
    Row("lstm", "elmo-original one direction B8 T32", dict(B=8, T=32, R=1, **ELMO), cpu=_EVERY_WEIGHT),
    Row("lstm", "elmo-original one direction B32 T32", dict(B=32, T=32, R=1, **ELMO), cpu=_EVERY_WEIGHT),
    Row("lstm", "elmo-original both directions B1 T32", dict(B=1, T=32, R=2, **ELMO), cpu=_EVERY_WEIGHT, cuda=()),
    Row("lstm", "elmo-original both directions B32 T32 ragged",
        dict(B=32, T=32, R=2, ragged=True, **ELMO), cpu=_EVERY_WEIGHT),
    Row("lstm", "elmo-original both directions B1 T128", dict(B=1, T=128, R=2, **ELMO), "small", cpu=()),
    Row("lstm", "elmo-original both directions B8 T128", dict(B=8, T=128, R=2, **ELMO), cpu=()),
    Row("lstm", "elmo-original both directions B32 T128", dict(B=32, T=128, R=2, **ELMO), cpu=(), passes=("f", "fb")),
    Row("lstm", "elmo-original both directions B128 T128", dict(B=128, T=128, R=2, **ELMO), cpu=(), passes=("f", "fb")),
    Row("lstm", "elmo-original both directions B8 T128", dict(B=8, T=128, R=2, **ELMO), cpu=(), passes=("fb",)),
    Row("lstm", "elmo-original both directions B32 T128 packed",
        dict(B=32, T=128, R=2, ragged=True, **ELMO), cpu=(), passes=("f", "fb")),
    Row("lstm", "elmo-original one direction B8 T16", dict(B=8, T=16, R=1, **ELMO), passes=("fb",), cuda=()),
    Row("lstm", "biLSTM H512 B8 T32", dict(B=8, T=32, R=2, I=512, H=512), "small"),
    Row("lstm", "biLSTM H512 B8 T32", dict(B=8, T=32, R=2, I=512, H=512), passes=("fb",)),
    Row("lstm", "biLSTM H512 B32 T32 ragged", dict(B=32, T=32, R=2, I=512, H=512, ragged=True)),
    Row("lstm", "biLSTM H256 B1 T32", dict(B=1, T=32, R=2, I=512, H=256), cuda=()),
    Row("lstm", "biLSTM H1024 B1 T32", dict(B=1, T=32, R=2, I=512, H=1024), cuda=()),
    *_bilstm_rows(),
    # attention
    Row("attention", "bert-base 8x128", dict(lengths=(128,) * 8, H=12, D=64), "small", cpu=("float32", "bfloat16")),
    Row("attention", "bert-base 8x128", dict(lengths=(128,) * 8, H=12, D=64), passes=("fb",)),
    Row("attention", "minilm ragged 32 (fill 0.39)", dict(lengths=RAGGED_32, H=12, D=32), "small",
        cpu=("float32", "bfloat16")),
    Row("attention", "minilm ragged 32 (fill 0.39)", dict(lengths=RAGGED_32, H=12, D=32), passes=("fb",)),
    Row("attention", "bert-base 1x128", dict(lengths=(128,), H=12, D=64), cpu=("float32", "bfloat16")),
    Row("attention", "bert-base 4x512", dict(lengths=(512,) * 4, H=12, D=64), cpu=("float32", "bfloat16"), cuda=()),
    Row("attention", "bert-base 64x128", dict(lengths=(128,) * 64, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("attention", "bert-base 64x128 dropout", dict(lengths=(128,) * 64, H=12, D=64, dropout=0.1), cpu=(),
        passes=("fb",)),
    Row("attention", "bert-base 256x128", dict(lengths=(128,) * 256, H=12, D=64), cpu=()),
    Row("attention", "bert-base 32x512", dict(lengths=(512,) * 32, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("attention", "bert-base 32x512 dropout", dict(lengths=(512,) * 32, H=12, D=64, dropout=0.1), cpu=(),
        passes=("fb",)),
    Row("attention", "bert-base ragged 256", dict(lengths=RAGGED_32 * 8, H=12, D=64), cpu=(), passes=("f", "fb")),
    Row("attention", "bert-base ragged 256 dropout", dict(lengths=RAGGED_32 * 8, H=12, D=64, dropout=0.1), cpu=(),
        passes=("fb",)),
    Row("attention", "bert-base ragged 256 to 512", dict(lengths=LONG_TAIL_256, H=12, D=64), cpu=(),
        passes=("f", "fb")),
    Row("attention", "minilm 64x128", dict(lengths=(128,) * 64, H=12, D=32), cpu=(), passes=("f", "fb")),
    Row("attention", "minilm ragged 1024", dict(lengths=RAGGED_32 * 32, H=12, D=32), cpu=(), passes=("f", "fb")),
    Row("attention", "minilm 1024x16", dict(lengths=(16,) * 1024, H=12, D=32), cpu=(), passes=("f", "fb")),
    # the rest of an encoder layer
    Row("add_layer_norm", "bert-base 1024 rows", dict(T=1024, N=768), "small"),
    Row("add_layer_norm", "bert-base 1024 rows", dict(T=1024, N=768), passes=("fb",)),
    Row("add_layer_norm", "bert-base 16384 rows", dict(T=16384, N=768), cpu=(), passes=("f", "fb")),
    Row("linear_act", "bert-base FFN up 128 rows", dict(T=128, N=768, M=3072, activation="gelu"), "small"),
    Row("linear_act", "bert-base FFN up 1024 rows", dict(T=1024, N=768, M=3072, activation="gelu"),
        cpu=("float32", "bfloat16")),
    Row("linear_act", "bert-base FFN up 16384 rows", dict(T=16384, N=768, M=3072, activation="gelu"), cpu=(),
        passes=("f", "fb")),
    Row("linear_act", "bert-base FFN down 128 rows", dict(T=128, N=3072, M=768, activation="none"), "small"),
    Row("linear_act", "bert-base FFN down 1024 rows", dict(T=1024, N=3072, M=768, activation="none"),
        cpu=("float32", "bfloat16")),
    Row("embed_layer_norm", "bert-base 1024 tokens", dict(T=1024, N=768, V=30522), "small"),
    Row("embed_layer_norm", "bert-base 16384 tokens", dict(T=16384, N=768, V=30522), cpu=(), passes=("f", "fb")),
    Row("linear_cross_entropy", "bert-base MLM 20 of 128 rows", dict(T=128, labelled=20, N=768, V=30522), "small"),
    Row("linear_cross_entropy", "bert-base MLM 20 of 128 rows", dict(T=128, labelled=20, N=768, V=30522),
        passes=("fb",)),
    Row("linear_cross_entropy", "bert-base MLM 2457 of 16384 rows", dict(T=16384, labelled=2457, N=768, V=30522),
        cpu=(), passes=("f", "fb")),
    Row("transformer_layers", "minilm 1x16", dict(lengths=(16,), N=384, H=12, M=1536, K=6), "small", cpu=_EVERY_BERT,
        cuda=()),
    Row("transformer_layers", "bert-base 1x16, one layer", dict(lengths=(16,), N=768, H=12, M=3072, K=1), "small",
        cpu=_EVERY_BERT, cuda=()),
    Row("transformer_layers", "bert-base 1x128, one layer", dict(lengths=(128,), N=768, H=12, M=3072, K=1),
        cpu=_EVERY_BERT),
    Row("transformer_layers", "bert-base ragged 32 (fill 0.39), one layer",
        dict(lengths=RAGGED_32, N=768, H=12, M=3072, K=1), cpu=_EVERY_BERT, cuda=()),
    # ELMo around its LSTM
    Row("char_cnn", "elmo-original 32 words", dict(W=32), "small"),
    Row("char_cnn", "elmo-original 256 words", dict(W=256)),
    Row("char_cnn", "elmo-original 4096 words", dict(W=4096), cpu=()),
    Row("scalar_mix", "elmo 3 layers 32x32", dict(K=3, B=32, T=32, N=1024), "small"),
    Row("scalar_mix", "bert-base 13 layers 8x128", dict(K=13, B=8, T=128, N=768), "small"),
    # whole models, random weights
    Row("elmo", "original 1x20 words", dict(B=1, words=20), "small", cpu=_EVERY_WEIGHT),
    Row("elmo", "original 32x20 words", dict(B=32, words=20), cpu=_EVERY_WEIGHT),
    Row("bert", "minilm 1x16", dict(model="minilm", lengths=(16,)), "small", cpu=_EVERY_BERT),
    Row("bert", "minilm 1x128", dict(model="minilm", lengths=(128,)), "small", cpu=_EVERY_BERT),
    Row("bert", "minilm 8x128", dict(model="minilm", lengths=(128,) * 8), cpu=("float32", "bfloat16")),
    Row("bert", "minilm ragged 32 (fill 0.39)", dict(model="minilm", lengths=RAGGED_32),
        cpu=_EVERY_BERT),
    Row("bert", "bert-base 1x16", dict(model="bert-base", lengths=(16,)), cpu=_EVERY_BERT),
    Row("bert", "bert-base 1x128", dict(model="bert-base", lengths=(128,)), cpu=_EVERY_BERT),
    Row("bert", "bert-base 8x128", dict(model="bert-base", lengths=(128,) * 8), cpu=("float32", "bfloat16")),
    Row("bert", "bert-base ragged 32 (fill 0.39)", dict(model="bert-base", lengths=RAGGED_32),
        cpu=_EVERY_BERT),
    Row("bert", "bert-base 64x128", dict(model="bert-base", lengths=(128,) * 64), cpu=()),
    Row("bert", "bert-base ragged 256", dict(model="bert-base", lengths=RAGGED_32 * 8), cpu=()),
    Row("bert", "bert-base 32x512", dict(model="bert-base", lengths=(512,) * 32), cpu=()),
    Row("bert_mlm", "minilm step ragged 32 (fill 0.39)", dict(model="minilm", lengths=RAGGED_32)),
    Row("bert_mlm", "bert-base step 32x128", dict(model="bert-base", lengths=(128,) * 32), cpu=(), cuda=("bfloat16",)),
    Row("bert_mlm", "bert-base step 32x512", dict(model="bert-base", lengths=(512,) * 32), cpu=(), cuda=("bfloat16",)),
    Row("bert_mlm", "bert-base step ragged 256", dict(model="bert-base", lengths=RAGGED_32 * 8), cpu=(),
        cuda=("bfloat16",)),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement: a row in one dtype, one pass, on one device kind. ``id`` names it in files and on screens."""

    op: str
    workload: str
    sizes: dict[str, Any]
    dtype_name: str
    backward: bool
    device: str
    size: str

    @property
    def id(self) -> str:
        return f"{self.op}/{self.workload}/{self.dtype_name}/{self.pass_name}/{self.device}"

    @property
    def pass_name(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def is_model(self) -> bool:
        return self.op in MODELS

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name.partition("+")[0])

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """What ctxfast is asked to round the factors of products to, the inputs being float32."""
        return {"": None, "bf16": torch.bfloat16, "int8": torch.int8}[self.dtype_name.partition("+")[2]]

    @property
    def grads(self) -> tuple[str, ...]:
        """Arguments whose gradient a forward+backward case computes and checks."""
        return GRADS[self.op] if self.backward else ()

    @property
    def work(self) -> Work:
        """Arithmetic, memory traffic and tokens that the case needs, whoever runs it."""
        return op_work(self.op, self.sizes, (self.weight_dtype or self.dtype).itemsize, self.backward)

    @property
    def timed_only(self) -> dict[str, Any]:
        """Arguments that only the timed calls get: with dropout on, results have nothing to be held to."""
        return {"dropout_p": self.sizes["dropout"]} if "dropout" in self.sizes else {}

    def make(self) -> dict[str, Any]:
        """The keyword arguments of the public function (an op), or the inputs of a model."""
        random = torch.Generator().manual_seed(SEED)
        args = _MAKERS[self.op](random, **self.sizes)
        args = {name: _place(value, self.device, self.dtype) for name, value in args.items()}
        if self.weight_dtype is not None:
            args["weight_dtype"] = self.weight_dtype
        for name in self.grads:
            value = args[name]
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None:
                    tensor.requires_grad_()
        return args


def select(
    device: str = "cpu",
    size: str = "small",
    ops: Iterable[str] = (),
    models: bool = False,
    workloads: Iterable[str] = (),
) -> list[Case]:
    """The cases of a device and set, in table order.

    Args:
        size: "small" or "full" (which holds the small ones too).
        ops: names of ops or models to keep; none for every op.
        models: also the whole-model cases (naming a model in ``ops`` has the same effect for it).
        workloads: keep cases whose id holds one of these texts; none for all.
    """
    ops, workloads = tuple(ops), tuple(workloads)
    known = {row.op for row in ROWS}
    for name in ops:
        if name not in known:
            raise ValueError(f"benchmarks: there is no op {name!r}; expected one of {', '.join(sorted(known))}.")
    found = []
    for row in ROWS:
        if size == "small" and row.size != "small":
            continue
        if ops and row.op not in ops and not (models and row.op in MODELS):
            continue
        if not ops and row.op in MODELS and not models:
            continue
        for dtype_name in getattr(row, device):
            for name in row.passes:
                case = Case(row.op, row.workload, row.sizes, dtype_name, name == "fb", device, row.size)
                if not workloads or any(text in case.id for text in workloads):
                    found.append(case)
    return found


# inputs of the ops

GRADS = {
    "lstm": ("input", "weight_ih", "weight_hh", "bias", "weight_proj"),
    "attention": ("qkv", "bias"),
    "add_layer_norm": ("x", "residual", "weight", "bias", "x_bias"),
    "linear_act": ("x", "weight", "bias"),
    "embed_layer_norm": (
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
        "weight",
        "bias",
    ),
    "linear_cross_entropy": ("hidden", "weight", "bias"),
}


def _place(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return tuple(_place(item, device, dtype) for item in value)
    return value


def _normal(random: torch.Generator, *size: int, std: float = 1.0) -> Tensor:
    return torch.randn(size, generator=random) * std


def _ids(random: torch.Generator, high: int, *size: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, size, generator=random)


def _lstm(
    random: torch.Generator, B: int, T: int, R: int, I: int, H: int,  # noqa: E741
    P: int | None = None, clip: float | None = None, ragged: bool = False,
) -> dict[str, Any]:  # fmt: skip
    size = H if P is None else P
    # Weights of this spread keep gates lively and states inside ELMo's clips, so peers without clips compute the same.
    args: dict[str, Any] = dict(
        input=_normal(random, B, T, I),
        weight_ih=tuple(_normal(random, 4 * H, I, std=I**-0.5) for _ in range(R)),
        weight_hh=tuple(_normal(random, 4 * H, size, std=size**-0.5) for _ in range(R)),
        bias=tuple(_normal(random, 4 * H, std=0.1) for _ in range(R)),
        weight_proj=None if P is None else tuple(_normal(random, P, H, std=H**-0.5) for _ in range(R)),
        lengths=torch.tensor(ragged_lengths(B, T)) if ragged else None,
    )
    return args | (dict(cell_clip=clip, proj_clip=clip) if clip else {})


def _attention(
    random: torch.Generator, lengths: tuple[int, ...], H: int, D: int, dropout: float = 0.0
) -> dict[str, Any]:
    offsets = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    qkv = _normal(random, sum(lengths), 3, H, D)
    return dict(qkv=qkv, cu_seqlens=offsets, max_seqlen=max(lengths), bias=_normal(random, 3, H, D, std=0.1))


def _add_layer_norm(random: torch.Generator, T: int, N: int) -> dict[str, Any]:
    return dict(
        x=_normal(random, T, N),
        residual=_normal(random, T, N),
        weight=1 + _normal(random, N, std=0.1),
        bias=_normal(random, N, std=0.1),
        x_bias=_normal(random, N, std=0.1),
        eps=1e-12,
    )


def _linear_act(random: torch.Generator, T: int, N: int, M: int, activation: str) -> dict[str, Any]:
    return dict(
        x=_normal(random, T, N),
        weight=_normal(random, M, N, std=N**-0.5),
        bias=_normal(random, M, std=0.1),
        activation=activation,
    )


def _transformer_layers(
    random: torch.Generator, lengths: tuple[int, ...], N: int, H: int, M: int, K: int
) -> dict[str, Any]:
    def product(out: int, size: int) -> tuple[Tensor, Tensor]:
        return _normal(random, out, size, std=size**-0.5), _normal(random, out, std=0.1)

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + _normal(random, N, std=0.1), _normal(random, N, std=0.1)

    weights: list[Tensor] = []
    for _ in range(K):
        weights += (*product(3 * N, N), *product(N, N), *norm(), *product(M, N), *product(N, M), *norm())
    return dict(
        x=_normal(random, sum(lengths), N),
        cu_seqlens=torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        weights=tuple(weights),
        num_heads=H,
    )


def _embed_layer_norm(random: torch.Generator, T: int, N: int, V: int) -> dict[str, Any]:
    return dict(
        input_ids=_ids(random, V, T),
        position_ids=torch.arange(T) % 128,
        token_type_ids=_ids(random, 2, T),
        word_embeddings=_normal(random, V, N, std=0.02),
        position_embeddings=_normal(random, 512, N, std=0.02),
        token_type_embeddings=_normal(random, 2, N, std=0.02),
        weight=1 + _normal(random, N, std=0.1),
        bias=_normal(random, N, std=0.1),
    )


def _char_cnn(random: torch.Generator, W: int) -> dict[str, Any]:
    return dict(
        char_ids=word_characters(random, W),
        char_embeddings=_normal(random, ELMO_ALPHABET, ELMO_DEPTH),
        conv_weights=tuple(_normal(random, n, ELMO_DEPTH, w, std=(ELMO_DEPTH * w) ** -0.5) for w, n in ELMO_FILTERS),
        conv_biases=tuple(_normal(random, n, std=0.1) for _, n in ELMO_FILTERS),
        activation="relu",
    )


def word_characters(random: torch.Generator, words: int) -> Tensor:
    """(words, 50) int64: random words of 1 to 12 letters in ELMo's coding (begin 259, end 260, padding 261)."""
    ids = torch.full((words, ELMO_CHARACTERS), 261)
    ids[:, 0] = 259
    letters = _ids(random, 123, words, ELMO_CHARACTERS, low=98)
    sizes = _ids(random, 13, words, low=1)[:, None]
    column = torch.arange(ELMO_CHARACTERS)[None]
    ids = torch.where((column >= 1) & (column <= sizes), letters, ids)
    return torch.where(column == sizes + 1, torch.tensor(260), ids)


def _scalar_mix(random: torch.Generator, K: int, B: int, T: int, N: int) -> dict[str, Any]:
    return dict(
        tensors=tuple(_normal(random, B, T, N) for _ in range(K)),
        scalar_parameters=_normal(random, K),
        gamma=torch.full((1,), 0.9),
    )


def _linear_cross_entropy(random: torch.Generator, T: int, labelled: int, N: int, V: int) -> dict[str, Any]:
    labels = torch.full((T,), -100)
    rows = torch.randperm(T, generator=random)[:labelled]
    labels[rows] = _ids(random, V, labelled)
    return dict(
        hidden=_normal(random, T, N),
        weight=_normal(random, V, N, std=N**-0.5),
        labels=labels,
        bias=_normal(random, V, std=0.1),
    )


def _bert(random: torch.Generator, model: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    columns = max(lengths)
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    ids = _ids(random, 30522, len(lengths), columns, low=1000) * mask
    # A batch without padding comes without a mask, as its user would pass it.
    return dict(model=model, input_ids=ids, attention_mask=None if min(lengths) == columns else mask)


def _bert_mlm(random: torch.Generator, model: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    args = _bert(random, model, lengths)
    ids = args["input_ids"]
    chosen = (torch.rand(ids.shape, generator=random) < 0.15) & (ids > 0)
    return args | dict(input_ids=torch.where(chosen, 103, ids), labels=torch.where(chosen, ids, -100))


def _elmo(random: torch.Generator, B: int, words: int) -> dict[str, Any]:
    return dict(char_ids=word_characters(random, B * words).view(B, words, ELMO_CHARACTERS))


_MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "lstm": _lstm,
    "attention": _attention,
    "add_layer_norm": _add_layer_norm,
    "linear_act": _linear_act,
    "embed_layer_norm": _embed_layer_norm,
    "char_cnn": _char_cnn,
    "scalar_mix": _scalar_mix,
    "transformer_layers": _transformer_layers,
    "linear_cross_entropy": _linear_cross_entropy,
    "bert": _bert,
    "bert_mlm": _bert_mlm,
    "elmo": _elmo,
}

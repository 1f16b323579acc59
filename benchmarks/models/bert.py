# SPDX-License-Identifier: Apache-2.0
"""BERT: ctxfast, Hugging Face, ONNX Runtime, OpenVINO, CTranslate2, all with the same random weights.

Results are compared at real tokens only.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import ctxfast

from ..arrivals import USUAL
from ..cases import SEED, Case, Row, Work
from ..inputs import EVERY_BERT, RAGGED_32, RAGGED_256, integers
from ..ops.transformer_layers import encoder_work
from ..provider import Call, Outputs, Provider, Unavailable, on_references, require


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the arithmetic of an encoder depends on."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int


SIZES = {
    "minilm": Sizes(layers=6, hidden=384, heads=12, feed_forward=1536),
    "bert-base": Sizes(layers=12, hidden=768, heads=12, feed_forward=3072),
    "tiny": Sizes(layers=2, hidden=64, heads=2, feed_forward=128),  # for dry runs
}

ROWS = (
    Row("minilm 1x16", dict(model="minilm", lengths=(16,)), "small", cpu=EVERY_BERT),
    Row("minilm 1x128", dict(model="minilm", lengths=(128,)), "small", cpu=EVERY_BERT),
    Row("minilm 8x128", dict(model="minilm", lengths=(128,) * 8), cpu=("float32", "bfloat16")),
    Row("minilm ragged 32 (fill 0.39)", dict(model="minilm", lengths=RAGGED_32), cpu=EVERY_BERT),
    Row("bert-base 1x16", dict(model="bert-base", lengths=(16,)), cpu=EVERY_BERT),
    Row("bert-base 1x128", dict(model="bert-base", lengths=(128,)), cpu=EVERY_BERT),
    Row("bert-base 8x128", dict(model="bert-base", lengths=(128,) * 8), cpu=("float32", "bfloat16")),
    Row("bert-base ragged 32 (fill 0.39)", dict(model="bert-base", lengths=RAGGED_32), cpu=EVERY_BERT),
    Row("bert-base 64x128", dict(model="bert-base", lengths=(128,) * 64), cpu=()),
    Row("bert-base ragged 256", dict(model="bert-base", lengths=RAGGED_32 * 8), cpu=()),
    Row("bert-base ragged 256 (fill 0.15)", dict(model="bert-base", lengths=RAGGED_256), cpu=()),
    Row("bert-base 32x512", dict(model="bert-base", lengths=(512,) * 32), cpu=()),
    *(
        Row(
            f"minilm 1x{length}, {arrivals.words}",
            dict(model="minilm", lengths=(length,)),
            "latency",
            cpu=EVERY_BERT,
            cuda=(),
            arrivals=arrivals,
        )
        for length in (16, 64)
        for arrivals in USUAL
    ),
)


def make(random: torch.Generator, model: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    columns = max(lengths)
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    ids = integers(random, 30522, len(lengths), columns, low=1000) * mask
    # A batch without padding comes without a mask, as its user would pass it.
    return dict(model=model, input_ids=ids, attention_mask=None if min(lengths) == columns else mask)


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    s = SIZES[sizes["model"]]
    return encoder_work(sizes["lengths"], s.layers, s.hidden, s.feed_forward, backward)


@functools.lru_cache(maxsize=1)
def _weights(model: str) -> dict[str, Tensor]:
    """Random weights, under the names that ctxfast and Hugging Face share; of a size that keeps layers different."""
    torch.manual_seed(SEED)
    # Three times the usual spread of first weights: attention is then far from uniform, so a wrong mask shows.
    return ctxfast.Bert(config(model, initializer_range=0.06)).state_dict()


def config(model: str, **changes: Any) -> ctxfast.BertConfig:
    s = SIZES[model]
    return ctxfast.BertConfig(
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, intermediate_size=s.feed_forward,
        **changes,
    )  # fmt: skip


def _ours(case: Case, args: Mapping[str, Any], dtype: torch.dtype | None = None) -> ctxfast.Bert:
    with torch.device("meta"):
        model = ctxfast.Bert(config(args["model"]))
    weights = {name: tensor.to(case.device, dtype or case.dtype) for name, tensor in _weights(args["model"]).items()}
    model.load_state_dict(weights, assign=True)
    return model.eval().quantize("int8" if args.get("weight_dtype") is torch.int8 else None)


def _hugging_face(case: Case, args: Mapping[str, Any], attention: str = "sdpa") -> torch.nn.Module:
    require("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    s = SIZES[args["model"]]
    settings = transformers.BertConfig(
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, intermediate_size=s.feed_forward
    )
    settings._attn_implementation = attention
    model = transformers.BertModel(settings)
    model.load_state_dict(_weights(args["model"]), strict=True)
    return model.to(case.device, case.dtype).eval()


def _real(args: Mapping[str, Any]) -> Callable[[Outputs], Outputs]:
    """(last hidden state (B, L, N), pooled (B, N)) -> the same at real tokens only."""
    mask = args["attention_mask"]

    def to_case(outputs: Outputs) -> Outputs:
        last, pooled = (torch.as_tensor(output) for output in outputs)
        last = last.flatten(0, 1) if mask is None else last[mask.bool()]
        return last, pooled

    return to_case


def _call(model: Callable[..., Any], args: Mapping[str, Any]) -> Call:
    ids, mask = args["input_ids"], args["attention_mask"]

    def forward() -> Outputs:
        found = model(ids, attention_mask=mask)
        return found.last_hidden_state, found.pooler_output

    return Call(forward, to_case=_real(args))


def _build_ours(case: Case, args: Mapping[str, Any]) -> Call:
    return _call(_ours(case, args), args)


def _build_reference(case: Case, args: Mapping[str, Any]) -> Call:
    return on_references(_build_ours(case, args))


def _build_hf(case: Case, args: Mapping[str, Any]) -> Call:
    return _call(_hugging_face(case, args), args)


def _build_hf_sorted(case: Case, args: Mapping[str, Any]) -> Call:
    """Texts sorted by length and cut into eight batches, each padded to its own longest: what its users do at best."""
    mask = args["attention_mask"]
    if mask is None:
        raise Unavailable("all texts have one length")
    if case.weight_dtype is not None:
        raise Unavailable("compared in the model's own dtype")
    model, ids = _hugging_face(case, args), args["input_ids"]
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    back = order.argsort()
    # The lengths are known to whoever made the texts: choosing the batches is not charged.
    cuts = [(rows, int(lengths[rows].max())) for rows in order.chunk(8)]

    def forward() -> Outputs:
        last = ids.new_zeros((*ids.shape, model.config.hidden_size), dtype=case.dtype)
        pooled = []
        for rows, longest in cuts:
            found = model(ids[rows, :longest], attention_mask=mask[rows, :longest])
            last[rows, :longest] = found.last_hidden_state
            pooled.append(found.pooler_output)
        return last, torch.cat(pooled)[back]

    return Call(forward, to_case=_real(args))


def _build_hf_int8(case: Case, args: Mapping[str, Any]) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it will move
        model = torch.ao.quantization.quantize_dynamic(_hugging_face(case, args), {torch.nn.Linear}, dtype=torch.qint8)
    return _call(model, args)


def _build_swapped(case: Case, args: Mapping[str, Any]) -> Call:
    if case.weight_dtype is not None:
        raise Unavailable("swap_in keeps a model's dtype")
    model = _hugging_face(case, args)
    ctxfast.swap_in(model, strict=True)
    return _call(model, args)


def _build_hf_compiled(mode: str | None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        if mode is not None and case.device != "cuda":
            raise Unavailable("compared on a GPU only")
        torch.compiler.reset()  # as for ops: one case, one size
        model = torch.compile(_hugging_face(case, args), mode=mode)
        # Without a mask Transformers falls onto a slow attention path under compile: an explicit one is fairer to it.
        mask = _inputs(args)[1] if case.device == "cuda" else args["attention_mask"]
        call = _call(model, {**args, "attention_mask": mask})
        if case.device != "cuda":
            return call
        # Outputs of a compiled CUDA graph are overwritten by the next run.
        return Call(lambda: tuple(output.clone() for output in call.forward()), to_case=_real(args))

    return build


def _inputs(args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    mask = args["attention_mask"]
    return args["input_ids"], torch.ones_like(args["input_ids"]) if mask is None else mask


class _Tuple(torch.nn.Module):
    """Hugging Face's model with positional inputs and a plain tuple as result, as exporters want it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return found.last_hidden_state, found.pooler_output


def _exportable(case: Case, args: Mapping[str, Any], attention: str = "sdpa") -> _Tuple:
    if case.device != "cpu":
        raise Unavailable("compared on the CPU only")
    return _Tuple(_hugging_face(dataclasses.replace(case, dtype_name="float32"), args, attention)).eval()


def _build_openvino(case: Case, args: Mapping[str, Any], precision: str = "") -> Call:
    require("openvino")
    import openvino

    precision = precision or {torch.float32: "f32", torch.bfloat16: "bf16"}[case.dtype]
    ids, mask = _inputs(args)
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        converted = openvino.convert_model(_exportable(case, args), example_input=(ids, mask))
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    feed = [ids.numpy(), mask.numpy()]

    def forward() -> Outputs:
        found = compiled(feed)
        return found[0], found[1]

    return Call(forward, to_case=_real(args))


def _build_onnxruntime_int8(case: Case, args: Mapping[str, Any]) -> Call:
    return _build_onnxruntime(case, args, is_int8=True)


def _build_onnxruntime(case: Case, args: Mapping[str, Any], is_int8: bool = False) -> Call:
    require("onnxruntime")
    require("onnx")
    import onnxruntime

    if case.dtype != torch.float32:
        raise Unavailable("ONNX Runtime's CPU kernels have no bfloat16")
    ids, mask = _inputs(args)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = _export_onnx(_exportable(case, args, "eager"), (ids, mask), Path(folder), args["model"])
        if is_int8:
            from onnxruntime.quantization import quantize_dynamic

            narrow = str(Path(folder) / "int8.onnx")
            quantize_dynamic(path, narrow, per_channel=True, extra_options={"DefaultTensorType": 1})  # 1: float32
            path = narrow
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = dict(zip((entry.name for entry in session.get_inputs()), (ids.numpy(), mask.numpy())))
    return Call(lambda: tuple(session.run(None, feed)), to_case=_real(args))


def _export_onnx(model: _Tuple, inputs: tuple[Tensor, Tensor], folder: Path, name: str) -> str:
    """Write the model as ONNX, fused by onnxruntime's transformer optimiser where that succeeds; the file's path."""
    plain, fused = folder / "plain.onnx", folder / "fused.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model, inputs, str(plain), input_names=["input_ids", "attention_mask"], opset_version=17, dynamo=False
        )
    try:
        from onnxruntime.transformers import optimizer

        s = SIZES[name]
        better = optimizer.optimize_model(str(plain), model_type="bert", num_heads=s.heads, hidden_size=s.hidden)
        better.save_model_to_file(str(fused))
    except ImportError:
        return str(plain)
    return str(fused)


def _build_ctranslate2(case: Case, args: Mapping[str, Any], precision: str = "") -> Call:
    require("ctranslate2")
    import ctranslate2
    from ctranslate2.converters.transformers import BertLoader

    precision = precision or str(case.dtype).removeprefix("torch.")
    if case.device == "cpu" and precision not in ctranslate2.get_supported_compute_types("cpu"):
        raise Unavailable(f"CTranslate2 has no {precision} on this CPU")
    model = _exportable(case, args).model
    model.config.position_embedding_type = "absolute"  # asked for by its converter; Transformers 5 knows no other
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        spec = BertLoader().get_model_spec(model)
        spec.config.layer_norm_epsilon = model.config.layer_norm_eps
        spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])  # fed with ids, it reads none
        spec.validate()
        spec.optimize()
        spec.save(folder)
        encoder = ctranslate2.Encoder(
            folder, device="cpu", compute_type=precision, inter_threads=1, intra_threads=torch.get_num_threads()
        )
    ids, mask = _inputs(args)
    # With the lengths it packs as we do.
    feed = [ctranslate2.StorageView.from_array(value.int().numpy()) for value in (ids, mask.sum(1))]

    def forward() -> Outputs:
        found = encoder.forward_batch(*feed)
        return found.last_hidden_state, found.pooler_output

    real = _real(args)
    return Call(forward, to_case=lambda outputs: real(tuple(numpy.array(output) for output in outputs)))


def _build_zentorch(case: Case, args: Mapping[str, Any]) -> Call:
    require("zentorch")
    if case.device != "cpu":
        raise Unavailable("compared on the CPU only")
    import zentorch as zentorch  # registers its backend

    torch.compiler.reset()  # as for ops: one case, one size
    # It lays weights out anew where they are: the model is a copy of its own.
    model = torch.compile(copy.deepcopy(_hugging_face(case, args)), backend="zentorch")
    return _call(model, {**args, "attention_mask": _inputs(args)[1]})


def oracle(case: Case, args: Mapping[str, Any]) -> Outputs:
    """ctxfast's model on plain references; its peers, which share no code with it, are held to it as well."""
    call = _build_reference(case, args)
    return call.to_case(call.forward())


OURS = (
    Provider("ctxfast", _build_ours, "what Bert() runs", ours=True),
    Provider("ctxfast reference", _build_reference, "every op on plain PyTorch", ours=True),
    Provider("ctxfast swap_in", _build_swapped, "Hugging Face's model after ctxfast.swap_in", ours=True),
)
PEERS = (
    Provider("Hugging Face, eager", _build_hf),
    Provider("Hugging Face, eager, sorted by length", _build_hf_sorted, "eight batches, sorting not timed"),
    Provider("ONNX Runtime", _build_onnxruntime),
    Provider("OpenVINO", _build_openvino),
    Provider("CTranslate2", _build_ctranslate2),
    Provider("zentorch", _build_zentorch, "torch.compile with AMD's backend; explicit mask"),
    Provider("OpenVINO, bfloat16", functools.partial(_build_openvino, precision="bf16"), dtype=torch.bfloat16),
    Provider("ONNX Runtime, dynamic int8", _build_onnxruntime_int8, dtype=torch.int8),
    Provider("CTranslate2, int8", functools.partial(_build_ctranslate2, precision="int8"), dtype=torch.int8),
    Provider("Hugging Face, dynamic int8", _build_hf_int8, dtype=torch.int8),
)
COMPILED = (
    Provider("Hugging Face, torch.compile", _build_hf_compiled(None)),
    Provider("Hugging Face, torch.compile reduce-overhead", _build_hf_compiled("reduce-overhead"), "explicit mask"),
    Provider("Hugging Face, torch.compile max-autotune", _build_hf_compiled("max-autotune"), "explicit mask"),
)

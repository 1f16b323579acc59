# SPDX-License-Identifier: Apache-2.0
"""Peers of whole models: Hugging Face, ONNX Runtime, OpenVINO, CTranslate2 for BERT, plain PyTorch for ELMo.

All hold the same random weights, made once per model. Results are compared at real tokens only.
"""

from __future__ import annotations

import contextlib
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
import torch.nn.functional as F
from torch import Tensor

import ctxfast
from ctxfast._core import registry
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.modeling import ElmoBiLm

from .cases import SEED, Case
from .peers import Call, Outputs, Provider, Unavailable, require
from .peers_ops import loop_direction, module_lstm
from .work import BERT_SIZES, ELMO_CHARACTERS

# BERT


@functools.lru_cache(maxsize=1)
def _bert_weights(model: str) -> dict[str, Tensor]:
    """Random weights, under the names that ctxfast and Hugging Face share; of a size that keeps layers different."""
    torch.manual_seed(SEED)
    # Three times the usual spread of first weights: attention is then far from uniform, so a wrong mask shows.
    return ctxfast.Bert(_bert_config(model, initializer_range=0.06)).state_dict()


def _bert_config(model: str, **changes: Any) -> ctxfast.BertConfig:
    s = BERT_SIZES[model]
    return ctxfast.BertConfig(
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, intermediate_size=s.feed_forward,
        **changes,
    )  # fmt: skip


def _ours_bert(case: Case, args: Mapping[str, Any], dtype: torch.dtype | None = None) -> ctxfast.Bert:
    with torch.device("meta"):
        model = ctxfast.Bert(_bert_config(args["model"]))
    weights = {
        name: tensor.to(case.device, dtype or case.dtype) for name, tensor in _bert_weights(args["model"]).items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval().quantize("int8" if args.get("weight_dtype") is torch.int8 else None)


def _hf_bert(case: Case, args: Mapping[str, Any], attention: str = "sdpa") -> torch.nn.Module:
    require("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    s = BERT_SIZES[args["model"]]
    config = transformers.BertConfig(
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, intermediate_size=s.feed_forward
    )
    config._attn_implementation = attention
    model = transformers.BertModel(config)
    model.load_state_dict(_bert_weights(args["model"]), strict=True)
    return model.to(case.device, case.dtype).eval()


def _real(args: Mapping[str, Any]) -> Callable[[Outputs], Outputs]:
    """(last hidden state (B, L, N), pooled (B, N)) -> the same at real tokens only."""
    mask = args["attention_mask"]

    def to_case(outputs: Outputs) -> Outputs:
        last, pooled = (torch.as_tensor(output) for output in outputs)
        last = last.flatten(0, 1) if mask is None else last[mask.bool()]
        return last, pooled

    return to_case


def _bert_call(model: Callable[..., Any], args: Mapping[str, Any]) -> Call:
    ids, mask = args["input_ids"], args["attention_mask"]

    def forward() -> Outputs:
        found = model(ids, attention_mask=mask)
        return found.last_hidden_state, found.pooler_output

    return Call(forward, to_case=_real(args))


def _build_ctxfast_bert(case: Case, args: Mapping[str, Any]) -> Call:
    return _bert_call(_ours_bert(case, args), args)


def _on_references(call: Call) -> Call:
    def forward() -> Outputs:
        with registry.use_impl("reference"):
            return call.forward()

    return Call(forward, to_case=call.to_case)


def _build_reference_bert(case: Case, args: Mapping[str, Any]) -> Call:
    return _on_references(_build_ctxfast_bert(case, args))


def _build_hf(case: Case, args: Mapping[str, Any]) -> Call:
    return _bert_call(_hf_bert(case, args), args)


def _build_hf_sorted(case: Case, args: Mapping[str, Any]) -> Call:
    """Texts sorted by length and cut into eight batches, each padded to its own longest: what its users do at best."""
    mask = args["attention_mask"]
    if mask is None:
        raise Unavailable("all texts have one length")
    if case.weight_dtype is not None:
        raise Unavailable("compared in the model's own dtype")
    model, ids = _hf_bert(case, args), args["input_ids"]
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
        model = torch.ao.quantization.quantize_dynamic(_hf_bert(case, args), {torch.nn.Linear}, dtype=torch.qint8)
    return _bert_call(model, args)


def _build_swapped(case: Case, args: Mapping[str, Any]) -> Call:
    if case.weight_dtype is not None:
        raise Unavailable("swap_in keeps a model's dtype")
    model = _hf_bert(case, args)
    ctxfast.swap_in(model, strict=True)
    return _bert_call(model, args)


def _build_hf_compiled(mode: str | None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        if mode is not None and case.device != "cuda":
            raise Unavailable("compared on a GPU only")
        torch.compiler.reset()  # as for ops: one case, one size
        model = torch.compile(_hf_bert(case, args), mode=mode)
        # Without a mask Transformers falls onto a slow attention path under compile: an explicit one is fairer to it.
        mask = _inputs(args)[1] if case.device == "cuda" else args["attention_mask"]
        call = _bert_call(model, {**args, "attention_mask": mask})
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
    return _Tuple(_hf_bert(dataclasses.replace(case, dtype_name="float32"), args, attention)).eval()


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

        s = BERT_SIZES[name]
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


# ELMo


@functools.lru_cache(maxsize=1)
def _elmo_weights() -> dict[str, Tensor]:
    """Random weights of the original model's size, under AllenNLP's names."""
    return ctxfast.Elmo.from_config(ElmoConfig.preset("original"), seed=SEED, dropout=0.0).state_dict()


def _ours_elmo(case: Case, args: Mapping[str, Any]) -> ctxfast.Elmo:
    # Every text starts from zeros, so that a call's result does not depend on the calls before it.
    with torch.device("meta"):
        bilm = ElmoBiLm(ElmoConfig.preset("original"), state="zero", weight_dtype=args.get("weight_dtype"))
        model = ctxfast.Elmo(module=bilm, dropout=0.0)
    weights = {name: value.to(case.device, case.dtype) for name, value in _elmo_weights().items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _elmo_call(model: ctxfast.Elmo, args: Mapping[str, Any]) -> Call:
    return Call(lambda: tuple(model(args["char_ids"])["elmo_representations"]))


def _build_ctxfast_elmo(case: Case, args: Mapping[str, Any]) -> Call:
    return _elmo_call(_ours_elmo(case, args), args)


def _build_reference_elmo(case: Case, args: Mapping[str, Any]) -> Call:
    return _on_references(_build_ctxfast_elmo(case, args))


def _build_plain_elmo(recurrence: str, dtype: torch.dtype | None = None) -> Callable[[Case, Mapping[str, Any]], Call]:
    def build(case: Case, args: Mapping[str, Any]) -> Call:
        place = (case.device, dtype or case.dtype)
        weights = {name.removeprefix("_elmo_lstm."): value.to(*place) for name, value in _elmo_weights().items()}
        lstm = _loop_layers(weights) if recurrence == "loop" else _module_layers(weights)
        ids = args["char_ids"]
        return Call(lambda: (_plain_elmo(weights, ids, lstm),))

    return build


# One layer of one direction: (layer, direction, (B, T, P)) -> (B, T, P).
_Layer = Callable[[int, int, Tensor], Tensor]


def _layer_weights(weights: Mapping[str, Tensor], layer: int, direction: int) -> tuple[Tensor, ...]:
    name = f"_elmo_lstm.{('forward', 'backward')[direction]}_layer_{layer}."
    parts = ("input_linearity.weight", "state_linearity.weight", "state_linearity.bias", "state_projection.weight")
    return tuple(weights[name + part] for part in parts)


def _loop_layers(weights: Mapping[str, Tensor]) -> _Layer:
    def run(layer: int, direction: int, x: Tensor) -> Tensor:
        lengths = [x.shape[1]] * x.shape[0]
        return loop_direction(x, *_layer_weights(weights, layer, direction), lengths, direction == 1, 3.0, 3.0)[0]

    return run


def _module_layers(weights: Mapping[str, Tensor]) -> _Layer:
    modules = {}
    for layer in range(2):
        for direction in range(2):
            names = ("weight_ih", "weight_hh", "bias", "weight_proj")
            one = {name: (value,) for name, value in zip(names, _layer_weights(weights, layer, direction))}
            modules[layer, direction] = module_lstm(one, (0,), trained=False)[0]

    def run(layer: int, direction: int, x: Tensor) -> Tensor:
        module = modules[layer, direction]
        return module(x.flip(1))[0].flip(1) if direction else module(x)[0]

    return run


def _plain_elmo(weights: Mapping[str, Tensor], char_ids: Tensor, lstm: _Layer) -> Tensor:
    """(B, T, 50) characters of full rows -> (B, T, 1024): every word through the CNN, sentence marks in, mixed, out."""
    batch = char_ids.shape[0]
    mark = char_ids.new_full((2, ELMO_CHARACTERS), 261)
    mark[:, 0], mark[0, 1], mark[1, 1], mark[:, 2] = 259, 257, 258, 260
    begin, end = (row.expand(batch, 1, -1) for row in mark)
    words = torch.cat((begin, char_ids, end), dim=1).flatten(0, 1)
    encoder = "_token_embedder."
    x = F.embedding(words, weights[encoder + "_char_embedding_weights"]).transpose(1, 2)
    pooled = []
    for i in range(7):
        conv = F.conv1d(x, weights[f"{encoder}char_conv_{i}.weight"], weights[f"{encoder}char_conv_{i}.bias"])
        pooled.append(torch.relu(conv.max(dim=-1).values))
    vectors = torch.cat(pooled, dim=-1)
    for k in range(2):
        name = f"{encoder}_highways._layers.{k}."
        transform, gate = F.linear(vectors, weights[name + "weight"], weights[name + "bias"]).chunk(2, dim=-1)
        gate = torch.sigmoid(gate)
        vectors = gate * vectors + (1 - gate) * torch.relu(transform)
    vectors = F.linear(vectors, weights[encoder + "_projection.weight"], weights[encoder + "_projection.bias"])
    token = vectors.unflatten(0, (batch, -1))
    layers = [torch.cat((token, token), dim=-1)]
    sides = [token, token]
    for layer in range(2):
        outputs = [lstm(layer, direction, sides[direction]) for direction in range(2)]
        sides = [output + before for output, before in zip(outputs, sides)] if layer else outputs
        layers.append(torch.cat(sides, dim=-1))
    scalars = torch.cat([weights[f"scalar_mix_0.scalar_parameters.{k}"] for k in range(3)])
    mix = torch.softmax(scalars, dim=0)
    return (weights["scalar_mix_0.gamma"] * sum(w * layer for w, layer in zip(mix, layers)))[:, 1:-1]


# tables


_latest_oracle: dict[str, Outputs] = {}


def oracle(case: Case, args: Mapping[str, Any]) -> Outputs:
    """ctxfast's model on plain references in float32; its peers, which share no code with it, are held to it as well.

    The result of the latest workload is kept: its cases differ in dtype only.
    """
    plain = dataclasses.replace(case, dtype_name="float32")
    if plain.id not in _latest_oracle:
        wide = {name: value for name, value in args.items() if name != "weight_dtype"}
        build = _build_reference_bert if case.op == "bert" else _build_reference_elmo
        call = build(plain, wide)
        with torch.no_grad():
            found = tuple(output.float() for output in call.to_case(call.forward()))
        _latest_oracle.clear()
        _latest_oracle[plain.id] = found
    return _latest_oracle[plain.id]


OURS: dict[str, tuple[Provider, ...]] = {
    "bert": (
        Provider("ctxfast", _build_ctxfast_bert, "what Bert() runs", ours=True),
        Provider("ctxfast reference", _build_reference_bert, "every op on plain PyTorch", ours=True),
        Provider("ctxfast swap_in", _build_swapped, "Hugging Face's model after ctxfast.swap_in", ours=True),
    ),
    "elmo": (
        Provider("ctxfast", _build_ctxfast_elmo, "what Elmo() runs", ours=True),
        Provider("ctxfast reference", _build_reference_elmo, "every op on plain PyTorch", ours=True),
    ),
}
PEERS: dict[str, tuple[Provider, ...]] = {
    "bert": (
        Provider("Hugging Face, eager", _build_hf),
        Provider("Hugging Face, eager, sorted by length", _build_hf_sorted, "eight batches, sorting not timed"),
        Provider("ONNX Runtime", _build_onnxruntime),
        Provider("OpenVINO", _build_openvino),
        Provider("CTranslate2", _build_ctranslate2),
        Provider(
            "OpenVINO, bfloat16", functools.partial(_build_openvino, precision="bf16"), dtype=torch.bfloat16
        ),
        Provider("ONNX Runtime, dynamic int8", _build_onnxruntime_int8, dtype=torch.int8),
        Provider("CTranslate2, int8", functools.partial(_build_ctranslate2, precision="int8"), dtype=torch.int8),
        Provider("Hugging Face, dynamic int8", _build_hf_int8, dtype=torch.int8),
    ),
    "elmo": (
        Provider("plain PyTorch, Python loop", _build_plain_elmo("loop"), "as AllenNLP ran it"),
        Provider("plain PyTorch, nn.LSTM", _build_plain_elmo("module"), "no clipping"),
        Provider(
            "plain PyTorch, Python loop, bfloat16", _build_plain_elmo("loop", torch.bfloat16), dtype=torch.bfloat16
        ),
        Provider(
            "plain PyTorch, nn.LSTM, bfloat16", _build_plain_elmo("module", torch.bfloat16), "no clipping",
            dtype=torch.bfloat16,
        ),
    ),
}  # fmt: skip
COMPILED: dict[str, tuple[Provider, ...]] = {
    "bert": (
        Provider("Hugging Face, torch.compile", _build_hf_compiled(None)),
        Provider("Hugging Face, torch.compile reduce-overhead", _build_hf_compiled("reduce-overhead"), "explicit mask"),
        Provider("Hugging Face, torch.compile max-autotune", _build_hf_compiled("max-autotune"), "explicit mask"),
    ),
    "elmo": (),
}

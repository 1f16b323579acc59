# SPDX-License-Identifier: Apache-2.0
"""Models that somebody changed inside: after ``swap_in`` they compute what they computed, or say why they are left.

Each row changes one thing in an otherwise stock encoder. Made before ``swap_in`` the change must be a near miss with a
reason (or harmless); made after it, it must be seen at the next call. Weights are large enough that every one of these
changes moves the results by far more than the bound.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.hf_models import IDS, MASK, tiny_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ctxfast
from ctxfast.swap import transformers_layers

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("transformers.models.bert.modeling_bert")
distil = pytest.importorskip("transformers.models.distilbert.modeling_distilbert")


def _like(old: nn.Module, kind: type, **values) -> nn.Module:
    """A module of another class with the parts and values of the old one."""
    new = kind.__new__(kind)
    new.__dict__.update(old.__dict__)
    new.__dict__.update(values)
    return new


def _times(base: type, factor: float) -> type:
    """A subclass whose result (or the first of them) is another."""

    def forward(self, *args, **kwargs):
        out = base.forward(self, *args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return type(f"Own{base.__name__}", (base,), {"forward": forward})


def _every(place: str, change: Callable[[nn.Module], nn.Module | None]) -> Callable[[nn.Module], None]:
    """A change of one part of every layer: of its values, or of the object if it returns another."""

    def apply(model: nn.Module) -> None:
        for layer in _encoder(model).layer:
            owner, _, name = f".{place}".rpartition(".")
            owner = layer.get_submodule(owner.lstrip("."))
            new = change(getattr(owner, name))
            if new is not None:
                setattr(owner, name, new)

    return apply


def _encoder(model: nn.Module) -> nn.Module:
    return model.encoder if hasattr(model, "encoder") else model.transformer


def _replace(place: str, kind: type) -> Callable[[nn.Module], None]:
    return _every(place, lambda old: _like(old, kind))


def _layers(kind: type) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        layers = _encoder(model).layer
        for i, layer in enumerate(list(layers)):
            layers[i] = _like(layer, kind)

    return apply


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) * 2


class Window(nn.Module):
    """Attention with other attributes than Hugging Face's, as Longformer's has."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value, self.num_heads = old.query, old.key, old.value, old.num_attention_heads

    def forward(self, x: Tensor, *args, **kwargs):
        return self.value(x), None


class Skipping(nn.ModuleList):
    """Leaves its first layer out, as LayerDrop does."""

    def __iter__(self):
        return iter(list(self._modules.values())[1:])


class Quantised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 8).round() / 8, self.bias)


class Doubled(torch.Tensor):
    """A weight that knows how to multiply by itself, and does it otherwise."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
            return out * 2 if function is F.linear else out


def _subclass(linear: nn.Linear) -> None:
    linear._parameters["weight"] = linear.weight.detach().as_subclass(Doubled)


def _bound(function: Callable) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        own = type(module).forward
        module.forward = types.MethodType(lambda self, *args, **kwargs: function(own(self, *args, **kwargs)), module)

    return change


def _chunk(layer: nn.Module) -> None:
    layer.feed_forward_chunk = lambda x: layer.output(layer.intermediate(x), x) * 0.5


def _set(**values) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for name, value in values.items():
            setattr(module, name, value)

    return change


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 0.5)


def _pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))


def _added_bias(module: nn.Module) -> None:
    module.bias = None


def _narrower(layer: nn.Module) -> None:
    """Half of the feed-forward block cut away, as structured pruning does."""
    layer.intermediate.dense.weight = nn.Parameter(layer.intermediate.dense.weight[:16].detach())
    layer.intermediate.dense.bias = nn.Parameter(layer.intermediate.dense.bias[:16].detach())
    layer.output.dense.weight = nn.Parameter(layer.output.dense.weight[:, :16].detach())


def _heads(module: nn.Module) -> None:
    module.num_attention_heads, module.attention_head_size = 4, 4


def _own_attention(module, query, key, value, mask, **options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    return out * 0.5, weights


def _registered(model: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("halved", _own_attention)
    AttentionMaskInterface.register("halved", sdpa_mask)
    model.set_attn_implementation("halved")


def _first_layer_narrower(model: nn.Module) -> None:
    _narrower(model.encoder.layer[0])


def _fewer_heads(model: nn.Module) -> None:
    """The first layer without its second head, as pruning leaves it."""
    attention = model.encoder.layer[0].attention
    own, dense = attention.self, attention.output.dense
    for linear in (own.query, own.key, own.value):
        linear.weight, linear.bias = (nn.Parameter(each[:8].detach()) for each in (linear.weight, linear.bias))
    dense.weight = nn.Parameter(dense.weight[:, :8].detach())
    own.num_attention_heads = 1


def _another_config(model: nn.Module) -> None:
    """One layer with a config of its own, which names another attention."""
    from transformers import AttentionInterface

    AttentionInterface.register("halved", _own_attention)
    own = model.encoder.layer[1].attention.self
    own.config = copy.deepcopy(own.config)
    own.config._attn_implementation = "halved"


def _call_impl(module: nn.Module) -> None:
    own = module._call_impl
    module._call_impl = lambda *args: own(*args) * 2


def _sparse(layout: torch.layout) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        weight = module.weight.detach() * (module.weight.abs() > 0.2)
        sparse = weight.to_sparse_csr() if layout is torch.sparse_csr else weight.to_sparse()
        module.weight = nn.Parameter(sparse, requires_grad=False)

    return change


class Neighbours(hf.BertLayer):
    """A layer that reads the next position, padding too."""

    def forward(self, hidden_states, *args, **kwargs):
        out = super().forward(hidden_states, *args, **kwargs)
        return out + 0.5 * hidden_states.roll(-1, 1)


def _last_layer_of_neighbours(model: nn.Module) -> None:
    model.encoder.layer[1] = _like(model.encoder.layer[1], Neighbours)


def _subtract_the_mean(model: nn.Module) -> None:
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True))


# Changes of one model: they can be made before or after swap_in.
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "attention of another class": _replace("attention.self", _times(hf.BertSelfAttention, 0.5)),
    "attention without Hugging Face's attributes": _every("attention.self", Window),
    "attention block of another class": _replace("attention", _times(hf.BertAttention, 0.5)),
    "output of the attention of another class": _replace("attention.output", _times(hf.BertSelfOutput, 0.5)),
    "intermediate of another class": _replace("intermediate", _times(hf.BertIntermediate, 2.0)),
    "output of another class": _replace("output", _times(hf.BertOutput, 0.5)),
    "layers of another class": _layers(_times(hf.BertLayer, 0.9)),
    "layers of another class of the same name": _layers(type("BertLayer", (_times(hf.BertLayer, 0.9),), {})),
    "a list that leaves layers out": lambda model: setattr(model.encoder, "layer", Skipping(model.encoder.layer)),
    "an activation called GELU": _every("intermediate", _set(intermediate_act_fn=GELU())),
    "an activation's own function": _every("intermediate.intermediate_act_fn", _set(act=F.silu)),
    "a linear layer of another class": _replace("output.dense", Quantised),
    "a LayerNorm of another class": _replace("output.LayerNorm", _times(nn.LayerNorm, 0.5)),
    "a dropout of another class": _replace("output.dropout", _times(nn.Dropout, 0.5)),
    "identity in a dropout's place": _every("output", _set(dropout=nn.Identity())),
    "a weight of a class of its own": _every("output.dense", _subclass),
    "another scaling": _every("attention.self", _set(scaling=1.0)),
    "more heads": _every("attention.self", _heads),
    "another eps": _every("output.LayerNorm", _set(eps=1.0)),
    "no eps": _every("output.LayerNorm", _set(eps=0.0, weight=nn.Parameter(torch.full((16,), 0.5)))),
    "a negative eps": _every("output.LayerNorm", _set(eps=-0.05)),
    "other eps in one layer": lambda model: setattr(model.encoder.layer[0].output.LayerNorm, "eps", 1.0),
    "one layer with fewer neurons": _first_layer_narrower,
    "one layer with fewer heads": _fewer_heads,
    "another config in one layer": _another_config,
    "_call_impl on the object": _every("intermediate.dense", _call_impl),
    "a sparse weight (CSR)": _every("intermediate.dense", _sparse(torch.sparse_csr)),
    "a sparse weight (COO)": _every("intermediate.dense", _sparse(torch.sparse_coo)),
    "a layer that reads its neighbours": _last_layer_of_neighbours,
    "a hook that reads all positions": _subtract_the_mean,
    "no bias in the value": _every("attention.self.value", _added_bias),
    "no bias in the output": _every("output.dense", _added_bias),
    "a part's forward on the object": _every("intermediate", _bound(lambda out: out * 2)),
    "a layer's forward on the object": _every("", lambda layer: None),
    "the attention's forward on the object": _every("attention.self", _bound(lambda out: (out[0] * 0.5, *out[1:]))),
    "feed_forward_chunk on the object": lambda model: [_chunk(layer) for layer in model.encoder.layer] and None,
    "a hook that changes a part's result": _every("intermediate", _hook),
    "a hook that changes a part's input": _every("attention.output.dense", _pre_hook),
    "an attention function of somebody's own": _registered,
    "fewer neurons": lambda model: [_narrower(layer) for layer in model.encoder.layer] and None,
    "causal attention": _every("attention.self", _set(is_causal=True)),
}
CHANGES["a layer's forward on the object"] = lambda model: (
    [_bound(lambda out: out * 0.5)(layer) for layer in model.encoder.layer] and None
)
SWAPPED = ("another eps", "other eps in one layer", "no bias in the output", "fewer neurons")
SWAPPED += ("one layer with fewer neurons", "one layer with fewer heads", "_call_impl on the object")
HARMLESS = ("identity in a dropout's place", "causal attention")  # evaluation gives the same numbers


def _run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).last_hidden_state[MASK == 1]


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def _model() -> nn.Module:
    model = tiny_model("Bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros at first, and without a bias nothing would change
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_changed_before(name) -> None:
    plain, model = _run(_model()), _model()
    CHANGES[name](model)
    expected = _run(model)
    if name not in HARMLESS:
        assert (expected - plain).abs().max() > 1e-2, "the change itself must show"
    report = ctxfast.swap_in(model)
    _same(_run(model), expected)
    if not report.swapped:
        ((path, reason),) = report.near_misses
        assert path == "encoder" and reason.endswith(".") and len(reason) > 20
    else:  # what is swapped all the same is computed as it is now
        assert name in SWAPPED or "forward on the object" in name or "hook" in name
    ctxfast.restore(model)
    _same(_run(model), expected)


@pytest.mark.parametrize("name", CHANGES)
def test_changed_afterwards(name) -> None:
    model, other = _model(), _model()
    assert ctxfast.swap_in(model).swapped
    _same(_run(model), _run(other))
    for each in (model, other):
        CHANGES[name](each)
    _same(_run(model), _run(other))
    _same(_run(model), _run(other))  # and at the call after that


def _patched(target: object, name: str, factor: float):
    own = getattr(target, name)

    def changed(*args, **kwargs):
        out = own(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return mock.patch.object(target, name, changed)


# Changes of classes and functions, for every model at once.
PATCHES: dict[str, Callable] = {
    "the attention's class": lambda: _patched(hf.BertSelfAttention, "forward", 0.5),
    "the layer's class": lambda: _patched(hf.BertLayer, "forward", 0.9),
    "a function of the layer's class": lambda: mock.patch.object(hf.BertLayer, "feed_forward_chunk", _half_chunk),
    "the intermediate's class": lambda: _patched(hf.BertIntermediate, "forward", 2.0),
    "the encoder's class": lambda: mock.patch.object(hf.BertEncoder, "forward", _encoder_of_zeros),
    "another class's function": lambda: mock.patch.object(hf.BertOutput, "forward", _output_of_another),
    "torch.nn.Linear": lambda: _patched(nn.Linear, "forward", 0.9),
    "how torch.nn.Linear is called": lambda: mock.patch.object(nn.Linear, "__call__", _called),
    "how a layer's class is called": lambda: mock.patch.object(hf.BertIntermediate, "__call__", _called),
    "how every module is called": lambda: mock.patch.object(nn.Module, "__call__", _called),
    "what every call does": lambda: mock.patch.object(nn.Module, "_call_impl", _called),
    "the table of attention functions": lambda: mock.patch.object(hf, "ALL_ATTENTION_FUNCTIONS", _Functions()),
    "a function that the layer's class calls": lambda: _patched(hf, "apply_chunking_to_forward", 0.5),
    "torch.matmul": lambda: _patched(torch, "matmul", 0.5),
    "torch.nn.LayerNorm": lambda: _patched(nn.LayerNorm, "forward", 0.9),
    "the activation's class": lambda: _patched(transformers.activations.GELUActivation, "forward", 2.0),
    "torch's own attention": lambda: _patched(F, "scaled_dot_product_attention", 0.5),
    "eager attention": lambda: _patched(hf, "eager_attention_forward", 0.5),
    "a mode that sees functions": lambda: _Mode(),
}
TEMPORARY = ("a mode that sees functions",)  # looked for at every call, and no objection to the model
EAGER = ("eager attention", "torch.matmul")


_call = nn.Module._call_impl


def _called(self, *args, **kwargs):
    out = _call(self, *args, **kwargs)
    return out * 1.1 if isinstance(out, Tensor) else out


class _Functions:
    def get_interface(self, name: str, default: Callable) -> Callable:
        return _own_attention


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.9 if function is F.linear else out


def _half_chunk(self, attention_output):
    return self.output(self.intermediate(attention_output), attention_output) * 0.5


def _encoder_of_zeros(self, hidden_states, *args, **kwargs):
    return transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states * 0)


def _output_of_another(self, hidden_states, input_tensor):
    return hf.BertSelfOutput.forward(self, hidden_states, input_tensor) * 0.5


def _ready(name: str) -> nn.Module:
    return tiny_model("Bert", attn_implementation="eager" if name in EAGER else "sdpa")


@pytest.mark.parametrize("name", PATCHES)
def test_patched_before(name) -> None:
    model = _ready(name)
    plain = _run(model)
    with PATCHES[name]():
        expected = _run(model)
        assert (expected - plain).abs().max() > 1e-2
        report = ctxfast.swap_in(model)
        assert name in TEMPORARY or (not report.swapped and len(report.near_misses) == 1)
        _same(_run(model), expected)
    assert ctxfast.swap_in(model).swapped
    _same(_run(model), plain)


@pytest.mark.parametrize("name", PATCHES)
def test_patched_afterwards(name) -> None:
    model = _ready(name)
    plain = _run(model)
    other = copy.deepcopy(model)
    ctxfast.swap_in(model)
    _run(model)
    with PATCHES[name]():
        expected = _run(other)
        assert (expected - plain).abs().max() > 1e-2
        _same(_run(model), expected)
    _same(_run(model), plain)


@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_parts_of_distilbert(when) -> None:
    changes = {
        "attention": lambda layer: setattr(
            layer, "attention", _like(layer.attention, _times(distil.DistilBertSelfAttention, 0.5))
        ),
        "ffn": lambda layer: setattr(layer, "ffn", _like(layer.ffn, _times(distil.FFN, 0.5))),
        "ff_chunk": lambda layer: setattr(layer.ffn, "ff_chunk", lambda x: layer.ffn.lin2(layer.ffn.lin1(x))),
        "scaling": lambda layer: setattr(layer.attention, "scaling", 1.0),
    }
    for change in changes.values():
        model = tiny_model("DistilBert")
        other = copy.deepcopy(model)
        if when == "afterwards":
            assert ctxfast.swap_in(model).swapped
        for each in (model, other):
            for layer in each.transformer.layer:
                change(layer)
        if when == "before":
            assert not ctxfast.swap_in(model).swapped
        _same(_run(model), _run(other))


def test_an_encoder_that_cannot_be_looked_at_is_a_near_miss(monkeypatch) -> None:
    """Whatever goes wrong while a part is examined, the model stays usable."""

    def broken(layer, kind):
        raise KeyError("no such part")

    monkeypatch.setattr(transformers_layers, "examine", broken)
    model = _model()
    expected = _run(model)
    report = ctxfast.swap_in(model)
    assert report.near_misses == (("encoder", "it is not built as BertEncoder is (KeyError: 'no such part')."),)
    assert torch.equal(_run(model), expected)


def test_the_run_both_ways_sees_what_identity_does_not(monkeypatch) -> None:
    """With every comparison of objects switched off, the small run alone keeps a changed encoder from being swapped."""
    monkeypatch.setattr(transformers_layers, "_odd_sizes", lambda parts: None)
    model = _model()
    CHANGES["another scaling"](model)
    ((path, reason),) = ctxfast.swap_in(model).near_misses
    assert path == "encoder" and "of the largest value apart" in reason


def test_a_look_disturbs_nothing() -> None:
    """Modes, random numbers and gradients are as before; hooks do not see the look."""
    model, seen = tiny_model("Bert", dropout=0.5).train(), []
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model.encoder.layer[1].register_forward_hook(lambda *args: seen.append(1))
    assert ctxfast.swap_in(model).swapped
    assert torch.equal(torch.rand(3), expected) and not seen
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_arguments_that_are_not_known_are_the_originals() -> None:
    """Arguments of Transformers' attention functions reach them."""
    model = _model()
    expected = model(IDS, is_causal=True).last_hidden_state
    assert (expected - model(IDS).last_hidden_state).abs().max() > 1e-2
    ctxfast.swap_in(model, impl="cpu")
    assert torch.equal(model(IDS, is_causal=True).last_hidden_state, expected)

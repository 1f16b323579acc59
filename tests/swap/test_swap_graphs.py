# SPDX-License-Identifier: Apache-2.0
"""Swapped encoders in CUDA graphs, on the CPU with a stand-in for torch.cuda."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.fake_cuda import FakeCuda
from support.graphed import OnCpu
from torch import Tensor, nn

import ctxfast
from ctxfast.packing import Packing
from ctxfast.swap import transformers_layers
from ctxfast.swap.transformers_layers import is_capture

pytest.importorskip("transformers")
from support.hf_models import IDS, MASK, tiny_model  # noqa: E402


@pytest.fixture(autouse=True)
def _is_on_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_layers, "_is_on_gpu", lambda tensor: True)


def swapped(kind: str = "Bert") -> tuple[nn.Module, nn.Module]:
    """A swapped model, with its encoder."""
    model = tiny_model(kind)
    ctxfast.swap_in(model)
    encoder = model.transformer if kind == "DistilBert" else model.encoder
    encoder.__dict__["_ctxfast_graphs"] = OnCpu(is_harmless=is_capture)
    return model, encoder


@torch.no_grad()
def call(model: nn.Module) -> Tensor:
    return model(IDS, attention_mask=MASK).last_hidden_state


def check(model: nn.Module, other: nn.Module, times: int = 3) -> None:
    """Calls give what an unswapped copy of the model gives."""
    expected = call(other)
    for _ in range(times):
        torch.testing.assert_close(call(model)[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_swapped_encoders_go_through_graphs(cuda: FakeCuda) -> None:

    for kind in ("Bert", "DistilBert"):
        model, other = tiny_model(kind), tiny_model(kind)
        ctxfast.swap_in(model)
        encoder = model.encoder if kind == "Bert" else model.transformer
        encoder.__dict__["_ctxfast_graphs"] = OnCpu(is_harmless=is_capture)
        before = cuda.made
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        for call in range(3):
            found = model(IDS, attention_mask=MASK).last_hidden_state
            torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
            assert len(encoder._ctxfast_graphs) == (call > 0)
        states = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        assert len(states) == 3 and cuda.made == before + 1, "collecting hidden states runs without a graph"
        for parameter in encoder.parameters():  # in place: the graph reads them where they lie
            parameter.mul_(1.1)
        for parameter in (other.encoder if kind == "Bert" else other.transformer).parameters():
            parameter.mul_(1.1)
        expected = other(IDS, attention_mask=MASK).last_hidden_state
        found = model(IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
        encoder.cuda_graphs = False
        before = cuda.made
        model(IDS, attention_mask=MASK)
        assert cuda.made == before
        copied = copy.deepcopy(model)
        assert len((copied.encoder if kind == "Bert" else copied.transformer)._ctxfast_graphs) == 0
        ctxfast.restore(model)
        assert "_ctxfast_graphs" not in encoder.__dict__ and "cuda_graphs" not in encoder.__dict__


def _weights(encoder: nn.Module) -> list[nn.Parameter]:
    own = encoder.layer[0].attention.self
    return [own.query.weight, own.key.weight, own.value.weight]


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_query_key_and_value_are_laid_out_once(kind: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = swapped(kind)
    other = tiny_model(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = dict(model.named_parameters())
    gc.collect()
    check(model, other)
    assert cuda.made == 1
    nodes = cuda.graphs[0]().nodes
    assert not any(func is torch.ops.aten.cat.default for func, *_ in nodes), "weights are joined at every call"
    # The parameters are the same objects, with the same values and names.
    assert {name: id(each) for name, each in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    layout = [each.untyped_storage()._cdata for each in encoder.layer[0].parameters()]
    assert len(set(layout)) == len(layout) - 4, "weights of one layer, and its biases, lie together"

    def change(model: nn.Module) -> None:
        for number, parameter in enumerate(model.parameters()):
            with torch.no_grad():
                parameter.mul_(1.0 + 0.01 * number)

    change(model)  # in place
    change(other)
    check(model, other)
    model.load_state_dict(state)
    other.load_state_dict(state)
    check(model, other)
    for each in (model, other):  # an optimizer that was made before
        optimizer = torch.optim.SGD(before.values() if each is model else each.parameters(), 1e-3)
        each(IDS, attention_mask=MASK).last_hidden_state[MASK == 1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    check(model, other)
    assert cuda.made == 1
    copied = copy.deepcopy(model)
    change(copied)
    check(model, other)
    ctxfast.restore(model)
    torch.testing.assert_close(call(model), call(other))


def test_files_of_a_laid_out_model(cuda: FakeCuda, tmp_path) -> None:
    model, encoder = swapped()
    check(model, tiny_model("Bert"))
    query, key, _ = _weights(encoder)
    assert query.untyped_storage()._cdata == key.untyped_storage()._cdata
    model.save_pretrained(tmp_path / "whole")
    read = type(tiny_model("Bert")).from_pretrained(tmp_path / "whole").eval()
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("alias", ["state_dict", "data", "tied", "a flat buffer"])
def test_weights_that_are_seen_elsewhere_stay_where_they_are(alias: str, cuda: FakeCuda) -> None:
    model, encoder = swapped()
    other = tiny_model("Bert")
    query, key, value = _weights(encoder)
    if alias == "state_dict":
        kept = model.state_dict()["encoder.layer.0.attention.self.query.weight"]
    elif alias == "data":
        kept = query.data
    elif alias == "tied":
        encoder.layer[0].attention.self.key.weight = query
        other.encoder.layer[0].attention.self.key.weight.data = query.data.clone()
        kept = query
    else:
        flat = torch.cat([torch.zeros(5), *[each.detach().flatten() for each in (query, key, value)]])
        query.data = flat[5 : 5 + query.numel()].view_as(query)
        kept = query.data
    check(model, other)
    kept.mul_(2.0) if alias != "tied" else query.data.mul_(2.0)
    for name in ("query", "key") if alias == "tied" else ("query",):
        getattr(other.encoder.layer[0].attention.self, name).weight.data.mul_(2.0)
    check(model, other)


class _Doubling(nn.Module):
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x * 2


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "gelu": lambda encoder: setattr(F, "gelu", lambda x, approximate="none": x),
    "linear": lambda encoder: setattr(F, "linear", lambda x, weight, bias=None: x @ weight.t()),
    "a class's forward": lambda encoder: setattr(
        type(encoder.layer[0].output), "forward", lambda self, x, residual: residual
    ),
    "attention of somebody's": lambda encoder: setattr(encoder.config, "_attn_implementation", "odd"),
    "a layer's forward": lambda encoder: setattr(encoder.layer[0], "forward", lambda x, *args, **kwargs: x),
    "a hook": lambda encoder: encoder.layer[0].output.dense.register_forward_hook(lambda *args: args[2] * 2),
    "a layer": lambda encoder: encoder.layer.__setitem__(0, _Doubling()),
    "eps": lambda encoder: setattr(encoder.layer[0].output.LayerNorm, "eps", 0.5),
    "a layer less": lambda encoder: encoder.layer.__delitem__(0),
    "scaling": lambda encoder: setattr(encoder.layer[0].attention.self, "scaling", 1.0),
    "a transposed weight": lambda encoder: encoder.layer[0].attention.output.dense.weight.data.t_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_replay_that_should_not_have_been_is_not_returned(
    name: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph stands for is compared while it runs; on a difference the call runs as it is now."""
    model, encoder = swapped()
    if name == "attention of somebody's":
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        def odd(module: nn.Module, query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
            return sdpa_attention_forward(module, query, *args, **kwargs)[0] * 2, None

        AttentionInterface.register("odd", odd)
    other = copy.deepcopy(model)
    ctxfast.restore(other)
    check(model, other)
    assert cuda.made == 1 and cuda.replayed == 2
    for owner, function in ((F, "gelu"), (F, "linear"), (type(encoder.layer[0].output), "forward")):
        monkeypatch.setattr(owner, function, getattr(owner, function))  # put back afterwards
    replayed = cuda.replayed
    CHANGES[name](encoder)
    if name not in ("gelu", "linear", "a class's forward"):
        CHANGES[name](other.encoder)
    got = call(model)
    # A mask for an attention function that is not known is none that a graph was made for.
    assert cuda.replayed == replayed + (name != "attention of somebody's")
    torch.testing.assert_close(got[MASK == 1], call(other)[MASK == 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_mask_costs_one_wait(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = swapped()
    mask = (1.0 - MASK[:, None, None].float()) * torch.finfo(torch.float32).min
    x = torch.randn(*IDS.shape, model.config.hidden_size)
    for _ in range(3):
        model.encoder(x, mask)
    waits = []
    for name in ("tolist", "__bool__", "item", "__int__", "__float__"):
        own = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, own=own, name=name: waits.append(name) or own(self))
    model.encoder(x, mask)
    assert waits == ["tolist"]
    waits.clear()
    assert Packing.from_mask(MASK).total == int(MASK.numpy().sum()) and waits == ["tolist"]

# SPDX-License-Identifier: Apache-2.0
"""Packed weights: which writes are seen, by table; how copies end; ``forget_packed``."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support.hf_models import tiny_model
from torch import Tensor, nn

import ctxfast
from ctxfast import functional
from ctxfast.ops.shared import packed_weights, weight_cache
from ctxfast.ops.shared.weight_cache import Seen, WeightCache, forget_packed, sample_columns


@pytest.fixture(autouse=True)
def _sparse_samples(monkeypatch) -> None:
    """Weights of these sizes would be compared whole: take samples as of large ones."""
    monkeypatch.setattr(weight_cache, "WHOLE", 0)


class Model(nn.Module):
    """Parameters, and a call that packs them."""

    def __init__(self, call: Callable[..., Tensor], **weights: Tensor) -> None:
        super().__init__()
        self.call = call
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self) -> Tensor:
        return self.call(self)


def _linear(dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, rows: int = 5) -> nn.Module:
    x = torch.randn(rows, 40).to(dtype)
    return Model(
        lambda m: functional.linear_act(x, m.weight, weight_dtype=weight_dtype, impl="cpu"),
        weight=torch.randn(70, 40).to(dtype),
    )


def _char_cnn() -> nn.Module:
    module = ctxfast.nn.CharCnn(262, 4, [(1, 8), (3, 16)])
    ids = torch.randint(1, 262, (7, 50))
    module.forward = partial(type(module).forward, module, ids)
    return module


def _lstm(**options) -> nn.Module:
    module = ctxfast.nn.LSTM(11, 9, batch_first=True, bidirectional=True, proj_size=5, impl="cpu", **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 11)
    module.forward = lambda: type(module).forward(module, x)[0]
    return module


def _lstm_backward() -> nn.Module:
    """Packed for the backward: the gradient of the input."""
    module, x = _lstm().requires_grad_(False), torch.randn(2, 5, 11, requires_grad=True)

    def run() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(type(module).forward(module, x)[0].square().sum(), x)[0]

    module.forward = run
    return module


def _layers(dtype: torch.dtype = torch.float32, kind: str | None = None) -> nn.Module:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=20)
    module = ctxfast.Bert(ctxfast.BertConfig(**sizes), add_pooling_layer=False).to(dtype).eval().quantize(kind)
    for parameter in module.encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(1, 20, (2, 9))
    module.forward = lambda: type(module).forward(module, ids).last_hidden_state
    return module


class _Swapped(nn.Module):
    """A swapped encoder and a padded batch for it. With a ``forward`` of its own the encoder would run as before."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("Bert").eval()
        for name, parameter in self.model.encoder.named_parameters():
            if "LayerNorm" not in name:
                nn.init.normal_(parameter, std=0.5)
        self.ids, self.mask = torch.randint(5, 20, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
        self.mask[1, 3:] = 0
        ctxfast.swap_in(self.model)

    def forward(self) -> Tensor:
        return self.model(self.ids, attention_mask=self.mask).last_hidden_state[self.mask.bool()]


MAKES: dict[str, Callable[[], nn.Module]] = {
    "linear_act": _linear,
    "linear_act of many rows, bfloat16": partial(_linear, torch.bfloat16, rows=150),
    "linear_act, bfloat16": partial(_linear, torch.bfloat16),
    "linear_act, int8": partial(_linear, weight_dtype=torch.int8),
    "char_cnn": _char_cnn,
    "lstm": _lstm,
    "lstm, bfloat16": partial(_lstm, weight_dtype=torch.bfloat16),
    "lstm, int8": partial(_lstm, weight_dtype=torch.int8),
    "lstm, backward": _lstm_backward,
    "transformer_layers": _layers,
    "transformer_layers, bfloat16": partial(_layers, torch.bfloat16),
    "transformer_layers, int8": partial(_layers, kind="int8"),
    "swapped encoder": _Swapped,
}


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view(torch.int16 if weight.element_size() == 2 else torch.int32)


def _through_data(weight: Tensor, at: tuple) -> None:
    weight.data[at] *= -3


def _through_numpy(weight: Tensor, at: tuple) -> None:
    _bits(weight).numpy()[at] ^= 0x40 if weight.element_size() == 2 else 0x400000


def _through_dlpack(weight: Tensor, at: tuple) -> None:
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(weight.detach()))[at] += 2


def _through_storage(weight: Tensor, at: tuple) -> None:
    alias = torch.empty(0, dtype=weight.dtype).set_(weight.untyped_storage())
    alias.as_strided(weight.shape, weight.stride(), weight.storage_offset())[at] = 1.5


def _uncounted(weight: Tensor, at: tuple) -> None:
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight[at] -= 2


ROADS = [_through_data, _through_numpy, _through_dlpack, _through_storage, _uncounted]


def _places(weight: Tensor) -> dict[str, tuple]:
    """What the contract promises: rows and columns at both ends and within, blocks of them, everything."""
    everything = (slice(None),)
    if weight.dim() == 1:
        return {"all": everything, "one entry of a vector": (weight.shape[0] // 2,)}
    rows, rest = weight.shape[0], [range(size) for size in weight.shape[1:]]
    places: dict[str, tuple] = {"all": everything, "a block of rows": (slice(rows // 3, rows // 2 + 1),)}
    for row in (0, rows // 2 + 1, rows - 1):
        places[f"row {row}"] = (row,)
    for part in (0, 0.6, 1):
        column = tuple(sizes[round(part * (len(sizes) - 1))] for sizes in rest)
        places[f"column {column}"] = (slice(None), *column)
    places["a block of columns"] = (slice(None), slice(rest[0][-1] // 2, None))
    return places


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_write_to_rows_or_columns_is_seen_by_any_road(make) -> None:
    module = make()
    roads, stale, tried, silent = 0, [], 0, []
    others = ("embeddings", "pooler", "char_emb", "encoder.layer.0")
    names = [name for name, _ in module.named_parameters() if not name.removeprefix("model.").startswith(others)]
    with torch.no_grad():
        for name in names:
            weight = module.get_parameter(name)
            clean = weight.detach().clone()
            for place, at in _places(weight).items():
                road, roads = ROADS[roads % len(ROADS)], roads + 1
                before = module().clone()
                road(weight, at)
                found = module().clone()
                forget_packed()
                expected = module()
                cell = f"{name}, {place}, {road.__name__}"
                stale += [] if torch.equal(found, expected) else [cell]
                silent += [cell] if torch.equal(before, expected) else []
                tried += 1
                weight.copy_(clean)
    assert stale == [] and tried > 7
    assert len(silent) < tried / 4  # a key's bias changes nothing; what changes nothing proves nothing


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("make", [_linear, _layers, _lstm], ids=["linear_act", "transformer_layers", "lstm"])
def test_every_road_to_a_row(make, road) -> None:
    module = make()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() == 2 and "embeddings" not in name:
                before = module().clone()
                road(weight, (weight.shape[0] // 2,))
                found = module().clone()
                forget_packed(weight)
                assert torch.equal(found, module()) and not torch.equal(found, before), name


def test_not_a_number_is_no_change() -> None:
    module, packs = _linear(), []
    module.weight.data[:, 3] = torch.nan
    cache = WeightCache()
    for _ in range(3):
        cache.get([module.weight], "kind", lambda: packs.append(1))
    assert packs == [1]
    module.weight.data[:, 3] = -torch.tensor(torch.nan)
    cache.get([module.weight], "kind", lambda: packs.append(1))
    assert packs == [1, 1]


REPLACEMENTS = {
    "transposed": lambda w: w.t(),
    "turned by strides": lambda w: w.as_strided(w.shape, (1, w.shape[0])),
    "another offset": lambda w: torch.cat((torch.randn(1), w.flatten()))[:-1].view_as(w),
    "another dtype of the same size": lambda w: w.view(torch.int32).float(),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_another_layout_of_the_memory_is_seen(replace) -> None:
    x, weight = torch.randn(4, 64), nn.Parameter(torch.randn(64, 64))
    with torch.no_grad():
        functional.linear_act(x, weight, impl="cpu")
        weight.data = replace(weight.data)
        torch.testing.assert_close(functional.linear_act(x, weight, impl="cpu"), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_dtype_is_a_fact() -> None:
    weight, cache = torch.randn(8, 8).half(), WeightCache()
    assert cache.get([weight], "kind", lambda: 1) == 1
    weight.data = weight.data.view(torch.bfloat16)
    assert cache.get([weight], "kind", lambda: 2) == 2


def test_counted_writes_are_seen_to_the_single_entry() -> None:
    module = _linear()
    with torch.no_grad():
        for write in (lambda w: w[3, 3].add_(4), lambda w: w.detach()[3, 4].add_(4), lambda w: w.view(-1)[77].add_(4)):
            before = module().clone()
            write(module.weight)
            assert not torch.equal(module(), before)


def test_passing_tensors_over_one_memory() -> None:
    """``.data`` is another tensor each time, often where the last one lay: that its own count is 0 proves nothing."""
    weight, cache, ids, found = torch.randn(70, 40), WeightCache(), set(), []
    for _ in range(20):
        passing = weight.data
        ids.add(id(passing))
        found.append(cache.get([passing], "kind", object))
        del passing
        assert len(cache) == 0
        weight[3, 3] += 4
    assert len(set(found)) == 20 > len(ids)


def _hidden_entry(module: nn.Module) -> Tensor:
    """Writes one entry that is in no sample; the result that follows from it."""
    weight = module.weight
    column = (sample_columns(*weight.shape, 4)[3, -1] + 1) % weight.shape[1]
    before = module().clone()
    weight.data[3, column] += 4
    expected = copy.deepcopy(module)()
    assert torch.equal(module(), before) and not torch.equal(before, expected)  # what forget_packed is for
    return expected


@pytest.mark.parametrize("of", [lambda m: (), lambda m: (m,), lambda m: (m.weight,)], ids=["all", "module", "weight"])
def test_forget_packed(of) -> None:
    module, other = _linear(), _linear()
    with torch.no_grad():
        other()
        expected = _hidden_entry(module)
        forget_packed(other)
        assert not torch.equal(module(), expected)
        ctxfast.forget_packed(*of(module))
        assert torch.equal(module(), expected)


def test_forget_packed_reaches_copies_of_copies() -> None:
    module = _Swapped()
    weight = module.model.encoder.layer[1].attention.self.key.weight
    with torch.no_grad():
        before = module().clone()
        column = (sample_columns(*weight.shape, 4)[3, -1] + 1) % weight.shape[1]
        weight.data[3, column] += 9
        assert torch.equal(module(), before)
        forget_packed(module)
        changed = module().clone()
        ctxfast.restore(module.model)
        torch.testing.assert_close(changed, module(), rtol=1e-4, atol=1e-4)
        assert not torch.equal(changed, before)


def test_what_a_cache_made_needs_no_samples() -> None:
    made = WeightCache().get([torch.randn(8, 8)], "kind", lambda: torch.randn(8, 8))
    for tensor, is_compared in ((made, False), (made.clone(), True)):
        seen = Seen((tensor,), lambda _: False, lambda _: None)
        tensor.data.zero_()
        assert seen.are_still((tensor,)) is not is_compared


@pytest.mark.parametrize("wrong", ["model", 3, [torch.ones(2)], None])
def test_forget_packed_refuses(wrong) -> None:
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"ctxfast.forget_packed: of is a {kind}; expected modules and tensors"):
        forget_packed(wrong)


def test_what_is_forgotten_while_it_is_packed_is_not_kept() -> None:
    cache, weight = WeightCache(), torch.randn(4, 4)
    assert cache.get([weight], "kind", lambda: forget_packed() or 1) == 1
    assert cache.get([weight], "kind", lambda: 2) == 2


@pytest.mark.parametrize("make", [_linear, _lstm, _layers], ids=["linear_act", "lstm", "transformer_layers"])
def test_copies_and_files_carry_nothing_packed(make) -> None:
    module = make()
    parameters = list(module.parameters())

    def stored() -> bytes:
        file = io.BytesIO()
        torch.save([parameters, copy.deepcopy(parameters), module.state_dict()], file)
        return file.getvalue()

    before = stored()
    with torch.no_grad():
        module()
    assert stored() == before
    assert not any(vars(parameter) for parameter in parameters)


def test_a_copy_has_packed_weights_of_its_own() -> None:
    module = _linear()
    with torch.no_grad():
        before = module().clone()
        other = copy.deepcopy(module)
        other.weight.data[5] *= 3
        assert not torch.equal(other(), before) and torch.equal(module(), before)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_parameters_can_be_swapped_after_a_call(monkeypatch, make) -> None:
    module, other = make(), make()
    with torch.no_grad():
        module()
        other()
        if not isinstance(module, nn.RNNBase):  # torch's own module holds references to its parameters
            for one, two in zip(module.parameters(), other.parameters()):
                torch.utils.swap_tensors(one, two)
            found = module().clone()
            forget_packed()
            assert torch.equal(found, module())
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        assert module.double() is module and next(module.parameters()).dtype is torch.float64


def test_entries_die_with_the_memory_of_parameters() -> None:
    gc.collect()
    cache = WeightCache()
    weight, plain = nn.Parameter(torch.randn(8, 8)), torch.randn(8, 8)
    cache.get([weight, plain], "both", object)
    cache.get([weight], "one", object)
    cache.get([plain], "other", object)
    weight.data = torch.randn(8, 8)
    assert len(cache) == 1
    cache.get([weight], "one", object)
    del weight
    gc.collect()
    assert len(cache) == 1
    del plain
    assert len(cache) == 0


def test_an_entry_goes_while_entries_are_read() -> None:
    """As where the collector frees its source in the midst of a walk, which allocates memory (Python up to 3.11)."""
    cache = WeightCache()
    tensors = [torch.ones(4, 4) for _ in range(6)]

    class Shrinking(dict):
        times = 0

        def items(self):  # noqa: ANN202
            for number, item in enumerate(super().items()):
                if number == 2 and self.times < 2:
                    self.times += 1
                    self.pop(("kind", id(tensors.pop())), None)
                yield item

    for tensor in tensors:
        cache.get((tensor,), "kind", lambda: 1)
    cache._entries = Shrinking(cache._entries)
    held = torch.ones(4, 4)
    assert cache.get((held,), "kind", lambda: 2) == 2 and cache._entries.times == 2
    assert len(cache) == len(tensors) + 1 == 5
    cache._entries.times = 0
    cache.forget([held])
    assert cache._entries.times == 2 and len(cache) == len(tensors) == 2


def test_parameters_that_come_and_go_over_one_memory() -> None:
    """As load_state_dict(assign=True) makes them, time and again, from a state dict that is kept."""
    gc.collect()
    state = {"weight": torch.randn(64, 64)}
    before, kept = len(packed_weights.CACHE), []
    with torch.no_grad():
        for _ in range(12):
            model = nn.Linear(64, 64, bias=False)
            model.load_state_dict(state, assign=True)
            kept.append(model)
            functional.linear_act(torch.randn(2, 64), model.weight, impl="cpu")
    assert len(packed_weights.CACHE) - before <= 4
    kept.clear()
    del state, model
    gc.collect()
    assert len(packed_weights.CACHE) == before


def test_vectors_in_larger_memory() -> None:
    """Biases that are views of a file's memory are copied: the kernel's table must not keep the file."""
    module = _layers()
    flat = torch.cat([parameter.data.flatten() for parameter in module.parameters()])
    gc.collect()
    before, start = len(packed_weights.CACHE), 0
    for parameter in module.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    with torch.no_grad():
        first = module().clone()
        for name in ("attention.output.dense.bias", "output.LayerNorm.weight"):
            module.encoder.layer[1].get_parameter(name).data[5] += 3
            found = module().clone()
            forget_packed()
            assert torch.equal(found, module()) and not torch.equal(found, first), name
            first = found
        assert len(packed_weights.CACHE) > before
        del flat, parameter, module
    gc.collect()
    assert len(packed_weights.CACHE) == before


def test_another_process_writes(monkeypatch) -> None:
    module = _linear()
    module.share_memory()
    with torch.no_grad():
        module()
        child = os.fork()
        if child == 0:
            module.weight.detach().numpy()[:, 7] = 2.0
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        found = module().clone()
        forget_packed()
        assert torch.equal(found, module())


def test_threads_call_write_and_forget() -> None:
    module, failures = _layers(), []
    rounds = threading.Barrier(3)

    def call() -> None:
        try:
            with torch.no_grad():
                for _ in range(8):
                    assert module().isfinite().all()
                rounds.wait()
        except BaseException as error:
            failures.append(error)
            rounds.abort()

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(8):
        weight = module.encoder.layer[step % 2].output.dense.weight
        weight.data = torch.randn_like(weight) if step % 3 else weight.data.mul_(0.9)
        forget_packed(*[module, weight][: step % 3])
    with torch.no_grad():
        rounds.wait(60)
        found = module().clone()
        forget_packed()
        assert torch.equal(found, module())
    for thread in threads:
        thread.join()
    assert not failures


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    forget_packed()

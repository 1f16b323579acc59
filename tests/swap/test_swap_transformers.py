# SPDX-License-Identifier: Apache-2.0
"""Encoders of Transformers after ``swap_in``: they compute what they computed, and stay what they are."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model as _model
from torch import Tensor, nn

import ctxfast
from ctxfast.nn import encoder as nn_encoder
from ctxfast.swap import transformers as swap_transformers

transformers = pytest.importorskip("transformers")

KINDS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie", "DistilBert")
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
MORE_HEADS = (
    ("Bert", "ForNextSentencePrediction"),
    ("Bert", "ForPreTraining"),
    ("Electra", "ForPreTraining"),
    ("Roberta", "ForMultipleChoice"),
)


def _labels(head: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, 2, (3, 7), generator=generator)
    if head in ("ForMaskedLM", "ForTokenClassification"):
        return {"labels": torch.where(MASK == 1, tokens, -100)}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([1, 0, 0]), "end_positions": torch.tensor([3, 2, 1])}
    return {}


def _outputs(model: nn.Module, head: str, **inputs) -> dict[str, Tensor]:
    """Every tensor a model returns, zero at padding where the head is not said to read it."""
    inputs = dict(input_ids=IDS, attention_mask=MASK) | inputs
    if head == "ForMultipleChoice":
        inputs = {name: value[:, None].repeat(1, 2, 1) for name, value in inputs.items()}
    found = {}
    for name, value in model(**inputs, **_labels(head)).items():
        for i, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if head != "ForQuestionAnswering" and tensor.dim() >= 2 and tensor.shape[:2] == MASK.shape:
                tensor = tensor * MASK.view(3, 7, *(1,) * (tensor.dim() - 2))
            found[f"{name}[{i}]"] = tensor
    return found


def _gradients(model: nn.Module, head: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    total = sum(
        (out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum()
        for out in _outputs(model, head).values()
    )
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found) if grad is not None}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """No further from the exact results than twice what the original is, and a few units in the last place."""
    assert found.keys() == expected.keys()
    for name, right in exact.items():
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype, name
        eps = torch.finfo(found[name].dtype).eps
        one, two = ((tensor.double() - right.double()).abs().max() for tensor in (found[name], expected[name]))
        assert one <= 2 * two + 16 * eps * max(1.0, float(right.abs().max())), (name, float(one), float(two))


def _identities(model: nn.Module) -> dict[str, int]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: id(tensor) for name, tensor in tensors.items()} | {n: id(m) for n, m in model.named_modules() if n}


CASES = [(kind, head) for kind in KINDS for head in HEADS if (kind, head) != ("Electra", "ForMaskedLM")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "head"), [*CASES, *MORE_HEADS])
def test_outputs_gradients_and_identity(kind, head, dtype) -> None:
    """Before, during and after: the same results, in both modes; the same objects, names and values."""
    model = _model(kind, head).to(dtype)
    exact = copy.deepcopy(model).double()
    identities, state = _identities(model), copy.deepcopy(model.state_dict())
    before = _outputs(model, head)
    expected = {True: _gradients(model.train(), head), False: _outputs(model.eval(), head)}
    report = ctxfast.swap_in(model)
    assert len(report.swapped) == 1 and type(next(m for m in model.modules() if hasattr(m, "layer"))).__module__ == (
        "ctxfast.swap.transformers"
    )
    with torch.no_grad():
        _same(_outputs(model, head), expected[False], _outputs(exact, head))
    _same(_gradients(model.train(), head), expected[True], _gradients(exact.train(), head))
    assert _identities(model) == identities
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert ctxfast.restore(model.eval()) == (report.swapped[0][0],)
    assert _identities(model) == identities and ctxfast.restore(model) == ()
    for name, value in _outputs(model, head).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("attention", "impl"), [("sdpa", None), ("eager", None), ("sdpa", "reference")])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_forms_of_mask(kind, attention, impl) -> None:
    model = _model(kind, attn_implementation=attention)
    masks = [MASK, MASK.bool(), MASK.float(), torch.ones_like(MASK), None]
    call = [dict(attention_mask=mask, output_hidden_states=True) for mask in masks]
    with torch.no_grad():
        expected = [_outputs(model, "Model", **kwargs) for kwargs in call]
        assert ctxfast.swap_in(model, impl).swapped
        for kwargs, right in zip(call, expected):
            found = _outputs(model, "Model", **kwargs)
            assert found.keys() == right.keys() and "hidden_states[2]" in found
            for name, value in found.items():
                torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)
        padded = model(IDS, attention_mask=MASK).last_hidden_state
    assert not padded[MASK == 0].any()  # the packed road was taken


def _modes(attention: bool, dropout: bool) -> nn.Module:
    """A model that drops attention weights alone, its attentions and their dropouts each in a mode of their own."""
    model = _model("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    for layer in model.encoder.layer:
        layer.attention.self.training, layer.attention.self.dropout.training = attention, dropout
    return model


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_attention_drops_by_its_own_mode(attention, dropout) -> None:
    """As in Monte Carlo dropout, which puts modules of the class Dropout into training mode."""
    model = _modes(attention, dropout)

    def drops() -> bool:
        return not torch.equal(*(model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2)))

    assert drops() is attention
    ctxfast.swap_in(model)
    assert drops() is attention


@torch.no_grad()
def test_dense_batches_run_as_before_on_a_cpu_unless_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(swap_transformers.capability, "is_mkl_slow", lambda: False)
    model = _model("Bert")
    expected = model(IDS).last_hidden_state
    calls, packed = [], swap_transformers.Layers.examined
    monkeypatch.setattr(
        swap_transformers.Layers, "examined", lambda *args: calls.extend(args[1].layers) or packed(*args)
    )
    ctxfast.swap_in(model)
    calls.clear()
    assert torch.equal(model(IDS).last_hidden_state, expected) and not calls
    monkeypatch.setattr(swap_transformers.capability, "is_mkl_slow", lambda: True)
    torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    ctxfast.restore(model)
    ctxfast.swap_in(model, impl="reference")
    calls.clear()
    torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_a_compiled_layer_inside_a_swapped_encoder_is_no_near_miss() -> None:
    model = _model("Bert")
    model.encoder.layer[1].compile()
    for _ in range(2):
        report = ctxfast.swap_in(model)
        assert [path for path, *_ in report.swapped] == ["encoder"] and report.near_misses == ()


@pytest.mark.parametrize("impl", ["cuda", "cuda_step"])
def test_an_implementation_that_no_op_inside_has_is_a_near_miss(impl) -> None:
    model = _model("Bert")
    report = ctxfast.swap_in(model, impl=impl)
    assert not report.swapped and report.near_misses[0][0] == "encoder"
    assert f"impl='{impl}' was asked for, but none of the ops of this model (transformer_layers, " in str(report)


@torch.no_grad()
def test_attention_weights_come_from_the_original_with_a_warning() -> None:
    model = _model("Bert", attn_implementation="eager")
    expected = model(IDS, attention_mask=MASK, output_attentions=True)
    ctxfast.swap_in(model)
    with pytest.warns(UserWarning, match="attention weights were asked for"):
        found = model(IDS, attention_mask=MASK, output_attentions=True)
    assert len(found.attentions) == 2
    for one, two in zip(found.attentions, expected.attentions):
        assert torch.equal(one, two)


def test_question_answering_scores_padding_as_before() -> None:
    model = _model("Bert", "ForQuestionAnswering")
    expected = model(IDS, attention_mask=MASK).start_logits
    report = ctxfast.swap_in(model)
    assert "a question-answering head scores padding" in dict(report.near_misses)["bert.encoder"]
    assert torch.equal(model(IDS, attention_mask=MASK).start_logits, expected)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_twenty_training_steps_have_the_same_losses(kind) -> None:
    losses = {}
    for is_swapped in (False, True):
        model = _model(kind, "ForSequenceClassification").train()
        if is_swapped:
            ctxfast.swap_in(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[is_swapped] = []
        for step in range(20):
            ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(step % 2))
            loss = model(ids, attention_mask=MASK, labels=ids[:, 0] % 2).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[is_swapped].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-3, abs=1e-4)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_gradient_checkpointing_recomputes_layers(kind, monkeypatch) -> None:
    model = _model(kind).train()
    expected = _gradients(model, "Model")
    ctxfast.swap_in(model)
    calls, run = [], nn_encoder.by_ops
    monkeypatch.setattr(nn_encoder, "by_ops", lambda *args: calls.append(1) or run(*args))
    for is_on, count in ((False, 2), (True, 4)):
        if is_on:
            model.gradient_checkpointing_enable()
        found = _gradients(model, "Model")
        assert len(calls) == count
        calls.clear()
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4)


def test_dropout_drops_in_training_only() -> None:
    model = _model("Bert", dropout=0.5)
    ctxfast.swap_in(model)
    with torch.no_grad():
        still = [model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2)]
        model.train()
        drawn = [model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*drawn)


@torch.no_grad()
def test_autocast_keeps_dtypes() -> None:
    model = _model("Bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(IDS, attention_mask=MASK)
        ctxfast.swap_in(model)
        found = model(IDS, attention_mask=MASK)
    for name in ("last_hidden_state", "pooler_output"):
        assert found[name].dtype == expected[name].dtype
    error = (found.last_hidden_state - expected.last_hidden_state)[MASK == 1].abs().max()
    assert error < 0.1


@torch.no_grad()
def test_weights_changed_afterwards_are_used() -> None:
    model, other = _model("Bert"), _model("Bert")
    ctxfast.swap_in(model)
    model(IDS, attention_mask=MASK)
    for each in (model, other):
        for parameter in each.encoder.parameters():
            parameter.mul_(1.5)
    found, expected = (each(IDS, attention_mask=MASK).last_hidden_state for each in (model, other))
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_layers_are_one_call_with_the_same_bits(kind, monkeypatch) -> None:
    calls, run = [], nn_encoder.one_call
    monkeypatch.setattr(nn_encoder, "one_call", lambda layers, *args: calls.append(len(layers)) or run(layers, *args))
    model = _model(kind)
    ctxfast.swap_in(model)
    assert calls == [2]  # the small run takes the same road
    calls.clear()
    found = model(IDS, attention_mask=MASK).last_hidden_state
    assert calls == [2]
    layers = model(IDS, attention_mask=MASK, output_hidden_states=True)
    assert calls == [2, 2]
    assert torch.equal(found, layers.last_hidden_state) and torch.equal(found, layers.hidden_states[-1])


@pytest.mark.parametrize("place", ["layer.1", "layer.1.attention.self", "layer.0.output.dense"])
@torch.no_grad()
def test_hooks_fire_as_before(place) -> None:
    seen = []
    model = _model("Bert")
    model.encoder.get_submodule(place).register_forward_hook(
        lambda module, args, output: seen.append((output[0] if isinstance(output, tuple) else output).clone())
    )
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    ctxfast.swap_in(model)
    found = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1][MASK == 1], seen[0][MASK == 1], rtol=1e-4, atol=1e-5)


class _Adapted(nn.Linear):
    """As adapters do: another module in a Linear's place."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@torch.no_grad()
def test_a_layer_that_got_an_adapter_runs_as_before() -> None:
    model, plain = _model("Bert"), _model("Bert")
    ctxfast.swap_in(model)
    for each in (model, plain):
        each.encoder.layer[0].attention.self.value.__class__ = _Adapted
    found, expected = (each(IDS, attention_mask=MASK).last_hidden_state for each in (model, plain))
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)
    ((path, reason),) = ctxfast.swap_in(plain).near_misses
    assert path == "encoder" and "_Adapted where torch.nn.Linear was" in reason


def test_copies_pickles_and_idempotence() -> None:
    model = _model("XLMRoberta")
    first = ctxfast.swap_in(model)
    second = ctxfast.swap_in(model, strict=True)
    assert first.swapped == second.swapped
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, model.double().float()):
        assert torch.equal(other(IDS, attention_mask=MASK).last_hidden_state, expected)
        assert ctxfast.restore(other) == ("encoder",)
        assert type(other.encoder) is transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaEncoder


@torch.no_grad()
def test_saves_as_the_original_and_compiles(tmp_path) -> None:
    model = _model("Bert")
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    ctxfast.swap_in(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert type(loaded.encoder) is transformers.models.bert.modeling_bert.BertEncoder
    assert torch.equal(loaded(IDS, attention_mask=MASK).last_hidden_state, expected)
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_real_weights(minilm_dir) -> None:
    model = transformers.AutoModel.from_pretrained(minilm_dir).eval()
    ids = torch.randint(1000, 20000, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    expected = model(ids, attention_mask=mask)
    assert ctxfast.swap_in(model).swapped
    found = model(ids, attention_mask=mask)
    assert not found.last_hidden_state[1, 9:].any()
    torch.testing.assert_close(
        found.last_hidden_state[mask == 1], expected.last_hidden_state[mask == 1], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


class _SentenceEncoder(nn.Sequential):
    """A model around a model, as sentence-transformers has it."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self[0].auto_model(ids, attention_mask=mask).last_hidden_state * mask[:, :, None]
        return states.sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def test_models_inside_models() -> None:
    inner = nn.Module()
    inner.auto_model = _model("Bert")
    model = _SentenceEncoder(inner)
    expected = model(IDS, MASK)
    assert [path for path, _, _ in ctxfast.swap_in(model).swapped] == ["0.auto_model.encoder"]
    torch.testing.assert_close(model(IDS, MASK), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_impl_is_passed_on() -> None:
    model = _model("Bert")
    expected = model(IDS, attention_mask=MASK).last_hidden_state
    ctxfast.swap_in(model, impl="reference")
    found = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_random_small_configurations(seed) -> None:
    """Sizes, activations, lengths and masks drawn at random; a text of padding alone, one token, none of padding."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    kind = pick(*KINDS)
    heads = pick(1, 2, 3)
    width = heads * pick(4, 8, 20)
    if kind == "DistilBert":
        options = dict(dim=width, n_heads=heads, n_layers=pick(1, 3), hidden_dim=pick(8, 40), activation="gelu")
    else:
        options = dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=pick(1, 3))
        options |= dict(intermediate_size=pick(8, 40), hidden_act=pick("gelu", "relu", "gelu_new"))
        options |= dict(layer_norm_eps=pick(1e-12, 1e-5))
    import transformers as hf

    torch.manual_seed(seed)
    config = getattr(hf, f"{kind}Config")(vocab_size=40, max_position_embeddings=64, pad_token_id=1, **options)
    model = getattr(hf, f"{kind}Model")(config).eval()
    lengths = [pick(1, 2, 9, 17) for _ in range(pick(1, 5))]
    ids = torch.randint(3, 40, (len(lengths), 17), generator=draw)
    mask = (torch.arange(17) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask).last_hidden_state
        assert ctxfast.swap_in(model, impl="cpu" if seed % 2 else None).swapped
        found = model(ids, attention_mask=mask).last_hidden_state
    real = mask == 1
    _same({"out": found[real]}, {"out": expected[real]}, {"out": exact[real]})


def test_versions_outside_the_tested_range_warn_once(monkeypatch) -> None:
    models = [_model("Bert") for _ in range(3)]
    monkeypatch.setattr(swap_transformers, "_version", lambda: "6.1.0")
    monkeypatch.setattr(swap_transformers, "_is_warned", False)
    with pytest.warns(UserWarning, match="Transformers is 6.1.0; ctxfast.swap_in is tested with 5"):
        assert ctxfast.swap_in(models[0]).swapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ctxfast.swap_in(models[1]).swapped
    monkeypatch.setattr(swap_transformers, "_version", lambda: "4.57.1")
    (miss,) = ctxfast.swap_in(models[2]).near_misses
    assert miss == ("encoder", "Transformers is 4.57.1; version 5 is needed.")


def test_quantised_layers_are_near_misses() -> None:
    model = torch.ao.quantization.quantize_dynamic(_model("Bert"), {nn.Linear})
    report = ctxfast.swap_in(model)
    assert not report.swapped
    assert any("an adapter, or quantised" in reason for _, reason in report.near_misses)

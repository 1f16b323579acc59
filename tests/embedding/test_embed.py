# SPDX-License-Identifier: Apache-2.0
"""``Embedder`` in Python: choices, shapes and order against a fake model, values against real BERT and ELMo weights."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from support.fake_encoder import DIM, LAYERS, FakeEncoder, vectors

import ctxfast
from ctxfast._core import calls, choice
from ctxfast.embedding.batch_encoder import STATES
from ctxfast.embedding.embedder import Embedder
from ctxfast.embedding.open_model import open_encoder

WORDS = [line.split() for line in ("the cat sat on the mat", "a", "", "one two three", "a a a a a a a a a a")]


@pytest.fixture
def fake() -> Embedder:
    return Embedder(FakeEncoder(), batch_tokens=8)


@pytest.fixture(scope="module")
def minilm(minilm_dir) -> Embedder:
    return Embedder(minilm_dir, device="cpu")


@pytest.fixture(scope="module")
def reference(shared_data) -> tuple[dict, dict[str, np.ndarray]]:
    folder = shared_data / "bert"
    return json.loads((folder / "minilm_l6_reference.json").read_text()), np.load(folder / "minilm_l6_reference.npz")


@pytest.fixture(scope="module")
def elmo_dir(shared_data):
    return shared_data / "elmo" / "allennlp_tiny"


# Shapes, order, choices


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("top", lambda v: v[2]),
        ("all", lambda v: v),
        ("average", lambda v: v.mean(0)),
        (0, lambda v: v[0]),
        (-2, lambda v: v[1]),
        ([-1], lambda v: v[2]),
        ([-1, 0], lambda v: v[[2, 0]]),
        ((0, 1, 2), lambda v: v),
    ],
)
def test_layers_of_tokens(fake, layers, expected):
    results = fake(WORDS, layers=layers)
    assert len(results) == len(WORDS)
    for words, result in zip(WORDS, results):
        wanted = expected(vectors(words))
        assert result.shape == wanted.shape and result.dtype == np.float32
        np.testing.assert_allclose(result, wanted, rtol=1e-6)


def test_sentences(fake):
    for words, result in zip(WORDS, fake(WORDS, level="sentence", layers=[0, 1])):
        assert result.shape == (2, DIM)
        np.testing.assert_allclose(result, vectors(words)[:2].sum(1) / max(len(words), 1), rtol=1e-5, atol=1e-7)
    matrix = fake(WORDS, level="sentence")
    assert isinstance(matrix, np.ndarray) and matrix.shape == (len(WORDS), DIM) and matrix.dtype == np.float32
    assert fake(WORDS, level="sentence", layers="all").shape == (len(WORDS), 3, DIM)
    tensor = fake(WORDS, level="sentence", output="torch")
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), matrix)


def test_strings_are_split_by_elmo(fake):
    texts = [" ".join(words) for words in WORDS]
    for by_text, by_words in zip(fake(texts), fake(WORDS)):
        np.testing.assert_array_equal(by_text, by_words)
    assert fake.tokens(texts) == WORDS and fake.tokens(WORDS) == WORDS


def test_default_budgets(fake):
    wide = FakeEncoder()
    wide.dim = 1 << 20
    everything, top = fake.select(layers="all"), fake.select()
    assert Embedder(FakeEncoder()).token_budget(everything) == 2048 and fake.token_budget(top) == 8
    assert Embedder(wide).token_budget(top) == 64 and Embedder(wide).token_budget(everything) == 21


def test_batches_and_own_memory(fake):
    results = fake(WORDS)
    assert fake.encoder.batches == [[10], [6], [3, 1], [0]] or fake.encoder.batches == [[10], [6], [3, 1, 0]]
    assert all(result.base is None for result in results)


def test_torch_and_half():
    results = Embedder(FakeEncoder(), vector_dtype="float16")(WORDS, output="torch")
    assert all(isinstance(result, torch.Tensor) and result.dtype == torch.float16 for result in results)
    np.testing.assert_array_equal(results[0].numpy(), vectors(WORDS[0])[2].astype(np.float16))
    assert Embedder(FakeEncoder(), vector_dtype="float16")(WORDS)[0].dtype == np.float16


def test_nothing(fake):
    assert fake([]) == [] and fake.tokens([]) == []
    assert fake([], level="sentence").shape == (0, DIM) and fake([], level="sentence", output="torch").shape == (0, DIM)


def test_carry_keeps_order_and_rows():
    embedder = Embedder(FakeEncoder(carries=True), state="carry", batch_size=2)
    results = embedder(WORDS, layers="all")
    for index, (words, result) in enumerate(zip(WORDS, results)):
        np.testing.assert_array_equal(result, vectors(words, seen=index // 2))
    again = embedder(WORDS[:1], layers="all")[0]
    np.testing.assert_array_equal(again, vectors(WORDS[0], seen=3))
    embedder.reset()
    np.testing.assert_array_equal(embedder(WORDS[:1], layers="all")[0], vectors(WORDS[0]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers="topp"), "layers is 'topp'; expected 'all', 'top', 'average'"),
        (dict(layers=[]), "layers is "),
        (dict(layers=[True]), "layers is "),
        (dict(layers=3), f"layers holds 3; expected numbers in -{LAYERS}..{LAYERS - 1}"),
        (dict(layers=-4), "layers holds -4"),
        (dict(layers=[0, -3]), "expected every layer once"),
        (dict(level="word"), "level is 'word'; expected one of token, sentence"),
        (dict(pooling="median"), "pooling is 'median'; expected one of None, cls, max, mean, "),
        (dict(normalize="yes"), "normalize is 'yes'; expected one of None, True, False"),
        (dict(level="sentence", pooling="cls"), "pooling is 'cls'; expected 'mean': ELMo"),
        (dict(pooling="mean"), "pooling is 'mean' at token level; expected level 'sentence' for it"),
        (dict(word_pieces="first"), "word_pieces is 'first'; expected it for a BERT model at token level, with texts"),
        (dict(word_pieces="last"), "word_pieces is 'last'"),
        (dict(output="list"), "output is 'list'"),
    ],
)
def test_wrong_choices(fake, options, message):
    with pytest.raises(ValueError) as error:
        fake(WORDS, **options)
    assert message in str(error.value) and str(error.value).startswith("ctxfast.")


@pytest.mark.parametrize(
    "texts, message",
    [
        ("one string", "texts is one string; expected a list of texts. Put it in brackets"),
        (b"bytes", "texts is bytes"),
        (None, "texts is of type NoneType; expected a list of texts"),
        (3, "texts is of type int"),
        (np.array("a"), "texts is of type ndarray"),
        ({"text": ["a"]}, "texts is of type dict, a table; .* Pass one column of it, such as texts..text..; it has 't"),
        ({"a", "b"}, "texts is of type set, which has no order"),
        (
            ["a", "b", None],
            "text 2 is None; expected a string or a list of words. It alone is missing: leave such texts",
        ),
        ([None, "a", float("nan")], r"text 0 is None; .* 2 texts are missing: leave such texts out .*, or put '' in"),
        (["a", float("nan")], r"text 1 is nan \(float\); expected a string .* It alone is missing"),
        (np.array(["a", 3], dtype=object), r"text 1 is 3 \(int\)"),
        (["a", 1, None], r"text 1 is 1 \(int\)"),
        (["a", b"b"], r"text 1 is b'b' \(bytes\)"),
        ([["a"], ["b", 1]], r"text 1 holds 1 \(int\); expected words that are strings"),
        ([["a"], ["b", None]], "text 1 holds None"),
        ([["a"], [["b"]]], r"text 1 holds \['b'\] \(list\)"),
        ([["a"], 2.5], r"text 1 is 2.5 \(float\)"),
        (["a", ["b"], None], "text 2 is None"),
        (["a", "b", ["c"]], "text 2 is a list of words where text 0 is a string; expected only strings, or only"),
        ([["a"], "b", ["c"]], "text 1 is a string where text 0 is a list of words"),
        (["a", {"b": 1}], r"text 1 is {'b': 1} \(dict\)"),
        (["a", np.zeros((30, 30))], "text 1 is of type ndarray"),
    ],
)
def test_wrong_texts(fake, texts, message):
    """The text that is wrong is the one that is named."""
    with pytest.raises(TypeError, match=f"^ctxfast.Embedder: {message}"):
        fake(texts)
    with pytest.raises(TypeError, match=f"^ctxfast.Embedder: {message}"):
        fake.tokens(texts)


def test_texts_of_other_libraries(minilm):
    """Strings and lists in other people's containers."""
    pd = pytest.importorskip("pandas")
    for texts, message in (
        (
            pd.DataFrame({"text": ["a", "b"], "n": [1, 2]}),
            r"type DataFrame, a table; .* such as texts\['text'\]; it has 'text', 'n'\.",
        ),
        (pd.Series(["a", "b", None], dtype=object), "text 2 is None; .* It alone is missing"),
        (pd.Series(["a", "b", None], dtype="string"), "text 2 is (<NA>|nan).* It alone is missing"),
    ):
        with pytest.raises(TypeError, match=message):
            minilm(texts)
    expected = minilm(["a bank", "rivers"])
    for texts in (
        pd.Series(["a bank", "rivers"], index=[7, 3]),
        np.array(["a bank", "rivers"]),
        (text for text in ("a bank", "rivers")),
        [np.str_("a bank"), "rivers"],
    ):
        for one, other in zip(minilm(texts), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    words = minilm([("a", "bank"), ["rivers"]])
    np.testing.assert_allclose(words[0], expected[0], atol=1e-6)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        (dict(state="stateful"), ValueError, "state is 'stateful'; expected one of None, steady, zero, carry"),
        (dict(vector_dtype="bfloat16"), ValueError, "vector_dtype is 'bfloat16'; expected one of float32, float16"),
        (dict(dtype="half"), ValueError, "dtype is 'half'; expected one of None, float32, float16, bfloat16, int8"),
        (dict(dtype=torch.int16), ValueError, "dtype is 'int16'; expected one of None, float32"),
        (dict(dtype="float32"), ValueError, "dtype, split, options_file or weight_file is given with a Text"),
        (
            dict(model="m", dtype="float16", device="cpu"),
            ValueError,
            "'float16' on a CPU; expected 'float32', 'bfloat16' or 'int8' there. For vectors of float16 pass vector_d",
        ),
        (dict(batch_tokens=0), ValueError, "batch_tokens is 0"),
        (dict(batch_size=0), ValueError, "batch_size is 0"),
        (dict(impl="fastest"), ValueError, "impl is 'fastest'"),
        (dict(batch_size=7), ValueError, "batch_size is 7; expected it with state 'carry' alone"),
        (dict(state="carry", batch_tokens=7), ValueError, "batch_tokens is 7; expected batch_size with state 'carry'"),
        (
            dict(device="cpu"),
            ValueError,
            "device, dtype, split, options_file or weight_file is given with a TextEncoder",
        ),
        (
            dict(weight_file="w.hdf5"),
            ValueError,
            "device, dtype, split, options_file or weight_file is given with a TextEncoder",
        ),
        (dict(model=5), TypeError, "model is 5 (int); expected a folder or a name"),
        (dict(model=torch.nn.Linear(2, 2)), TypeError, "model is of type Linear; expected a folder or a name"),
        (dict(model="no-such-model-anywhere"), FileNotFoundError, "no-such-model-anywhere"),
        (dict(model=None), ValueError, "model is None"),
        (dict(model=None, options_file="o.json"), ValueError, "options_file is given without weight_file"),
        (dict(model="m", options_file="o.json", weight_file="w"), ValueError, "model is given beside options_file"),
        (dict(model="m", device="gpu"), ValueError, "device is 'gpu'"),
    ],
)
def test_wrong_embedders(options, kind, message):
    with pytest.raises(kind) as error:
        Embedder(**{"model": FakeEncoder(), **options})
    assert message in str(error.value) and str(error.value).startswith("ctxfast.")


@pytest.mark.parametrize(
    "texts, options, message",
    [
        (["a"], dict(pooling="max"), "pooling is 'max' at token level"),
        (["a"], dict(word_pieces="mean"), "word_pieces is 'mean'; expected it for a BERT model at token level"),
        ([["a"]], dict(word_pieces="mean", level="sentence"), "word_pieces is 'mean'; expected it for a BERT model at"),
    ],
)
def test_options_that_do_not_apply(minilm, texts, options, message):
    with pytest.raises(ValueError, match=f"^ctxfast.embed: {message}"):
        minilm(texts, **options)


@pytest.mark.parametrize("state", STATES)
def test_bert_has_no_state(minilm, minilm_dir, state):
    with pytest.raises(ValueError, match=f"state is '{state}'; expected an ELMo model for it, not bert"):
        Embedder(minilm_dir, state=state)


def test_ops_of_a_model_are_those_that_it_runs(minilm, shared_data, monkeypatch):
    """An implementation by name is judged by them."""
    elmo = Embedder(shared_data / "elmo" / "allennlp_tiny", device="cpu")
    prepared, ran = calls.prepared, set()
    monkeypatch.setattr(calls, "prepared", lambda spec, *rest: ran.add(spec.name) or prepared(spec, *rest))
    for embedder, by_layer in ((minilm, {"attention", "linear_act", "feed_forward", "add_layer_norm"}), (elmo, set())):
        ran.clear()
        embedder([["a", "bank"]], layers="all")
        assert ran | by_layer == set(embedder.encoder.ops)
        if by_layer:
            with ctxfast.use_impl(transformer_layers="reference"):
                embedder([["a", "bank"]], layers="all")
            assert ran == set(embedder.encoder.ops)


@pytest.mark.parametrize("impl, known", [("cuda", "cpu"), ("cuda_step", "cpu"), ("triton", "cpu")])
def test_an_implementation_that_would_change_nothing(minilm_dir, monkeypatch, impl, known):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError) as error:
        Embedder(minilm_dir, device="cpu", impl=impl)
    assert str(error.value) == (
        f"ctxfast.Embedder: impl is {impl!r}, but none of the ops of this model (embed_layer_norm, transformer_layers, "
        f"attention, linear_act, feed_forward, add_layer_norm) has an implementation {impl!r} for cpu; expected "
        f"reference, cpu, or None to choose."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: not on this device")
def test_cuda_without_a_gpu():
    with pytest.raises(RuntimeError, match="torch sees no GPU. Pass device='cpu'"):
        Embedder("m", device="cuda")


# Models told apart


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "is not a model.*It holds: nothing"),
        (["notes.txt"], "is not a model.*It holds: notes.txt"),
        (["options.json"], "is not a model"),
        (
            ["config.json", "options.json", "weights.hdf5"],
            "could be a BERT or an ELMo model.*config.json, options.json",
        ),
        (["options.json", "a.hdf5", "b.hdf5"], r"several HDF5 files \(a.hdf5, b.hdf5\)"),
    ],
)
def test_unclear_folders(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        open_encoder(tmp_path, torch.device("cpu"))


def test_elmo_files_are_found(elmo_dir, tmp_path):
    # The folder of the fixture holds five more HDF5 files.
    by_folder = Embedder(elmo_dir, device="cpu")
    assert [file.name for file in by_folder.encoder.files] == ["options.json", "lm_weights.hdf5"]
    shutil.copy(elmo_dir / "options.json", tmp_path / "small_options.json")
    shutil.copy(elmo_dir / "lm_weights.hdf5", tmp_path / "x.hdf5")
    by_other_names = Embedder(tmp_path, device="cpu")
    by_files = Embedder(options_file=elmo_dir / "options.json", weight_file=elmo_dir / "lm_weights.hdf5", device="cpu")
    for other in (by_other_names, by_files):
        np.testing.assert_array_equal(other(WORDS)[0], by_folder(WORDS)[0])


# BERT, real weights


def test_sentences_of_minilm(minilm, reference):
    """The model card's recipe, mean and normalise, as Hugging Face computes it."""
    texts, expected = reference
    vectors = np.stack(minilm(texts["texts"], level="sentence", normalize=True))
    np.testing.assert_allclose(vectors, expected["mean_pooled"][: len(vectors)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer, name", [(0, "embeddings"), (1, "hidden_1"), (-1, "last_hidden_state")])
def test_tokens_of_minilm(minilm, reference, layer, name):
    texts, expected = reference
    for row, result in enumerate(minilm(texts["texts"], layers=layer)):
        length = int(expected["attention_mask"][row].sum())
        assert result.shape == (length - 2, 384)
        np.testing.assert_allclose(result, expected[name][row, 1 : length - 1], atol=1e-4, rtol=0)


def test_cls_and_average_of_minilm(minilm, reference):
    texts, expected = reference
    first = minilm(texts["texts"], level="sentence", pooling="cls", normalize=False)
    np.testing.assert_allclose(np.stack(first), expected["last_hidden_state"][:8, 0], atol=1e-4, rtol=0)
    everything, average = minilm(texts["texts"], layers="all"), minilm(texts["texts"], layers="average")
    for layers, mean in zip(everything, average):
        assert layers.shape[0] == 7 == minilm.num_layers
        np.testing.assert_allclose(mean, layers.mean(0), atol=1e-5)


def test_results_do_not_depend_on_company(minilm, reference):
    texts = reference[0]["texts"]
    together = minilm(texts, layers="all")
    for text, result in zip(texts, together):
        np.testing.assert_allclose(minilm([text], layers="all")[0], result, atol=1e-5)


def test_word_pieces(minilm):
    words = ["unaffable", "\x07", "café", "hyperparameterization", "now"]
    pieces = minilm.tokens([words], word_pieces="all")[0]
    assert len(pieces) > 4 and minilm.tokens([words])[0] == words
    everything = minilm([words], word_pieces="all")[0]
    assert len(everything) == len(pieces)
    starts = [i for i, piece in enumerate(pieces) if not piece.startswith("##")]
    assert len(starts) == 4
    first, mean = minilm([words])[0], minilm([words], word_pieces="mean")[0]
    assert first.shape == mean.shape == (5, 384)
    np.testing.assert_array_equal(first[[0, 2, 3, 4]], everything[starts])
    for row, start, end in zip((0, 2, 3, 4), starts, [*starts[1:], len(pieces)]):
        np.testing.assert_allclose(mean[row], everything[start:end].mean(0), atol=1e-5)
    # A control character leaves no token.
    assert not first[1].any() and not mean[1].any()


def test_word_vectors_are_those_of_the_text(minilm):
    text = "the bank by the river"
    np.testing.assert_allclose(minilm([text.split()])[0], minilm([text])[0], atol=1e-5)
    assert minilm.tokens([text, ""]) == [text.split(), []]


def test_empty_text_of_bert(minilm):
    assert minilm([""], layers="all")[0].shape == (7, 0, 384) and minilm([[]])[0].shape == (0, 384)
    sentence = minilm([""], level="sentence", normalize=True)[0]
    assert abs(float(np.linalg.norm(sentence)) - 1) < 1e-5


def test_long_texts(minilm):
    text = "word " * 600
    with pytest.raises(ValueError, match=r"text 1 has 602 tokens, special ones included; expected at most 512"):
        minilm(["a", text])
    assert minilm(["a", text], truncate=True)[1].shape == (510, 384)
    words = ["word"] * 505 + ["hyperparameterization"] * 4
    first = minilm([words], truncate=True)[0]
    assert len(first) == len(minilm.tokens([words], truncate=True)[0]) == 507  # a word takes five pieces
    assert minilm([words], truncate=True, word_pieces="all")[0].shape[0] == 510


def test_impl_is_used(minilm_dir, reference, minilm):
    plain = Embedder(minilm_dir, device="cpu", impl="reference")
    for a, b in zip(plain(reference[0]["texts"]), minilm(reference[0]["texts"])):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_impl_holds_for_the_model_only():
    asked = []

    class Spy(FakeEncoder):
        def encode(self, batch, selection):
            asked.append(choice.requested())
            return super().encode(batch, selection)

    embedder = Embedder(Spy(), impl="reference", batch_tokens=8)
    for _ in embedder.encode(embedder.prepare(WORDS, embedder.select(), str, False), embedder.select()):
        assert choice.requested() == ()
    assert asked == [(("*", "reference"),)] * len(asked) and len(asked) > 2


def test_embedders_in_threads_have_their_own_impl():
    asked, together = {}, threading.Barrier(2)

    class Spy(FakeEncoder):
        def encode(self, batch, selection):
            together.wait(30)  # both are inside
            asked.setdefault(threading.get_ident(), set()).add(choice.requested())
            return super().encode(batch, selection)

    def run(impl):
        embedder = Embedder(Spy(), impl=impl, batch_tokens=8)
        list(embedder.encode(embedder.prepare(WORDS, embedder.select(), str, False), embedder.select()))
        return asked[threading.get_ident()]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, ("reference", None))) == [{(("*", "reference"),)}, {()}]


# ELMo, real files


def test_elmo_carries_as_allennlp_does(elmo_dir):
    """AllenNLP's own expected values: three rows of ten sentences whose states are carried on."""
    lanes = json.loads((elmo_dir / "sentences.json").read_text())
    embedder = Embedder(elmo_dir, device="cpu", state="carry", batch_size=3)
    results = embedder([lane[step].split() for step in range(10) for lane in lanes])
    for lane in range(3):
        with h5py.File(elmo_dir / f"lm_embeddings_{lane}.hdf5") as file:
            for step in range(10):
                expected = np.concatenate(list(file[str(step)][...]), axis=1)
                np.testing.assert_allclose(results[3 * step + lane], expected, atol=1e-6)


@pytest.mark.parametrize("state", ["steady", "zero"])
def test_elmo_alone_and_in_company(elmo_dir, state):
    lanes = json.loads((elmo_dir / "sentences.json").read_text())
    texts = [text.split() for text in lanes[0]] + [[]]
    embedder = Embedder(elmo_dir, device="cpu", state=state)
    together = embedder(texts, layers="all")
    assert together[-1].shape == (3, 0, 32)
    for text, result in zip(texts, together):
        np.testing.assert_allclose(embedder([text], layers="all")[0], result, atol=1e-6)
    plain = ctxfast.ElmoEmbedder(elmo_dir / "options.json", elmo_dir / "lm_weights.hdf5", state=state)
    for ours, other in zip(together, plain.embed_batch(texts)):
        np.testing.assert_allclose(ours, other, atol=1e-6)
    means = embedder(texts, level="sentence")
    np.testing.assert_allclose(means[0], together[0][-1].mean(0), atol=1e-6)
    assert not means[-1].any()


def test_elmo_states_differ(elmo_dir):
    steady, zero = (Embedder(elmo_dir, device="cpu", state=state)(WORDS)[0] for state in ("steady", "zero"))
    assert np.abs(steady - zero).max() > 1e-4

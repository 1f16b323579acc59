# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts as a folder's sentence-transformers files say: those of ``SentenceTransformer(folder).encode``."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxfast.cli import main
from ctxfast.embedding.embedder import Embedder
from ctxfast.embedding.selection import select
from ctxfast.models.bert.sentence_modules import POOLINGS

transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers, the peer")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.modules import Dense, Normalize, Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import CNN, Dropout, LayerNorm, Pooling  # noqa: E402

WORDS = "the bank of a river lends money to people who do not need it".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "passage", ":", ".", "##s", "The", *WORDS]
SIZE = 16
TEXTS = ["the bank of a river", "", "The BANK lends money to people who do not need it.", "money " * 40, "a"]
LONG = 3


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT of random weights, whose tokenizer keeps case."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(5)
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, initializer_range=0.5, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 60}')
    return folder


def _dense(out: int = 6, size: int = SIZE, **options) -> Dense:
    return Dense(size, out, **options)


def _pooling(*modes: str, **options) -> Pooling:
    return Pooling(SIZE, pooling_mode=modes, **options)


# Name: modules after the encoder, options of the Transformer, of the SentenceTransformer, settings written by hand.
FOLDERS = {
    **{mode: ([_pooling(mode)], {}, {}, {}) for mode in POOLINGS},
    "several": ([_pooling("lasttoken", "cls", "max", "mean")], {}, {}, {}),
    "normalize": ([_pooling("mean"), Normalize()], {}, {}, {}),
    "dense": ([_pooling("mean"), _dense()], {}, {}, {}),
    "dense of several, then normalize": ([_pooling("cls", "max"), _dense(40, 2 * SIZE), Normalize()], {}, {}, {}),
    "normalize, then dense": ([_pooling("mean"), Normalize(), _dense()], {}, {}, {}),
    "dense without bias, plain": (
        [_pooling("cls"), _dense(bias=False, activation_function=torch.nn.Identity())],
        {},
        {},
        {},
    ),
    "dense with GELU and residual": (
        [_pooling("cls"), _dense(activation_function=torch.nn.GELU(), use_residual=True)],
        {},
        {},
        {},
    ),
    "dense as large, residual": ([_pooling("mean"), _dense(SIZE, use_residual=True)], {}, {}, {}),
    "two denses and a learned activation": (
        [_pooling("mean"), _dense(8, activation_function=torch.nn.PReLU()), _dense(5, 8), Normalize()],
        {},
        {},
        {},
    ),
    "layer norm and dropout": ([_pooling("mean"), LayerNorm(SIZE), Dropout(0.5)], {}, {}, {}),
    "short": ([_pooling("mean")], {"max_seq_length": 7}, {}, {}),
    "longer than the tokenizer says": ([_pooling("mean")], {"max_seq_length": 62}, {}, {}),
    "a default prompt": (
        [_pooling("mean")],
        {},
        {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"},
        {},
    ),
    "a prompt that is not pooled": (
        [_pooling("weightedmean", "mean", "cls", "max", "lasttoken", include_prompt=False)],
        {},
        {"prompts": {"query": "query: the "}, "default_prompt_name": "query"},
        {},
    ),
    "cut vectors": ([_pooling("mean"), Normalize()], {}, {"truncate_dim": 5}, {"truncate_dim": 5}),
}


def _save(plain: Path, folder: Path, name: str) -> Path:
    modules, encoder, options, config = FOLDERS[name]
    torch.manual_seed(1)
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    model = SentenceTransformer(modules=[Transformer(str(plain), **encoder), *modules], device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    if config:
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def _same(folder: Path, embedder: Embedder | None = None, texts=TEXTS, theirs=None, **call) -> None:
    embedder = embedder or Embedder(folder, device="cpu")
    theirs = theirs or SentenceTransformer(str(folder), device="cpu")
    asked = {name: value for name, value in call.items() if name in ("prompt", "prompt_name")}
    expected = theirs.encode(texts, normalize_embeddings=bool(call.get("normalize")), **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = np.stack(embedder(texts, level="sentence", truncate=True, **call))
    assert got.shape == expected.shape and got.shape[1] == embedder.sentence_dim
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FOLDERS)
def test_same_as_encode(plain: Path, tmp_path: Path, name: str) -> None:
    folder = _save(plain, tmp_path / "model", name)
    embedder = Embedder(folder, device="cpu")
    theirs = SentenceTransformer(str(folder), device="cpu")
    _same(folder, embedder, theirs=theirs)
    _same(folder, embedder, theirs=theirs, normalize=True)
    # The folder's limit on length, not the positions of the model.
    limit = min(theirs.max_seq_length, 64)
    with pytest.raises(ValueError, match=rf"text {LONG} has \d+ tokens, .*; expected at most {limit}, "):
        Embedder(folder, device="cpu")(["money"] * LONG + ["money " * limit], level="sentence")
    # One text after another gives the same vector.
    alone = [embedder([text], level="sentence", truncate=True)[0] for text in TEXTS]
    np.testing.assert_allclose(alone, embedder(TEXTS, level="sentence", truncate=True), atol=1e-6)
    # Vectors of tokens know nothing of it, but for what the library writes into the tokenizer's own files.
    if not FOLDERS[name][1]:
        for one, other in zip(embedder(TEXTS), Embedder(plain, device="cpu")(TEXTS)):
            np.testing.assert_array_equal(one, other)


def test_prompts(plain: Path, tmp_path: Path) -> None:
    embedder = Embedder(_save(plain, tmp_path / "model", "a default prompt"), device="cpu")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert embedder.prompts == {"query": "query: ", "document": "", "passage": "passage: "}
    for call in ({"prompt": "passage: "}, {"prompt_name": "passage"}, {"prompt": ""}, {"prompt_name": "document"}):
        _same(tmp_path / "model", embedder, theirs=theirs, **call)
    documents = embedder(TEXTS, level="sentence", truncate=True, prompt_name="document")
    np.testing.assert_allclose(documents, theirs.encode_document(TEXTS), atol=1e-5)
    assert np.abs(np.stack(documents) - theirs.encode_query(TEXTS)).max() > 1e-2
    for call, error, message in (
        ({"prompt_name": "no"}, ValueError, "prompt_name is 'no'; expected one that the model has: 'query', "),
        ({"prompt": "a", "prompt_name": "query"}, ValueError, "prompt is given beside prompt_name 'query'"),
        ({"prompt": 3}, TypeError, "prompt is 3; expected a string"),
        ({"level": "token", "prompt": "a"}, ValueError, "a prompt is given at token level"),
        ({"texts": [["a", "bank"]]}, ValueError, "the prompt is 'query: ' and texts are lists of words"),
    ):
        with pytest.raises(error, match=message):
            embedder(**{"texts": TEXTS, "level": "sentence", **call})
    assert embedder([["a", "bank"]], level="sentence", prompt="")[0].shape == (SIZE,)


def _write_old(folder: Path, plain: Path, sub: str = "0_Transformer") -> Path:
    """The layout of sentence-transformers before version 2, by hand."""
    shutil.copytree(plain, folder / sub)
    prefix = "sentence_transformers.models"
    modules = [("Transformer", sub), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    entries = [{"idx": i, "name": str(i), "path": p, "type": f"{prefix}.{k}"} for i, (k, p) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    for _, name in modules[1:]:
        (folder / name).mkdir()
    pooling = {f"pooling_mode_{mode}": mode == "cls_token" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": SIZE, **pooling}))
    dense = {"in_features": SIZE, "out_features": 4, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    torch.manual_seed(3)
    weights = {"linear.weight": torch.randn(4, SIZE), "linear.bias": torch.randn(4)}
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    (folder / sub / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
    return folder


@pytest.mark.parametrize("sub", ["0_Transformer", "encoder"])
def test_old_folders(plain: Path, tmp_path: Path, sub: str) -> None:
    folder = _write_old(tmp_path, plain, sub)
    _same(folder)
    names = {str(file.relative_to(folder)) for file in Embedder(folder, device="cpu").encoder.files}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/pytorch_model.bin", f"{sub}/config.json"} <= names
    # A setting of the library that it saves no more.
    before = Embedder(folder, device="cpu")(["MONEY a Bank"], level="sentence")
    (folder / sub / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": true}')
    _same(folder, texts=["MONEY a Bank"])
    assert np.abs(before[0] - Embedder(folder, device="cpu")(["MONEY a Bank"], level="sentence")[0]).max() > 1e-2
    # The encoder's own folder, named by itself, is a plain model.
    inner = Embedder(folder / sub, device="cpu")
    assert inner.sentence_dim == SIZE and inner.prompts == {}


# Activations that a Dense may name, all that torch has, and what else of torch.nn takes no arguments and a tensor.
ACTIVATIONS = [
    *torch.nn.modules.activation.__all__,
    "Flatten",
    "Softmax2d",
    "Identity",
    "Dropout",
    "Upsample",
    "L1Loss",
]


def _called(name: str) -> str:
    kind = getattr(torch.nn, name)
    return f"{kind.__module__}.{kind.__name__}"


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")  # of the peer
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(plain: Path, tmp_path: Path, name: str) -> None:
    """Vectors are those of the peer, of every layer and whatever else is in the batch; where it has none, neither."""
    folder = _write_old(tmp_path, plain)
    _edit(folder / "2_Dense/config.json", activation_function=_called(name))
    if name == "PReLU":
        weights = torch.load(folder / "2_Dense/pytorch_model.bin")
        torch.save({**weights, "activation_function.weight": torch.rand(1)}, folder / "2_Dense/pytorch_model.bin")
    embedder = Embedder(folder, device="cpu")
    try:
        SentenceTransformer(str(folder), device="cpu").encode(["a"])
    except Exception:
        with pytest.raises(ValueError, match=r"^ctxfast\.Embedder: .*2_Dense"):
            embedder(["a"], level="sentence")
        return
    _same(folder, embedder)
    found = np.stack(embedder(TEXTS[:2], level="sentence", layers="all"))
    np.testing.assert_allclose(found[:, -1], embedder(TEXTS[:2], level="sentence"), atol=1e-6)
    np.testing.assert_allclose(found[1], embedder(TEXTS[1:2], level="sentence", layers="all")[0], atol=1e-6)


def test_a_plain_folder_has_the_mean(plain: Path) -> None:
    _same(plain)


def test_minilm(minilm_dir: Path) -> None:
    texts = ["A bank by the river.", "The bank lent money to a fisherman. " * 60, "café 深度学习"]
    _same(minilm_dir, texts=texts)
    embedder = Embedder(minilm_dir, device="cpu")
    with pytest.raises(ValueError, match="expected at most 256"):
        embedder(texts, level="sentence")
    raw = np.stack(embedder(texts[::2], level="sentence", normalize=False))
    assert np.linalg.norm(raw, axis=1).min() > 2
    np.testing.assert_allclose(raw, embedder(texts[::2], level="sentence", pooling="mean", normalize=False))


def test_a_given_pooling_goes_before_the_folder(plain: Path, tmp_path: Path) -> None:
    folder = _save(plain, tmp_path / "model", "dense of several, then normalize")
    embedder = Embedder(folder, device="cpu")
    assert (embedder.dim, embedder.sentence_dim) == (SIZE, 40)
    with pytest.warns(UserWarning, match="pooling is 'max', .* Left out of the model's folder: Dense"):
        got = embedder(TEXTS[:2], level="sentence", pooling="max", normalize=False)
    tokens = SentenceTransformer(str(plain), device="cpu").encode(TEXTS[:2], output_value="token_embeddings")
    np.testing.assert_allclose(got, np.stack([rows.max(0).values for rows in tokens]), atol=1e-5)
    # The Normalize at the end holds until it is switched off.
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        unit = np.stack(embedder(TEXTS, level="sentence", pooling="max", truncate=True))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)


def test_layers(plain: Path, tmp_path: Path) -> None:
    """Every layer that is asked for goes through the folder's modules; an average is one layer."""
    embedder = Embedder(_save(plain, tmp_path / "model", "dense"), device="cpu")
    found = np.stack(embedder(TEXTS[:2], level="sentence", layers="all"))
    assert found.shape == (2, 3, 6)
    np.testing.assert_allclose(found[:, -1], embedder(TEXTS[:2], level="sentence"), atol=1e-6)
    layers = embedder(TEXTS[:2], layers="average")
    with pytest.warns(UserWarning):
        average = embedder(TEXTS[:1], level="sentence", layers="average", pooling="lasttoken")[0]
        most = embedder(TEXTS[:1], level="sentence", layers="average", pooling="max")[0]
    assert average.shape == layers[0].shape[1:] and (most >= layers[0].max(0) - 1e-5).all()


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _module(file: Path, position: int, **changes) -> None:
    entries = json.loads(file.read_text())
    entries[position].update(changes)
    file.write_text(json.dumps(entries))


def _drop(path: Path, position: int) -> None:
    entries = json.loads(path.read_text())
    del entries[position]
    path.write_text(json.dumps(entries))


REFUSED = {
    "remote code": (lambda f: _module(f / "modules.json", 1, type="pooling.Mine"), "has a module 'pooling.Mine'"),
    "another library's": (
        lambda f: _module(f / "modules.json", 1, type="sentence_transformers.models.WeightedLayerPooling"),
        "has a module 'sentence_transformers.models.WeightedLayerPooling'",
    ),
    "a namesake": (lambda f: _module(f / "modules.json", 1, type="mine.Pooling"), "has a module 'mine.Pooling'"),
    "a router": (
        lambda f: _module(f / "modules.json", 2, type="sentence_transformers.models.Router"),
        "has a module 'sentence_transformers.models.Router'",
    ),
    "no pooling": (lambda f: _drop(f / "modules.json", 1), "has the modules Transformer, Dense, Normalize; expected"),
    "a way out of the folder": (lambda f: _module(f / "modules.json", 1, path="../x"), "names the path '../x'"),
    "unknown pooling": (
        lambda f: _edit(f / "1_Pooling/config.json", pooling_mode="median"),
        "pooling_mode in .*1_Pooling/config.json is .*median",
    ),
    "an unknown key of pooling": (
        lambda f: _edit(f / "1_Pooling/config.json", pooling_mode_median_tokens=True),
        "1_Pooling/config.json sets pooling_mode_median_tokens",
    ),
    "damaged pooling": (lambda f: (f / "1_Pooling/config.json").write_text("{"), "1_Pooling/config.json is damaged"),
    "an activation of another package": (
        lambda f: _edit(f / "2_Dense/config.json", activation_function="mine.activations.Swish"),
        "activation_function in .* is 'mine.activations.Swish'",
    ),
    "a function of torch": (
        lambda f: _edit(f / "2_Dense/config.json", activation_function="torch.load"),
        "activation_function in .* is 'torch.load'",
    ),
    "a wrong size": (lambda f: _edit(f / "2_Dense/config.json", in_features=3), "in_features in .* is 3; expected 16"),
    "a huge size": (lambda f: _edit(f / "2_Dense/config.json", out_features=10**9), "2_Dense/.*does not fit"),
    "an unknown key of a dense": (
        lambda f: _edit(f / "2_Dense/config.json", scale=2.0),
        "2_Dense/config.json sets scale, which is not followed",
    ),
    "an unknown setting of the encoder": (
        lambda f: _edit(f / "0_Transformer/sentence_bert_config.json", pad_left=True),
        "sentence_bert_config.json sets pad_left, which",
    ),
    "dense of tokens": (
        lambda f: _edit(f / "2_Dense/config.json", module_input_name="token_embeddings"),
        "module_input_name in .* is 'token_embeddings'",
    ),
    "damaged weights": (lambda f: (f / "2_Dense/pytorch_model.bin").write_bytes(b"x" * 99), "pytorch_model.bin is dam"),
    "no weights": (lambda f: (f / "2_Dense/pytorch_model.bin").unlink(), "2_Dense has neither model.safetensors"),
    "other settings of the processor": (
        lambda f: _edit(f / "0_Transformer/sentence_bert_config.json", processing_kwargs={"text": {"max_length": 5}}),
        "sentence_bert_config.json sets processing_kwargs, which",
    ),
    "another kind of model": (
        lambda f: (f / "config_sentence_transformers.json").write_text('{"model_type": "SparseEncoder"}'),
        "is of a SparseEncoder; expected a SentenceTransformer",
    ),
    "no modules.json": (
        lambda f: ((f / "modules.json").unlink(), shutil.copytree(f / "0_Transformer", f, dirs_exist_ok=True)),
        "holds 1_Pooling, 2_Dense, but no modules.json",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(plain: Path, tmp_path: Path, name: str) -> None:
    folder = _write_old(tmp_path, plain)
    change, message = REFUSED[name]
    change(folder)
    if name == "a way out of the folder":
        with pytest.raises(ValueError, match=message):
            Embedder(folder, device="cpu")
        return
    embedder = Embedder(folder, device="cpu")
    with pytest.raises(ValueError, match=rf"^ctxfast\.Embedder: .*{message}"):
        embedder(["a"], level="sentence")
    # The way out, which says what it leaves out; vectors of tokens are not concerned.
    with pytest.warns(UserWarning, match="Left out of the model's folder"):
        assert embedder(["a"], level="sentence", pooling="mean")[0].shape == (SIZE,)
    assert embedder(["a bank"])[0].shape == (2, SIZE)


def test_prompts_hold_beside_what_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = _write_old(tmp_path, plain)
    _module(folder / "modules.json", 2, type="mine.Dense")
    config = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="Left out"):
        got = Embedder(folder, device="cpu")(["a bank"], level="sentence", pooling="mean")
    expected = Embedder(plain, device="cpu")(["query: a bank"], level="sentence")
    np.testing.assert_array_equal(got, expected)


def test_modules_saved_by_the_library_are_refused(plain: Path, tmp_path: Path) -> None:
    convolution = CNN(in_word_embedding_dimension=SIZE, out_channels=4)
    pooling = Pooling(convolution.get_embedding_dimension())
    model = SentenceTransformer(modules=[Transformer(str(plain)), convolution, pooling], device="cpu")
    model.save(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(ValueError, match=r"has a module 'sentence_transformers\..*\.CNN'; expected Transformer, Pool"):
        Embedder(tmp_path / "model", device="cpu")(["a"], level="sentence")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("adapter_config.json", {"base_model_name_or_path": "x"}, "an adapter of another model"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "has a quantization_config"),
        ("config.json", {"auto_map": {"AutoModel": "modeling.Mine"}}, "names code of its own for the model, 'modeling"),
    ],
)
def test_what_makes_another_model_is_refused(plain: Path, tmp_path: Path, name, value, message) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / name).write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **value}))
    with pytest.raises(ValueError, match=rf"^ctxfast\.Embedder: .*{name} .*{message}"):
        Embedder(folder, device="cpu")


def test_file_jobs_hold_to_the_configuration(plain: Path, tmp_path: Path, monkeypatch) -> None:
    """Pooling, weights of a Dense and prompts are part of what unfinished work belongs to."""
    from safetensors.numpy import load_file

    from ctxfast.embedding import job

    folder = _write_old(tmp_path / "model", plain)
    source, output = tmp_path / "in.txt", tmp_path / "out.safetensors"
    source.write_text("".join(f"{text}\n" for text in ("the bank", "a river", "money", "people")))
    whole = job._Job._embed

    def stops(job, *args):
        if job.shards:
            raise KeyboardInterrupt
        return whole(job, *args)

    def run(**options):
        return Embedder(folder, device="cpu").embed_file(source, output, level="sentence", window=2, **options)

    monkeypatch.setattr(job._Job, "_embed", stops)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(job._Job, "_embed", whole)
    for options, named in (
        ({"pooling": "mean"}, r"options\.(dim|pooling|has_steps) was"),
        ({"normalize": False}, "options.normalize was True"),
        ({"prompt": "query: "}, "options.prompt was ''"),
    ):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=f"unfinished work of another job: .*{named}"):
            warnings.simplefilter("ignore")
            run(**options)
    weights = folder / "2_Dense" / "pytorch_model.bin"
    kept = weights.read_bytes()
    torch.save({"linear.weight": torch.zeros(4, SIZE), "linear.bias": torch.zeros(4)}, weights)
    with pytest.raises(ValueError, match="another job: model.2_Dense/pytorch_model.bin was"):
        run()
    weights.write_bytes(kept)
    run()
    found = load_file(output)["embeddings"].reshape(4, 4)
    expected = SentenceTransformer(str(folder), device="cpu").encode(source.read_text().splitlines())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_command_line(plain: Path, tmp_path: Path, capsys) -> None:
    from safetensors.numpy import load_file

    folder = _save(plain, tmp_path / "model", "a default prompt")
    (tmp_path / "in.txt").write_text("the bank\na river\n")
    theirs = SentenceTransformer(str(folder), device="cpu")
    for number, (options, call) in enumerate(
        (
            ([], {}),
            (["--prompt-name", "passage", "--normalize"], {"prompt_name": "passage", "normalize_embeddings": True}),
            (["--prompt", "", "--no-normalize"], {"prompt": ""}),
        )
    ):
        output = tmp_path / f"{number}.safetensors"
        command = ["embed", str(tmp_path / "in.txt"), "-m", str(folder), "-o", str(output), "--level", "sentence"]
        assert main([*command, "--quiet", *options]) == 0
        found = load_file(output)["embeddings"].reshape(2, SIZE)
        np.testing.assert_allclose(found, theirs.encode(["the bank", "a river"], **call), atol=1e-5)
    assert main([*command[:-1], "token", "--prompt", "a", "--overwrite"]) == 2
    assert "a prompt is given at token level" in capsys.readouterr().err


def test_elmo_knows_the_mean_alone() -> None:
    from ctxfast.models.bert.sentence_modules import SentenceModel

    chosen = select("elmo", 3, SentenceModel(5), 5, level="sentence")
    assert (chosen.pooling, chosen.normalize, chosen.prompt, chosen.dim) == (("mean",), False, "", 5)
    with pytest.raises(ValueError, match="the prompt is 'a' and texts are lists of words"):
        select("elmo", 3, SentenceModel(5), 5, level="sentence", prompt="a")

# SPDX-License-Identifier: Apache-2.0
"""``ctxfast convert``: every format in, the same model out."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ctxfast
from ctxfast import cli
from ctxfast.models.elmo.config import ElmoConfig
from ctxfast.models.elmo.weights import load_weights, random_weights, save_weights

SENTENCES = [["I", "sat", "by", "the", "bank"], ["Another", "one"]]


def convert(*words: object) -> int:
    return cli.main(["convert", *map(str, words)])


@pytest.fixture
def elmo(tmp_path):
    config = ElmoConfig(6, 10, 2, ((1, 3), (2, 4)), 4, num_highways=1, cell_clip=3.0, proj_clip=3.0)
    folder = tmp_path / "elmo"
    folder.mkdir()
    save_weights(random_weights(config), config, folder / "options.json", folder / "elmo_weights.hdf5")
    return folder


def test_google_checkpoint(tmp_path, capsys) -> None:
    from models.test_bert_tf_checkpoint import write_google_folder
    from oracles.hf_bert import hf_model

    model = hf_model("BertForPreTraining")
    write_google_folder(tmp_path / "google", model)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "bank", "##s"]
    (tmp_path / "google" / "vocab.txt").write_text("\n".join(words) + "\n")
    assert convert(tmp_path / "google" / "bert_model.ckpt", tmp_path / "out") == 0
    assert "bert, " in capsys.readouterr().err
    one, other = (ctxfast.Bert.from_pretrained(tmp_path / name) for name in ("google", "out"))
    ids = torch.arange(1, 8)[None]
    assert torch.equal(one(ids).last_hidden_state, other(ids).last_hidden_state)
    tokenizer = ctxfast.BertTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.batch(["the banks"])["input_ids"].tolist() == [[2, 5, 6, 7, 3]]


def test_a_fine_tuned_model_stays_one(tmp_path) -> None:
    from support.tiny_models import tiny_bert

    from ctxfast.training.tasks.build import build, load

    build("tag", tiny_bert(tmp_path / "bert", layers=1), ("O", "B-x", "I-x")).save(tmp_path / "tagger")
    assert convert(tmp_path / "tagger", tmp_path / "half", "--dtype", "float16") == 0
    assert load(tmp_path / "half").labels == ("O", "B-x", "I-x")
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < (
        0.6 * (tmp_path / "tagger" / "model.safetensors").stat().st_size
    )


def test_half_precision_and_no_tokenizer(tmp_path, capsys) -> None:
    ctxfast.Bert(ctxfast.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "one"
    )
    assert convert(tmp_path / "one", tmp_path / "two", "--dtype", "bfloat16") == 0
    assert "no tokenizer found" in capsys.readouterr().err
    assert ctxfast.Bert.from_pretrained(tmp_path / "two").dtype == torch.bfloat16


def test_elmo_state_dict_and_back(elmo, tmp_path, capsys) -> None:
    model = ctxfast.Elmo(elmo / "options.json", elmo / "elmo_weights.hdf5", 1, dropout=0.0).eval()
    whole = {f"text_field_embedder.{name}": value for name, value in model.state_dict().items()}
    torch.save({**whole, "tagger.weight": torch.zeros(2)}, tmp_path / "weights.th")
    words = [tmp_path / "weights.th", tmp_path / "out", "--options-file", elmo / "options.json"]
    with pytest.warns(UserWarning, match=r"5 tensors .* left out: tagger\.weight, .*scalar_mix_0\.gamma"):
        assert convert(*words) == 0
    assert "5 tensors beside the language model are left out" in capsys.readouterr().err
    back = ctxfast.Elmo(tmp_path / "out" / "options.json", tmp_path / "out" / "weights.hdf5", 1, dropout=0.0).eval()
    ids = ctxfast.batch_to_ids(SENTENCES)
    found = [each(ids)["elmo_representations"][0] for each in (model, back)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert convert(elmo, tmp_path / "again") == 0
    for name, value in load_weights(elmo / "elmo_weights.hdf5", ElmoConfig.from_file(elmo / "options.json"))[1].items():
        again = load_weights(tmp_path / "again" / "weights.hdf5", ElmoConfig.from_file(elmo / "options.json"))[1]
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-7)


def test_elmo_in_half_precision_keeps_its_steady_state(elmo, tmp_path, capsys, monkeypatch) -> None:
    made = ctxfast.Elmo(elmo / "options.json", elmo / "elmo_weights.hdf5", state="steady")
    made.calibrate()
    made.save_steady_state(elmo / "steady_state.safetensors")
    (elmo / "vocabulary.txt").write_text("<S>\n")
    box = tmp_path / "box"
    assert convert(elmo, box / "tiny-elmo", "--dtype", "float16") == 0
    assert "its steady state; not copied: vocabulary.txt" in capsys.readouterr().err
    assert sorted(file.name for file in (box / "tiny-elmo").iterdir()) == [
        "options.json",
        "steady_state.safetensors",
        "weights.safetensors",
    ]
    # As a model of the package, by its name; and back into AllenNLP's files.
    monkeypatch.setattr("ctxfast.models.packaged._FOLDER", box)
    assert convert("tiny-elmo", tmp_path / "back") == 0
    for folder in ("tiny-elmo", tmp_path / "back"):
        model = ctxfast.Elmo.from_pretrained(folder, state="steady", dropout=0.0)
        for found, expected in zip(model.steady_state, made.steady_state):
            assert torch.equal(found, expected)
    by_name, by_class = ctxfast.Embedder("tiny-elmo"), ctxfast.ElmoEmbedder.from_pretrained("tiny-elmo", state="steady")
    found = by_name(SENTENCES[:1], layers="all")[0]
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(by_class.embed_sentence(SENTENCES[0])))
    with pytest.raises(FileNotFoundError, match=r"models of ctxfast \(tiny-elmo\)"):
        ctxfast.Embedder("tiny-elmo2")


def test_real_models(shared_data, minilm_dir, tmp_path, capsys) -> None:
    assert convert(shared_data / "elmo" / "allennlp_tiny", tmp_path / "elmo") == 0
    assert convert(shared_data / "bert" / "xsmall_dummy", tmp_path / "dummy") == 0
    capsys.readouterr()
    assert convert(minilm_dir, tmp_path / "minilm", "--dtype", "float16") == 0
    assert ("not copied: modules.json" in capsys.readouterr().err) == (minilm_dir / "modules.json").exists()
    text = ["The bank of the river."]
    one, other = (ctxfast.Embedder(path)(text, level="sentence") for path in (minilm_dir, tmp_path / "minilm"))
    assert torch.cosine_similarity(torch.as_tensor(one[0])[None], torch.as_tensor(other[0])[None]).item() > 0.9999


def test_what_a_bert_folder_says_besides_is_named(tmp_path, capsys) -> None:
    ctxfast.Bert(ctxfast.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "one"
    )
    file = tmp_path / "one" / "model.safetensors"
    save_file({**{k: v.clone() for k, v in load_file(file).items()}, "my_head.weight": torch.ones(2)}, file)
    (tmp_path / "one" / "modules.json").write_text("[]")
    (tmp_path / "one" / "1_Pooling").mkdir()
    with pytest.warns(UserWarning, match=r"not used: my_head\.weight"):
        assert convert(tmp_path / "one", tmp_path / "two") == 0
    said = capsys.readouterr().err
    assert "left out: my_head.weight" in said and "not copied: modules.json, 1_Pooling" in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, 2], "holds a list; expected a dict"),
        ({3: torch.zeros(1)}, "has the key '3'; expected names"),
        ({"a": torch.zeros(1)}, "has none of _token_embedder"),
        ("int", "has dtype torch.int64; expected floating point"),
        ("expanded", "would become"),
    ],
)
def test_state_dicts_that_are_none(elmo, tmp_path, capsys, value, said) -> None:
    options = elmo / "options.json"
    config = ElmoConfig.from_file(options)
    if value == "int":
        value = {name: each.long() for name, each in random_weights(config).items()}
    elif value == "expanded":  # one number that says it is a matrix of 8 GB
        value = {**random_weights(config), "tagger.weight": torch.zeros(1).expand(10**9, 2)}
    torch.save(value, tmp_path / "w.th")
    assert convert(tmp_path / "w.th", tmp_path / "new", "--options-file", options) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctxfast.") and said in error and "w.th" in error


def test_errors_leave_nothing(elmo, tmp_path, capsys) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "bad.th").write_bytes(b"no state dict")
    shutil.copy(elmo / "elmo_weights.hdf5", elmo / "other_weights.hdf5")
    bad = ["--options-file", elmo / "options.json"]
    there = ["--options-file", tmp_path / "there" / "options.json"]
    (elmo / "part").mkdir()
    (tmp_path / "x.json").write_text("{}")
    ctxfast.Bert(ctxfast.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "bert"
    )
    for words, message in (
        (["nowhere", tmp_path / "new"], "is not a model on this machine"),
        ([elmo, tmp_path / "there"], "exists. Pass --overwrite"),
        ([elmo, elmo, "--overwrite"], "DST .* is SRC .*; expected another place"),
        ([elmo, elmo.parent, "--overwrite"], "DST .* holds SRC .*elmo; expected another place"),
        ([elmo / "elmo_weights.hdf5", elmo, "--overwrite"], "holds SRC .*elmo_weights.hdf5; expected"),
        (
            [elmo / "elmo_weights.hdf5", tmp_path / "there", *there, "--overwrite"],
            "holds --options-file .*options.json",
        ),
        ([elmo, elmo / "part", "--overwrite"], "DST .*part is a part of SRC"),
        ([elmo, tmp_path / "new"], r"elmo_weights.hdf5, other_weights.hdf5\); expected one"),
        ([elmo / "elmo_weights.hdf5", tmp_path / "new", "--gelu", "erf"], "--gelu is given for an ELMo model"),
        ([tmp_path / "bad.th", tmp_path / "new", *bad], "bad.th is damaged, cut short or no PyTorch weight file"),
        ([tmp_path / "gone.th", tmp_path / "new", *bad], "does not exist"),
        ([tmp_path / "x.json", tmp_path / "new"], "SRC .*x.json is a file and no model's; expected a model's folder"),
        ([elmo, tmp_path / "new", "--options-file", "no.json"], "--options-file no.json does not exist; expected opt"),
        ([tmp_path / "bert", tmp_path / "new", *bad], "--options-file is given, but SRC .*bert is not an ELMo model"),
        ([tmp_path / "bad.th", tmp_path / "new"], "there is no .*options.json"),
        ([elmo, tmp_path / "new", "--dtype", "int4"], "dtype is 'int4'"),
    ):
        assert convert(*words) == 2
        said = capsys.readouterr().err
        assert re.search(message, said), said
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))

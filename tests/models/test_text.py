from __future__ import annotations

import json
import shutil
import socket
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from lfdm_export.errors import BundleError, InputError, MissingDependencyError
from lfdm_export.generate.tokenizer import tokenize
from lfdm_export.stages import stage_specs
from lfdm_models import text_files
from lfdm_models.text import BertTextEncoder, TextEncoderError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "draw", "circle", "jog", "##ging", "anger", "x", "a"]
WIDTH, MAX_TOKENS = 24, 16


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with a vocabulary of its own, saved as transformers saves one."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_TOKENS,
    )
    BertModel(config).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, do_lower_case=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> BertTextEncoder:
    return BertTextEncoder.load(encoder_folder)


def test_loading_prints_nothing(encoder_folder: Path, capsys: pytest.CaptureFixture[str]):
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    BertTextEncoder.load(encoder_folder)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert logging.is_progress_bar_enabled() == enabled


def test_tokens_have_special_tokens_and_padding(encoder: BertTextEncoder):
    ids, mask = encoder.tokenize(["jogging", "draw a circle"])
    cls, sep, pad = (WORDS.index(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    assert ids.tolist() == [[cls, 7, 8, sep, pad], [cls, 5, 11, 6, sep]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_embedding_is_the_mean_without_first_token_and_padding(encoder: BertTextEncoder):
    ids, mask = encoder.tokenize(["jogging", "draw a circle"])
    with torch.no_grad():
        found = encoder(ids, mask)
        short = encoder.bert(input_ids=ids[:1, :4], attention_mask=mask[:1, :4]).last_hidden_state
        long = encoder.bert(input_ids=ids[1:], attention_mask=mask[1:]).last_hidden_state
    assert found.shape == (2, WIDTH)
    torch.testing.assert_close(found[0], short[0, 1:].sum(0) / 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], long[0, 1:].sum(0) / 4, rtol=0, atol=1e-5)
    assert (found[0] - short[0].mean(0)).abs().max() > 1e-3, "the test could not tell [CLS] apart"


def test_embedding_does_not_depend_on_company(encoder: BertTextEncoder):
    together = encoder.embed(["anger", "draw a circle", "jogging"])
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together[:1], encoder.embed(["anger"]))
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_saved_tokenizer_gives_the_same_tokens(encoder: BertTextEncoder, tmp_path: Path):
    encoder.save_tokenizer(tmp_path / "tokenizer")
    texts = ["jogging", "draw a circle", "anger x unknownword"]
    ids, mask = tokenize(tmp_path / "tokenizer", texts)
    expected_ids, expected_mask = encoder.tokenize(texts)
    np.testing.assert_array_equal(ids, expected_ids.numpy())
    np.testing.assert_array_equal(mask, expected_mask.numpy())
    assert ids.dtype == mask.dtype == np.int64


def test_text_at_and_over_the_limit(encoder: BertTextEncoder, tmp_path: Path):
    encoder.save_tokenizer(tmp_path)
    fits, too_long = " ".join(["x"] * (MAX_TOKENS - 2)), " ".join(["x"] * (MAX_TOKENS - 1))
    assert encoder.embed([fits]).shape == (1, WIDTH)
    assert tokenize(tmp_path, [fits])[0].shape == (1, MAX_TOKENS)
    with pytest.raises(TextEncoderError, match=f"{MAX_TOKENS + 1} tokens, expected at most {MAX_TOKENS}"):
        encoder.embed([too_long])
    with pytest.raises(InputError, match=f"more than {MAX_TOKENS} tokens"):
        tokenize(tmp_path, ["x", too_long])


def test_no_text(encoder: BertTextEncoder, tmp_path: Path):
    encoder.save_tokenizer(tmp_path)
    with pytest.raises(TextEncoderError, match="no text"):
        encoder.embed([])
    with pytest.raises(InputError, match="in words"):
        tokenize(tmp_path, ["  "])


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(TextEncoderError, match=r"cannot be loaded .*it must be a folder with config.json") as caught:
        BertTextEncoder.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """A hub that takes calls and never answers, and an empty cache."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_hub_that_does_not_answer(hub: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "_PATIENCE", 0.2)
    with pytest.raises(TextEncoderError, match=r"cannot be loaded .*access to the hub") as caught:
        BertTextEncoder.load("some/encoder")
    for way_out in ("--text-encoder FOLDER", "--text-encoder none"):
        assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_not_to_be_called(hub: socket.socket, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TextEncoderError, match=r"HF_HUB_OFFLINE is set.*--text-encoder none"):
        BertTextEncoder.load("some/encoder")
    hub.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody called
        hub.accept()


@pytest.mark.parametrize("source", ["no/such/folder/here", "./encoder", "~nobody/x", ""])
def test_a_folder_that_is_not_there(source: str):
    with pytest.raises(TextEncoderError, match=r"there is no folder .*give a folder with config\.json"):
        BertTextEncoder.load(source)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def with_weights(source: Path, target: Path, weights: dict[str, torch.Tensor] | None, name: str = "") -> Path:
    """A copy of an encoder's folder with other weights, as torch.save or safetensors writes them."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors"))
    if weights is not None and name.endswith(".bin"):
        torch.save(weights, target / name)
    elif weights is not None:
        safetensors.torch.save_file(weights, target / "model.safetensors")
    return target


def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the first published files have them."""
    renamed = {
        "bert." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in weights.items()
    }
    heads = {"cls.predictions.bias": torch.ones(3), "bert.embeddings.position_ids": torch.arange(4)}
    return {key: value for key, value in renamed.items() if "pooler" not in key} | heads


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "renamed",
    [
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {f"_orig_mod.bert.{key}": value for key, value in weights.items()},
        old_names,
        lambda weights: {key: value.double() for key, value in weights.items()},
    ],
)
def test_weights_under_other_names(
    renamed: Any, name: str, encoder: BertTextEncoder, encoder_folder: Path, tmp_path: Path
):
    folder = with_weights(encoder_folder, tmp_path / "x", renamed(stored(encoder_folder)), name)
    found = BertTextEncoder.load(folder)
    np.testing.assert_array_equal(found.embed(["draw a circle"]), encoder.embed(["draw a circle"]))


def without(part: str) -> Any:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def changed(key: str, value: torch.Tensor) -> Any:
    return lambda weights: {**weights, key: value}


_QUERY = "encoder.layer.0.attention.self.query.bias"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(".query."), "4 of 39 weights are missing: encoder.layer.0.attention.self.query."),
        (without("layer.1."), "16 of 39 weights are missing: encoder.layer.1."),
        (lambda weights: {}, "37 of 37 weights are missing"),
        (lambda weights: {f"gpt.{key}": value for key, value in weights.items()}, "39 of 39 weights are unknown: gpt."),
        (changed("teacher.weight", torch.ones(2)), "1 of 40 weights are unknown: teacher.weight"),
        (changed(_QUERY, torch.ones(7)), f"1 of 39 weights are of another shape: {_QUERY}"),
        (changed(_QUERY, torch.full((WIDTH,), float("nan"))), f"{_QUERY} holds values that are NaN"),
        (changed(_QUERY, torch.ones(WIDTH, dtype=torch.int64)), f"{_QUERY} has dtype torch.int64"),
    ],
)
def test_weights_that_are_not_the_encoders(damage: Any, words: str, name: str, encoder_folder: Path, tmp_path: Path):
    folder = with_weights(encoder_folder, tmp_path / "x", damage(stored(encoder_folder)), name)
    with pytest.raises(TextEncoderError) as caught:
        BertTextEncoder.load(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_in_parts(encoder: BertTextEncoder, encoder_folder: Path, tmp_path: Path):
    folder = with_weights(encoder_folder, tmp_path / "x", None)
    weights = stored(encoder_folder)
    listed = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(weights)}
    for part in set(listed.values()):
        safetensors.torch.save_file({k: v for k, v in weights.items() if listed[k] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}), encoding="utf-8")
    np.testing.assert_array_equal(BertTextEncoder.load(folder).embed(["x"]), encoder.embed(["x"]))
    index.write_text(json.dumps({"weight_map": {**listed, "a": "../b.safetensors"}}), encoding="utf-8")
    with pytest.raises(TextEncoderError, match="names 3 files, expected 1 to 64 beside it"):
        BertTextEncoder.load(folder)


def test_hostile_weights_and_sizes(encoder_folder: Path, tmp_path: Path):
    folder = with_weights(encoder_folder, tmp_path / "x", {}, "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")  # crashes torch's reader
    with pytest.raises(TextEncoderError, match="a key of one of its dicts is a tuple"):
        BertTextEncoder.load(folder)
    torch.save({"a": torch.ones(1).expand(10**12)}, folder / "pytorch_model.bin")
    with pytest.raises(TextEncoderError, match=r"declares 4,000,000,000,000 bytes"):
        BertTextEncoder.load(folder)
    config = json.loads((encoder_folder / "config.json").read_text(encoding="utf-8"))
    for name, value in (("num_hidden_layers", 10**9), ("hidden_size", 10**12)):
        (folder / "config.json").write_text(json.dumps({**config, name: value}), encoding="utf-8")
        with pytest.raises(TextEncoderError, match=f"{name} is larger than"):
            BertTextEncoder.load(folder)


def test_code_in_the_folder_is_not_run(encoder_folder: Path, tmp_path: Path):
    folder = with_weights(encoder_folder, tmp_path / "x", stored(encoder_folder))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    for name, classes in (("config.json", ("AutoConfig", "AutoModel")), ("tokenizer_config.json", ("AutoTokenizer",))):
        plain = json.loads((folder / name).read_text(encoding="utf-8"))
        plain["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        (folder / name).write_text(json.dumps(plain), encoding="utf-8")
    BertTextEncoder.load(folder)
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**plain, "model_type": "evil"}), encoding="utf-8")
    with pytest.raises(TextEncoderError, match="cannot be loaded"):
        BertTextEncoder.load(folder)
    assert not (tmp_path / "ran").exists()


CASED = [*WORDS[:5], "All", "Clear", "all", "clear", *WORDS[9:]]


@pytest.mark.parametrize(
    ("words", "told", "expected"),
    [
        (CASED, None, ["All", "Clear"]),
        (CASED, {"model_max_length": 512}, ["All", "Clear"]),
        (CASED, {"do_lower_case": True}, ["all", "clear"]),
        ([word.lower() if word[0] != "[" else word for word in CASED], None, ["all", "clear"]),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_casing_follows_the_vocabulary(
    words: list[str], told: Any, expected: list[str], ending: str, mark: str, encoder_folder: Path, tmp_path: Path
):
    folder = with_weights(encoder_folder, tmp_path / "x", stored(encoder_folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.txt").write_bytes((mark + ending.join(words) + ending * 3).encode())
    if told is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    loaded = BertTextEncoder.load(folder)
    ids = loaded.tokenize(["All Clear"])[0][0].tolist()
    tokens = loaded.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["[CLS]", *expected, "[SEP]"]
    # An uncased vocabulary has the words once; the last one counts, as in every reader of such files.
    assert all(words[index] == token for index, token in zip(ids, tokens, strict=True))


def test_a_tokenizer_of_another_encoder(encoder_folder: Path, tmp_path: Path):
    folder = with_weights(encoder_folder, tmp_path / "x", stored(encoder_folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "more", "words"]), encoding="utf-8")
    with pytest.raises(TextEncoderError, match="its tokenizer has tokens up to 13, its network 12"):
        BertTextEncoder.load(folder)


def test_truncated_weights(encoder_folder: Path, tmp_path: Path):
    for file in encoder_folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(TextEncoderError, match="cannot be loaded"):
        BertTextEncoder.load(tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TextEncoderError, match="pip install 'lfdm-export"):
        BertTextEncoder.load(tmp_path)
    with pytest.raises(MissingDependencyError, match="pip install 'lfdm-export"):
        tokenize(tmp_path, ["x"])


def test_damaged_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match="not a tokenizer"):
        tokenize(tmp_path, ["x"])


def test_labels_need_no_package_for_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from lfdm_export import Pipeline
    from tests.fake_bundle import EMBEDDINGS, LABELS, fake_manifest, write_fake_bundle

    bundle = write_fake_bundle(tmp_path / "x")
    stages = tuple(stage_specs(fake_manifest().geometry, with_text=True).values())
    with_text = replace(bundle, manifest=replace(bundle.manifest, stages=stages))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    pipeline = Pipeline(with_text)
    np.testing.assert_array_equal(pipeline.bundle.embedding(LABELS[0]), EMBEDDINGS[0])
    with pytest.raises(MissingDependencyError, match="pip install 'lfdm-export"):
        pipeline.embed_text(["draw"])

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lfdm_export.errors import BundleError, InputError, MissingDependencyError
from lfdm_export.tokenizer import tokenize
from lfdm_models.text import BertTextEncoder, TextEncoderError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "draw", "circle", "jog", "##ging", "anger", "x", "a"]
WIDTH, MAX_TOKENS = 24, 16


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with a vocabulary of its own, saved as transformers saves one."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

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
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    try:
        tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=False)
    except TypeError:  # transformers before version 5
        tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(folder)
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


def test_a_hub_name_without_network_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    import transformers

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        TextEncoderError, match=r"'some/encoder' cannot be loaded \(We couldn't connect.*access to the hub"
    ):
        BertTextEncoder.load("some/encoder")


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
    with pytest.raises(BundleError, match="no tokenizer"):
        tokenize(tmp_path, ["x"])

"""The text encoder: a pretrained BERT whose token states are averaged into one embedding.

The user provides its weights: a local folder, or a name on the Hugging Face hub.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lfdm_models.text_files import (
    TextEncoderError,
    copy_tokenizer,
    find_folder,
    fitted,
    missing_transformers,
    read_config,
    read_weights,
)
from lfdm_models.wording import first_line

__all__ = ["DEFAULT_ENCODER", "BertTextEncoder", "TextEncoderError"]

#: The text encoder of the published models.
DEFAULT_ENCODER = "bert-base-cased"
#: Keeps the mean over no tokens finite.
_EPSILON = 1e-8


class BertTextEncoder(nn.Module):
    """Token states of a BERT, averaged over the tokens after [CLS] that are not padding."""

    def __init__(self, bert: nn.Module, tokenizer: Any) -> None:
        """Wrap a transformers model and its fast tokenizer; most callers use `load`."""
        super().__init__()
        self.bert = bert.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config: Any = bert.config
        self.width: int = config.hidden_size
        self.max_tokens: int = config.max_position_embeddings

    @classmethod
    def load(cls, source: str | os.PathLike[str] = DEFAULT_ENCODER) -> BertTextEncoder:
        """Load an encoder strictly: its weights must match its architecture exactly.

        No code in its files is run. A name on the hub is first looked up in this machine's cache.

        Args:
            source: a folder with config.json, weights and tokenizer files, or a name on the hub.

        Raises:
            TextEncoderError: transformers is not installed, or the files are not available or do not form an encoder.
        """
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the client reads it at import
        try:
            import transformers
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise TextEncoderError(missing_transformers()) from error
        # The hub's client logs each of its many attempts; the error reports them once.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        folder = find_folder(source)
        loud = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            return cls(_strict_model(folder, transformers), _tokenizer(folder, transformers))
        except TextEncoderError:
            raise
        # transformers raises many types for invalid files, including the system's errors.
        except Exception as error:
            raise TextEncoderError(
                f"the text encoder {str(folder)!r} cannot be loaded ({first_line(error, 200)}); it must be a folder "
                "with config.json, weights and tokenizer files"
            ) from error
        finally:
            transformers_logging.set_verbosity(loud)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> token IDs and attention mask, both (B, L) int64, padded to the longest.

        Raises:
            TextEncoderError: there is no text, or one has more tokens than the encoder has positions.
        """
        if not texts:
            raise TextEncoderError("there is no text to encode; give at least one")
        tokens = self.tokenizer(list(texts), padding=True, add_special_tokens=True, return_tensors="pt")
        length = tokens["input_ids"].shape[1]
        if length > self.max_tokens:
            raise TextEncoderError(f"a text has {length} tokens, expected at most {self.max_tokens}; shorten it")
        return tokens["input_ids"], tokens["attention_mask"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token IDs and mask, both (B, L) int64 -> text embedding (B, width)."""
        states: Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 1:]
        mask = attention_mask[:, 1:, None].to(states.dtype)
        return (states * mask).sum(dim=1) / (mask.sum(dim=1) + _EPSILON)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> text embeddings (B, width) float32; a text's embedding does not depend on the other texts.

        Raises:
            TextEncoderError: there is no text, or one has more tokens than the encoder has positions.
        """
        # One at a time: padding would change the last bits.
        rows = [self(*self.tokenize([text])) for text in texts]
        if not rows:
            raise TextEncoderError("there is no text to encode; give at least one")
        return torch.cat(rows).numpy().astype(np.float32)

    def save_tokenizer(self, folder: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json, which the light `tokenizers` package can read without transformers.

        It stores padding to the longest text, and truncation at the encoder's last position. Returns its path.
        """
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend["padding"] = {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": self.tokenizer.pad_token_id,
            "pad_type_id": 0,
            "pad_token": self.tokenizer.pad_token,
        }
        backend["truncation"] = {
            "direction": "Right",
            "max_length": self.max_tokens,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
        return path


def _strict_model(folder: Path, transformers: Any) -> nn.Module:
    """The network with the folder's weights; built without memory first, because its sizes are untrusted."""
    plain = read_config(folder)
    config = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
    # Plain attention, which exports as ordinary operators.
    options = {"attn_implementation": "eager", "trust_remote_code": False}
    with torch.device("meta"):
        sketch: nn.Module = transformers.AutoModel.from_config(config, **options).float()
    stored = read_weights(folder)
    expected = sketch.state_dict()
    # The pooler is for pretraining only, and many files omit it.
    pooled = any(".pooler." in f".{key}" for key in stored)
    if not pooled:
        expected = {name: value for name, value in expected.items() if not name.startswith("pooler.")}
    prefix: str = getattr(sketch, "base_model_prefix", "") or "bert"
    weights = fitted(stored, expected, prefix, folder)
    model: nn.Module = transformers.AutoModel.from_config(config, **options).float()
    if not pooled and hasattr(model, "pooler"):
        model.register_module("pooler", None)
    model.load_state_dict(weights, strict=True)
    return model


def _tokenizer(folder: Path, transformers: Any) -> Any:
    """The folder's fast tokenizer, loaded from copies of its files."""
    with tempfile.TemporaryDirectory(prefix="lfdm-tokenizer-") as copies:
        options = copy_tokenizer(folder, Path(copies))
        (Path(copies) / "config.json").write_text(json.dumps(read_config(folder)), encoding="utf-8")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            copies, local_files_only=True, trust_remote_code=False, use_fast=True, **options
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TextEncoderError(
            f"the text encoder {str(folder)!r} has no fast tokenizer (tokenizer.json); choose one that has"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    known = read_config(folder).get("vocab_size")
    if isinstance(known, int) and largest >= known:
        raise TextEncoderError(
            f"the text encoder {str(folder)!r}: its tokenizer has tokens up to {largest}, its network {known} of them; "
            "the files are of different encoders"
        )
    return tokenizer

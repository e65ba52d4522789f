"""The text encoder: a pretrained BERT whose token states are averaged into one embedding.

Its weights are the user's to bring: a local folder, or a name that the Hugging Face hub knows.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

#: What the published models were trained with.
DEFAULT_ENCODER = "bert-base-cased"
#: Keeps the mean of no tokens finite.
_EPSILON = 1e-8


class TextEncoderError(RuntimeError):
    """A text encoder cannot be had, or a text cannot be encoded."""


class BertTextEncoder(nn.Module):
    """Token states of a BERT, averaged over the tokens after [CLS] that are not padding."""

    def __init__(self, bert: nn.Module, tokenizer: Any) -> None:
        """Wrap a transformers model and its fast tokenizer; most callers want `load`."""
        super().__init__()
        self.bert = bert.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config: Any = bert.config
        self.width: int = config.hidden_size
        self.max_tokens: int = config.max_position_embeddings

    @classmethod
    def load(cls, source: str | os.PathLike[str] = DEFAULT_ENCODER) -> BertTextEncoder:
        """Load an encoder.

        Args:
            source: a folder with config.json, weights and tokenizer files, or a name on the hub.

        Raises:
            TextEncoderError: transformers is not installed, or the files cannot be had.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise TextEncoderError(
                "a text encoder needs the package 'transformers', which is not installed; "
                "install it with: pip install 'lfdm-export[text]'"
            ) from error
        name = os.path.expanduser(source)  # noqa: PTH111  (it may be a name on the hub)
        local = Path(name).is_dir()
        # The hub's client tells of each of its many attempts; the error below says it once.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        # Its bars are for who watches a download; what is read from a folder is there at once.
        silenced = transformers_logging.is_progress_bar_enabled() and (local or not sys.stderr.isatty())
        if silenced:
            transformers_logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, use_fast=True)
            # The plain attention, as a graph of ordinary operators.
            bert = AutoModel.from_pretrained(
                name, local_files_only=local, dtype=torch.float32, attn_implementation="eager"
            )
        except Exception as error:  # the hub's client, the JSON and the weight readers each have their own
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            wanted = "a folder with config.json, weights and tokenizer files"
            advice = f"it must be {wanted}" if local else f"try again with access to the hub, or give {wanted}"
            raise TextEncoderError(f"the text encoder {name!r} cannot be loaded ({reason}); {advice}") from error
        finally:
            if silenced:
                transformers_logging.enable_progress_bar()
        if not getattr(tokenizer, "is_fast", False):
            raise TextEncoderError(
                f"the text encoder {name!r} has no fast tokenizer (tokenizer.json); choose one that has"
            )
        return cls(bert, tokenizer)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> token ids and attention mask, both (B, L) int64, padded to the longest.

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
        """Token ids and mask, both (B, L) int64 -> text embedding (B, width)."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 1:]
        mask = attention_mask[:, 1:, None].to(states.dtype)
        return (states * mask).sum(dim=1) / (mask.sum(dim=1) + _EPSILON)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> text embeddings (B, width) float32; a text's embedding depends on nothing else.

        Raises:
            TextEncoderError: see `tokenize`.
        """
        # One at a time: padding would leave its trace in the last bits.
        rows = [self(*self.tokenize([text])) for text in texts]
        if not rows:
            raise TextEncoderError("there is no text to encode; give at least one")
        return torch.cat(rows).numpy().astype(np.float32)

    def save_tokenizer(self, folder: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json, which the light `tokenizers` package can read without transformers.

        It pads to the longest text and cuts at the encoder's last position, so that who reads it knows
        both. Returns its path.
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

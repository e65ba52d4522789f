"""The files of a text encoder: found, bounded, and read strictly; no code in them is ever run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lfdm_models.patience import within
from lfdm_models.stored_files import TorchFile, read_safetensors
from lfdm_models.stored_values import StoredFileError, StoredTensor
from lfdm_models.wording import first_line

CONFIG = "config.json"
VOCABULARY = "vocab.txt"
_TOKENIZER_CONFIG = "tokenizer_config.json"
#: All files that define a tokenizer; other files in the folder are ignored.
_TOKENIZER_FILES = (
    "tokenizer.json", _TOKENIZER_CONFIG, VOCABULARY, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
#: Files of weights, in order of preference; the second of each pair lists the parts of a large model.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LARGEST_JSON, _LARGEST_TOKENIZER, _MOST_PARTS = 1 << 20, 64 << 20, 64
#: Time limit in seconds for the hub's first answer.
_PATIENCE = 8.0
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
#: Layers on top of an encoder for pretraining, and buffers of old versions that are not weights.
_HEADS = re.compile(
    r"^(?:cls|classifier|lm_head|qa_outputs|pre_classifier|vocab_(?:transform|layer_norm|projector)|predictions)\."
    r"|(?:^|\.)(?:position_ids|token_type_ids)$"
)

T = TypeVar("T")


class TextEncoderError(RuntimeError):
    """A text encoder is not available, or a text cannot be encoded."""


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of an encoder's files: the given folder, or a copy of the encoder with that name on the hub.

    Files in this machine's hub cache are used without a network request.

    Raises:
        TextEncoderError: there is no such folder, and the hub does not provide it.
    """
    folder = Path(os.path.expanduser(source))  # noqa: PTH111  (no error for ~unknown)
    name = os.fspath(source)
    if name and folder.is_dir():
        return folder
    if name[:1] in ("", ".", "~") or not re.fullmatch(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", name):
        raise TextEncoderError(
            f"there is no folder {name!r}, and it is not a name on the Hugging Face hub; give a folder with "
            "config.json, weights and tokenizer files"
        )
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the client reads it at import
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError as error:
        raise TextEncoderError(missing_transformers()) from error
    wanted = [CONFIG, *_WEIGHTS, *_TOKENIZER_FILES]
    try:
        found = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        weights_file(found)
        return found
    except Exception:  # noqa: BLE001  # not in the cache, or incomplete: the client raises many types
        pass
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            # The download itself would retry for a minute without an answer.
            files = within(_PATIENCE, lambda: HfApi().model_info(name, timeout=_PATIENCE / 2).siblings or ())
            names = {file.rfilename for file in files}
            chosen = next((weights for weights in _WEIGHTS if weights in names), None)
            wanted = [CONFIG, *_TOKENIZER_FILES, *([chosen] if chosen else [])]
            if chosen and chosen.endswith(".index.json"):
                stem, ending = chosen.removesuffix(".index.json").rsplit(".", 1)
                wanted.append(f"{stem}-*.{ending}")
            return Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # noqa: BLE001  # the client raises its own errors, those of httpx and the system's
            reason = first_line(error, 200)
    raise TextEncoderError(
        f"the text encoder {name!r} cannot be loaded ({reason}): it is not on this machine, and the Hugging Face hub "
        "did not provide it; try again with access to the hub, give the folder of its files (--text-encoder FOLDER), "
        "or export without labels and free text (--text-encoder none)"
    )


def missing_transformers() -> str:
    """The message if the packages for text are not installed."""
    return (
        "a text encoder needs the package 'transformers', which is not installed; "
        "install it with: pip install 'lfdm-export[text]'"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file of bounded size; a byte-order mark is ignored.

    Raises:
        TextEncoderError: it is missing, damaged, too large, or not an object.
    """
    text = _read(path, _LARGEST_JSON)
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextEncoderError(f"{path} is not JSON ({str(error)[:100]}); fetch the text encoder again") from error
    if not isinstance(plain, dict):
        raise TextEncoderError(f"{path} holds no JSON object; fetch the text encoder again")
    return plain


def _read(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise TextEncoderError(f"{path} has more than {most} bytes, more than any text encoder's")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise TextEncoderError(
            f"the text encoder {str(path.parent)!r} cannot be loaded ({path.name}: {error.strerror or error}); "
            "it must be a folder with config.json, weights and tokenizer files"
        ) from error
    except UnicodeDecodeError as error:
        raise TextEncoderError(f"{path} is not text in UTF-8 ({error.reason}); fetch the text encoder again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The encoder's architecture as plain values, without entries that name code in the folder.

    Raises:
        TextEncoderError: it cannot be read, or has sizes that no encoder has.
    """
    path = folder / CONFIG
    config = read_json(path)
    config.pop("auto_map", None)
    if not isinstance(config.get("model_type"), str):
        raise TextEncoderError(f"{path} does not say which kind of model it is (model_type); give a BERT's folder")
    for name, value in config.items():
        most = 256 if re.search(r"layers|groups|group_num|heads", name) else 1 << 22
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
            raise TextEncoderError(f"{path}: {name} is larger than {most}, which no text encoder has")
    return config


def weights_file(folder: Path) -> Path:
    """The file that holds the weights, or lists the files that hold them.

    Raises:
        TextEncoderError: it is missing.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise TextEncoderError(
        f"{folder} holds no weights: it must be a folder with {CONFIG}, tokenizer files and {_WEIGHTS[0]} or "
        f"{_WEIGHTS[2]}"
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights by their names in the file, mapped.

    Raises:
        TextEncoderError: they cannot be read, or are not named tensors.
    """
    path = weights_file(folder)
    if path.suffix != ".json":
        return _read_part(path)
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict):
        raise TextEncoderError(f"{path} has no weight_map; fetch the text encoder again")
    parts = sorted({part for part in listed.values() if isinstance(part, str)})
    if not 0 < len(parts) <= _MOST_PARTS or any(Path(part).name != part for part in parts):
        raise TextEncoderError(f"{path} names {len(parts)} files, expected 1 to {_MOST_PARTS} beside it")
    weights: dict[str, Tensor] = {}
    for part in parts:
        weights |= _read_part(folder / part)
    absent = [key for key in listed if key not in weights]
    if absent:
        raise TextEncoderError(f"{path} lists {absent[0]} (of {len(absent)}), which no file holds; fetch it again")
    return weights


def _read_part(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        file = TorchFile(path)
        if not isinstance(file.top, Mapping):
            raise StoredFileError("it holds no state dict")
        weights, declared = {}, 0
        for key, value in file.top.items():
            if not isinstance(key, str) or not isinstance(value, StoredTensor):
                raise StoredFileError(f"its entry {str(key)[:80]!r} is not a tensor, expected a state dict")
            weights[key] = file.tensor(value)
            declared += weights[key].numel() * weights[key].element_size()
        if declared > 2 * file.size:  # not 1: a shared weight is saved once
            raise StoredFileError(f"it declares {declared:,} bytes of weights but holds {file.size:,}")
        return weights
    except (StoredFileError, RuntimeError) as error:
        raise TextEncoderError(
            f"the text encoder's weights {path} cannot be loaded: {first_line(error)}; fetch them again"
        ) from error
    except OSError as error:
        raise TextEncoderError(
            f"the text encoder's weights {path} cannot be read: {error.strerror or error}"
        ) from error


def fitted(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str, where: Path
) -> dict[str, Tensor]:
    """Copies of exactly the weights of a network, under its names.

    Args:
        weights: as stored. Prefixes of wrappers and of the pretraining model are removed; old names of layer norms, and
            heads on top of the encoder, are recognized.
        expected: the network's own weights, on any device.
        prefix: name of the encoder within its pretraining model, such as "bert".
        where: the folder, for messages.

    Raises:
        TextEncoderError: a weight is missing, unknown, of another shape, not float, or not finite.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in weights.items():
        name = _renamed(key, prefix)
        if name in expected and name not in found:
            found[name] = tensor
        elif not _HEADS.search(name):
            unknown.append(key)
    missing = [name for name in expected if name not in found]
    wrong = [name for name in found if found[name].shape != expected[name].shape]
    problems = [
        f"{len(names)} of {count} weights {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for names, count, what in (
            (missing, len(expected), "are missing"),
            (unknown, len(weights), "are unknown"),
            (wrong, len(expected), "are of another shape"),
        )
        if names
    ]
    if problems:
        raise TextEncoderError(
            f"the text encoder {where} cannot be loaded: {'; '.join(problems)}; give the folder of a whole encoder"
        )
    return {name: _copied(name, tensor, expected[name].dtype, where) for name, tensor in found.items()}


def _renamed(key: str, prefix: str) -> str:
    name = _WRAPPERS.sub("", key).removeprefix(f"{prefix}.")
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _copied(name: str, tensor: Tensor, dtype: torch.dtype, where: Path) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_floating_point() != dtype.is_floating_point:
        raise TextEncoderError(f"the text encoder {where}: {name} has dtype {tensor.dtype}, expected {dtype}")
    copy = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    if not torch.isfinite(copy).all():
        raise TextEncoderError(f"the text encoder {where}: {name} holds values that are NaN or infinite")
    return copy


def copy_tokenizer(folder: Path, target: Path) -> dict[str, Any]:
    """Copy a tokenizer's files into a separate folder, as UTF-8 text with plain line ends.

    Returns:
        Options for `AutoTokenizer`: whether text is lowercased, if only the vocabulary shows it.

    Raises:
        TextEncoderError: there are no such files, or one is too large or not a text.
    """
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise TextEncoderError(
            f"{folder} holds no tokenizer: it must be a folder with {CONFIG}, weights and tokenizer files"
        )
    for name in present:
        if name.endswith(".model"):
            shutil.copyfile(folder / name, target / name)
            continue
        text = _read(folder / name, _LARGEST_TOKENIZER)
        if name == _TOKENIZER_CONFIG:
            text = json.dumps({key: value for key, value in read_json(folder / name).items() if key != "auto_map"})
        if name == VOCABULARY:
            # Blank lines at the end are not tokens; blank lines within the file count.
            text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n") + "\n"
        (target / name).write_text(text, encoding="utf-8", newline="")
    options = read_json(folder / _TOKENIZER_CONFIG) if _TOKENIZER_CONFIG in present else {}
    if "tokenizer.json" in present or "do_lower_case" in options or VOCABULARY not in present:
        return {}
    return {"do_lower_case": not _is_cased((target / VOCABULARY).read_text(encoding="utf-8").split("\n"))}


def _is_cased(vocabulary: Iterable[str]) -> bool:
    """Whether a vocabulary distinguishes capital from small letters; special tokens always use capitals."""
    return any(word != word.lower() and not re.fullmatch(r"[\[<].*[\]>]", word) for word in vocabulary)

"""Model card of a bundle on the Hugging Face hub, written from the bundle's metadata."""

from __future__ import annotations

import json
from pathlib import Path

from lfdm_export import __version__
from lfdm_export.bundle.manifest import Manifest
from lfdm_export.wording import count

# Path in a bundle of the report that `lfdm_export.parity.report` writes.
_REPORT = "parity/report.json"
_LONGEST_REPORT = 4 << 20
_HEAD = """\
---
library_name: lfdm-export
pipeline_tag: image-to-video
tags:
- latent-flow-diffusion
- onnx
- image-to-video
---
"""


def model_card(manifest: Manifest, folder: Path, repository: str, *, clip: str | None, clip_words: str = "") -> str:
    """Return the card in Markdown, with the hub's metadata.

    Args:
        manifest: manifest of the bundle.
        folder: folder of the bundle; the card summarizes its parity report, if there is one.
        repository: ``org/name`` on the hub.
        clip: file of a clip beside the card.
        clip_words: description of the clip.
    """
    geometry, sampler = manifest.geometry, manifest.sampler
    label = f' --label "{manifest.labels[0]}"' if manifest.labels else " --embedding embedding.npy"
    given = f'label="{manifest.labels[0]}"' if manifest.labels else "text_embedding=embedding"
    size = sum(entry.bytes for entry in manifest.files.values())
    name = repository.rpartition("/")[2]
    lines = [
        f"# {name}",
        "",
        "A latent flow diffusion model ([Ni et al., CVPR 2023](https://arxiv.org/abs/2303.13744)): a photograph and a "
        "label become a clip. ONNX graphs, made with `lfdm-export`.",
        "",
        *([f"![{_plain(clip_words) or 'a clip'}]({clip})", ""] if clip else []),
        "    pip install 'lfdm-export[run,hub]'",
        f"    lfdm-generate {repository} --image photo.jpg{label} --out clip.gif",
        "",
        "```python\nfrom lfdm_export import Pipeline\n",
        f'pipe = Pipeline.from_pretrained("{repository}")',
        f'pipe.generate("photo.jpg", {given}).save("clip.gif")\n```',
        "",
        "| | |",
        "|---|---|",
        f"| clips | {count(geometry.frames, 'frame')} of {geometry.image_size}×{geometry.image_size} pixels |",
        f"| precision | {manifest.precision} |",
        f"| labels | {', '.join(map(_plain, manifest.labels)) or 'none: it takes text embeddings'} |",
        f"| free text | {'yes' if manifest.has_text else 'no'} |",
        f"| motion transfer | {'yes' if manifest.has_drive else 'no'} |",
        f"| sampling by default | {sampler.sampler}{_steps(sampler.steps)}, guidance {sampler.scale:g} |",
        f"| size | {size / 1e6:.1f} MB in {count(len(manifest.files), 'file')} |",
        f"| bundle | `{manifest.bundle_id}` |",
        *_verification(folder),
        *([] if manifest.provenance.get("trained") is not False else ["| weights | untrained |"]),
        "",
        "`manifest.json` has the SHA-256 of every file; `lfdm-export` compares them whenever it opens the bundle.",
        "",
        f"*Written by lfdm-export {__version__}. Training data and license are for the model's author to name.*",
    ]
    return _HEAD + "\n".join(lines) + "\n"


def _steps(steps: int | None) -> str:
    return "" if steps is None else f", {count(steps, 'step')}"


def _verification(folder: Path) -> list[str]:
    """Return the rows about the comparison with PyTorch, if the bundle was verified."""
    path = folder / _REPORT
    try:
        if path.stat().st_size > _LONGEST_REPORT:
            return []
        report = json.loads(path.read_bytes())
        verdict, engine, date = (report[name] for name in ("verdict", "engine", "date"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [f"| compared with PyTorch | {_plain(verdict)} ({_plain(engine)}, {_plain(date)[:10]}) |"]


def _plain(text: object) -> str:
    """Escape text for a cell of a Markdown table."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>|!#" else character for character in str(text)[:500])

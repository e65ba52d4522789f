"""A hook of MkDocs: files of the repository that are pages of the site too, so that no text stands twice.

Links in all pages are written as the repository has them (GitHub shows them so); here they become links of the site.
A link to a file that is not a page becomes plain text, if the file exists.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: File of the repository → page of the site.
PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "deploy/README.md": "deploy.md",
    "models/lfdm_models/weights/MODEL_CARD.md": "model_card.md",
    "triton_repo/README.md": "triton_repository.md",
}
#: Pictures that pages show from outside docs/.
PICTURES = ("benchmarks/results/*.png",)
_SOURCES = {page: source for source, page in PAGES.items()}
# A link or a picture of Markdown: text, target; and the source of a picture in HTML.
_LINK = re.compile(r"(?P<text>!?\[(?:[^\]\[]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")
_PICTURE = re.compile(r'(?P<before><(?:img|a) [^>]*?(?:src|href)=")(?P<target>[^"]+)')
# Code in a table: GitHub wants its bars escaped, Python-Markdown takes them as they are.
_CODE = re.compile(r"`[^`]+`")
_FENCE = re.compile(r"^\s*(```|~~~)")
_LOG = logging.getLogger("mkdocs.hooks.repository_pages")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of docs/ that the navigation does not name where it has a `*`."""
    folder = Path(config.docs_dir)
    named = set(_strings(config.nav))
    others = sorted(path.name for path in folder.glob("*.md") if path.name not in named)
    config.nav = expanded(config.nav, others)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files to those of docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for pattern in PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn links of the repository into links of the site."""
    place = page.file.src_uri
    source = _SOURCES.get(place, f"docs/{place}")

    def target_of(target: str) -> str | None:
        return site_target(target, source=source, place=place, files=files)

    def markdown_link(found: re.Match[str]) -> str:
        target = target_of(found["target"])
        return found["text"][1:-1] if target is None else f"{found['text']}({target})"

    def html_link(found: re.Match[str]) -> str:
        return found["before"] + (target_of(found["target"]) or found["target"])

    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= bool(_FENCE.match(line))
        if not fenced:
            line = _PICTURE.sub(html_link, _LINK.sub(markdown_link, line))
            if line.startswith("|"):
                line = _CODE.sub(lambda code: code[0].replace(r"\|", "|"), line)
        lines.append(line)
    return "\n".join(lines)


def site_target(target: str, *, source: str, place: str, files: Files) -> str | None:
    """What a link of the repository is on the site; None for a file that is there and no page.

    Args:
        target: the link, as in the file.
        source: the file, from the repository's root.
        place: its page, from the site's root.
        files: of the site.
    """
    if re.match(r"[a-z]+:|#", target):
        return target
    path, hash_sign, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = PAGES.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(page) is not None:
        return posixpath.relpath(page, posixpath.dirname(place) or ".") + hash_sign + anchor
    if not os.path.exists(ROOT / path):  # noqa: PTH110 - a folder counts
        _LOG.warning("%s links to %s, which the repository does not have", source, target)
    return None


def _strings(nav: Any) -> list[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [name for child in children for name in _strings(child)]


def expanded(nav: Any, others: list[str]) -> Any:
    """A navigation with pages instead of its `*`."""
    if isinstance(nav, list):
        return [entry for child in nav for entry in (others if child == "*" else [expanded(child, others)])]
    if isinstance(nav, dict):
        return {title: expanded(child, others) for title, child in nav.items()}
    return nav

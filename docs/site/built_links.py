"""A hook of MkDocs: looks at every link of the built pages, those in HTML and in docstrings included.

Links within the site need a file and an anchor that exist. Links to other hosts are looked at by their form only, and
nothing may be loaded from another host: no script, style, font, picture or frame.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

# What a browser fetches by itself: tag, attribute.
_LOADED = {
    *((tag, "src") for tag in ("audio", "embed", "iframe", "img", "script", "source", "video")),
    *((tag, "srcset") for tag in ("img", "source")),
    *(("link", "href"), ("object", "data"), ("video", "poster")),
}
_FOREIGN = re.compile(r"https?://[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d+)?(?:[/?#][^\s<>\"{}|\\^`]*)?")
_IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class _Page(HTMLParser):
    """The links and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value is not None}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self._in_style = tag == "style"
        self.loaded += _IN_STYLE.findall(values.get("style", ""))
        for name, value in values.items():
            if (tag, name) in _LOADED and values.get("rel") not in ("canonical", "next", "prev"):
                self.loaded.append(value)
            if name in ("href", "src") and tag != "base":
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loaded += _IN_STYLE.findall(data)


def on_post_build(config: MkDocsConfig) -> None:
    """Look at all pages.

    Raises:
        PluginError: links are dead, or something comes from another host; all of them are named.
    """
    from mkdocs.exceptions import PluginError

    faults = sorted(set(faults_of(Path(config.site_dir))))
    if faults:
        raise PluginError("links of the built pages:\n  " + "\n  ".join(faults))


def faults_of(site: Path) -> Iterator[str]:
    """What is wrong with the links of a built site, a sentence each."""
    # The page for addresses that do not exist is written for a server's root.
    pages = {path: _Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    for style in site.rglob("*.css"):
        for url in _IN_STYLE.findall(style.read_text()):
            yield f"{style.relative_to(site)} loads {url} from another host"
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for url in page.loaded:
            if re.match(r"(https?:)?//", url):
                yield f"{name} loads {url} from another host"
        for link in page.links:
            if re.match(r"https?:", link):
                if not _FOREIGN.fullmatch(link):
                    yield f"{name} has a link that is not an address: {link}"
            elif not re.match(r"(data|mailto):", link):
                fault = _inner_fault(link, path, pages)
                if fault:
                    yield f"{name} {fault}"


def _inner_fault(link: str, path: Path, pages: dict[Path, _Page]) -> str | None:
    """What is wrong with a link within the site."""
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc or parts.path.startswith("/"):
        return f"has a link of an unknown kind: {link}"
    target = path
    if parts.path:
        target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
        if not target.is_file():
            return f"links to {link}, which does not exist"
    anchor = urllib.parse.unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"links to {link}, which has no such anchor"
    return None

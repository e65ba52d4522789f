"""The hooks of the documentation's site, and its notebook in git."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def hook(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pages:
    """What a hook needs of MkDocs' files."""

    def __init__(self, *names):
        self.names = names

    def get_file_from_path(self, name):
        return name if name in self.names else None


def faults(tmp_path, body):
    (tmp_path / "other.html").write_text("<h2 id=there>x</h2>")
    (tmp_path / "page.html").write_text(body)
    return list(hook("built_links").faults_of(tmp_path))


@pytest.mark.parametrize(
    "body",
    [
        "<a href=other.html#there>x</a> <a href=#here>x</a> <p id=here>",
        "<a href=https://example.org/a?b=c#d>x</a> <img src=data:image/gif;base64,R0>",
    ],
)
def test_good_links_are_no_faults(tmp_path, body):
    assert faults(tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<a href=gone.html>x</a>", "links to gone.html, which does not exist"),
        ("<a href=other.html#gone>x</a>", "links to other.html#gone, which has no such anchor"),
        ("<a href=#gone>x</a>", "links to #gone, which has no such anchor"),
        ("<a href='https://exa mple.org'>x</a>", "has a link that is not an address"),
        ("<a href=/root.html>x</a>", "has a link of an unknown kind"),
        ("<script src=https://cdn.example.org/a.js></script>", "loads https://cdn.example.org/a.js from another host"),
        ("<img src=//example.org/a.png>", "loads //example.org/a.png from another host"),
        ("<style>@import 'https://example.org/f.css'</style>", "loads https://example.org/f.css from another host"),
        ("<p style='background: url(http://example.org/a.png)'>", "loads http://example.org/a.png from another host"),
    ],
)
def test_dead_and_foreign_links_are_faults(tmp_path, body, fault):
    assert any(fault in found for found in faults(tmp_path, body))


def test_a_style_sheet_loads_nothing_from_elsewhere(tmp_path):
    (tmp_path / "site.css").write_text("@font-face { src: url(https://fonts.example.org/f.woff2) }")
    assert "site.css loads https://fonts.example.org/f.woff2 from another host" in faults(tmp_path, "")


@pytest.mark.parametrize(
    ("target", "source", "place", "expected"),
    [
        ("docs/serving.md#from-python", "README.md", "index.md", "serving.md#from-python"),
        ("../SECURITY.md", "docs/serving.md", "serving.md", "security.md"),
        ("../serving.md", "docs/reference/errors.md", "reference/errors.md", "../serving.md"),
        ("../deploy/bulk", "docs/bulk.md", "bulk.md", None),
        ("#here", "README.md", "index.md", "#here"),
        ("https://example.org", "README.md", "index.md", "https://example.org"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(target, source, place, expected):
    pages = Pages("index.md", "serving.md", "security.md")
    assert hook("repository_pages").site_target(target, source=source, place=place, files=pages) == expected


def test_a_link_to_a_file_that_is_nowhere_is_a_warning(caplog):
    hook("repository_pages").site_target("gone.md", source="README.md", place="index.md", files=Pages())
    assert "README.md links to gone.md, which the repository does not have" in caplog.text


def test_a_star_in_the_navigation_stands_for_all_other_pages():
    nav = [{"Start": ["index.md", "*"]}, {"Errors": "errors.md"}]
    assert hook("repository_pages").expanded(nav, ["web.md"]) == [{"Start": ["index.md", "web.md"]}, nav[1]]


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_has_no_outputs_in_git(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


def test_bars_in_the_code_of_a_table_are_not_escaped_twice():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="commands.md"))
    markdown = "| `a\\|b` | c\\|d |\n\n`e\\|f`"
    expected = "| `a|b` | c\\|d |\n\n`e\\|f`"
    assert hook("repository_pages").on_page_markdown(markdown, page, config=None, files=Pages()) == expected


def test_links_in_fenced_code_stay():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="commands.md"))
    markdown = "```\n[x](gone.md)\n```"
    assert hook("repository_pages").on_page_markdown(markdown, page, config=None, files=Pages()) == markdown

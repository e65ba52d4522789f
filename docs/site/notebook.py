"""A hook of MkDocs: runs every notebook of docs/ and makes a page of it, outputs included.

In git the notebooks have no outputs; a cell that raises ends the build.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

#: Seconds that a cell may take; a first clip takes one or two.
_LONGEST_CELL = 300


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page `NAME.md` for each notebook; the file itself is copied as it is.

    Raises:
        PluginError: a cell raises.
    """
    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        try:
            _run(notebook, config.docs_dir)
        except CellExecutionError as error:
            raise PluginError(f"{path.name}: {error}") from None
        download = f"\n\n[Download this notebook]({path.name})\n"
        files.append(File.generated(config, f"{path.stem}.md", content=markdown_of(notebook) + download))
    return files


def _run(notebook: Any, folder: str) -> None:
    """Run all cells in a kernel that no other user can reach, and keep their outputs in the notebook."""
    place = {"metadata": {"path": folder}}
    with tempfile.TemporaryDirectory() as private:
        sockets = Config(KernelManager={"transport": "ipc", "ip": f"{private}/kernel"})
        NotebookClient(notebook, config=sockets, timeout=_LONGEST_CELL, resources=place).execute()


def markdown_of(notebook: Any) -> str:
    """A notebook's cells and their outputs."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source}\n```")
            parts += [_output(output) for output in cell.outputs]
    return "\n\n".join(part for part in parts if part)


def _output(output: Any) -> str:
    """What a cell printed or shows; HTML before text."""
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
    if output.output_type not in ("display_data", "execute_result"):
        return ""
    if "text/html" in output.data:
        return f'<div class="notebook-output">\n{output.data["text/html"]}\n</div>'
    return f"```text\n{output.data['text/plain']}\n```"

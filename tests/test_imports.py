"""Imports between rooms follow one strict order, and light modules import on a bare machine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, ROOT / "models")
PACKAGES = ("lfdm_export", "lfdm_models")

#: Rooms of `lfdm_export`, from the bottom up: a module imports only from its own room or from earlier ones, also inside
#: functions; imports for type checkers are exempt. `lfdm_models` is below all rooms.
ROOMS = (
    "errors", "dependencies", "telemetry", "wording", "progress", "stages", "machine",
    "files", "sampling", "pictures", "checkpoints", "ops", "rewrite", "graphs", "bundle", "reference", "engines",
    "quantize", "export", "generate", "bulk", "parity", "protocol", "batching", "client", "serving", "web",
    "evaluation", "recipe", "cli",
)  # fmt: skip
#: Former module names, kept for other projects; this project does not import them.
FORMER = ("bundle_writer", "media", "preprocess")
#: Modules of `lfdm_models` with plain facts, which import no network.
FACTS = (
    "lfdm_models.command_line", "lfdm_models.config", "lfdm_models.labels", "lfdm_models.memory",
    "lfdm_models.paths", "lfdm_models.pictures", "lfdm_models.schedule", "lfdm_models.wording",
)  # fmt: skip

#: Packages outside the core's dependencies; no light module may import them.
OPTIONAL = (
    "aiohttp", "av", "cv2", "diffusers", "einops", "fastapi", "gradio", "grpc", "onnx", "onnxruntime",
    "onnxruntime_ep_nv_tensorrt_rtx", "onnxscript", "openvino", "polygraphy", "pyarrow", "ray", "safetensors",
    "starlette", "tensorrt", "tensorrt_rtx_bindings", "tokenizers", "torch", "transformers", "tritonclient", "uvicorn",
)  # fmt: skip

#: Modules that may import optional packages at the top level; all others must not.
HEAVY = (
    "lfdm_export.checkpoints.load",
    "lfdm_export.checkpoints.model_folder",
    "lfdm_export.checkpoints.training_facts",
    "lfdm_export.checkpoints.weight_files",
    "lfdm_export.engines.pytorch",
    "lfdm_export.evaluation.evaluate",
    "lfdm_export.evaluation.held_out",
    "lfdm_export.evaluation.measure",
    "lfdm_export.evaluation.measures",
    "lfdm_export.evaluation.video_features",
    "lfdm_export.export.bundle_export",
    "lfdm_export.export.precisions",
    "lfdm_export.graphs.bodies",
    "lfdm_export.graphs.matching",
    "lfdm_export.graphs.openvino_quantized",
    "lfdm_export.graphs.policy",
    "lfdm_export.graphs.stored",
    "lfdm_export.graphs.trace",
    "lfdm_export.graphs.typed",
    "lfdm_export.ops",
    "lfdm_export.parity.simulate",
    "lfdm_export.quantize",
    "lfdm_export.recipe.card",
    "lfdm_export.recipe.make",
    "lfdm_export.recipe.run",
    "lfdm_export.reference.pytorch",
    "lfdm_export.rewrite",
    # Required by a server; imported when one starts.
    "lfdm_export.serving.front",
    # Run only inside Triton, whose package they import.
    "lfdm_export.serving.models",
    "lfdm_export.web.app",
    "lfdm_export.web.connections",
    "lfdm_export.web.description",
    "lfdm_export.web.guard",
    "lfdm_export.web.page.layout",
    "lfdm_export.web.page.site",
)
#: The only modules of `lfdm_models` without optional packages.
LIGHT_NETWORKS = (
    "lfdm_models", "lfdm_models.command_line", "lfdm_models.config", "lfdm_models.labels", "lfdm_models.patience",
    "lfdm_models.pictures", "lfdm_models.pictures.errors", "lfdm_models.pictures.formats",
    "lfdm_models.pictures.headers",
    "lfdm_models.pictures.raster", "lfdm_models.pictures.timed", "lfdm_models.schedule", "lfdm_models.training",
    "lfdm_models.training.arguments",
    "lfdm_models.training.characters", "lfdm_models.training.cli", "lfdm_models.training.conditions",
    "lfdm_models.training.drawing", "lfdm_models.training.draws", "lfdm_models.training.errors",
    "lfdm_models.training.face", "lfdm_models.training.figure", "lfdm_models.training.head",
    "lfdm_models.training.landmarks", "lfdm_models.training.layouts", "lfdm_models.training.logs",
    "lfdm_models.training.motions", "lfdm_models.training.pictures", "lfdm_models.training.procedural",
    "lfdm_models.training.settings", "lfdm_models.wording",
)  # fmt: skip

BLOCKER = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Block())
"""

#: Imports each module in a forked process; only Python and the core's requirements are loaded once for all.
EACH_ALONE = """
import importlib, json, os, traceback
import numpy, PIL.Image, rich.console

def told_by_a_child(module):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with open(writing, "w") as pipe:
            try:
                importlib.import_module(module)
            except BaseException:
                pipe.write(traceback.format_exc())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    return told or (f"it ended with status {{status}}" if status else "")

print(json.dumps({{module: told_by_a_child(module) for module in {modules!r}}}))
"""


def below(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def modules() -> dict[str, Path]:
    found = {}
    for source, package in zip(SOURCES, PACKAGES, strict=True):
        for path in sorted((source / package).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> int:
    """Return a module's position in the order; `lfdm_models` is below all rooms."""
    package, _, inside = module.partition(".")
    return -1 if package == "lfdm_models" else (*ROOMS, *FORMER).index(inside.partition(".")[0])


def for_type_checkers(tree: ast.Module) -> set[ast.AST]:
    """Return all nodes below ``if TYPE_CHECKING:``."""
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    return {inside for guard in guards for inside in ast.walk(guard)}


def own_imports(path: Path, known: set[str]) -> Iterator[str]:
    """Yield every module of this project that a file imports at run time, also in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    free = for_type_checkers(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        if node not in free:
            yield from (name for name in names if name.partition(".")[0] in PACKAGES)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent)


MODULES = modules()
LIGHT = [
    name
    for name in MODULES
    if (name in LIGHT_NETWORKS if below(name, "lfdm_models") else not any(below(name, heavy) for heavy in HEAVY))
]


def test_every_module_has_a_room():
    inside = {name.partition(".")[2].partition(".")[0] for name in MODULES if below(name, "lfdm_export")}
    assert inside - {""} == {*ROOMS, *FORMER}


def test_imports_point_one_way():
    wrong = []
    for module, path in MODULES.items():
        if module == "lfdm_export":
            continue  # the facade has its own test
        for imported in own_imports(path, set(MODULES)):
            if imported == "lfdm_export":
                continue  # `from lfdm_export import __version__`; its other names are lazy
            if room_of(imported) > room_of(module):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_former_names_lead_to_the_same_things():
    from lfdm_export import media, preprocess
    from lfdm_export.bundle import Bundle
    from lfdm_export.bundle.reader import Bundle as Reader
    from lfdm_export.bundle.writer import BundleWriter
    from lfdm_export.bundle_writer import BundleWriter as Former
    from lfdm_export.pictures import clip_files, clips
    from lfdm_export.pictures import preprocess as preparation

    assert (Bundle, Former) == (Reader, BundleWriter)
    assert (media.load_clip, media.save_clip) == (clips.load_clip, clip_files.save_clip)
    assert all(getattr(preprocess, name) is getattr(preparation, name) for name in preprocess.__all__)


def test_facts_import_no_network():
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if any(below(module, fact) for fact in FACTS)
        for imported in own_imports(path, set(MODULES))
        if not any(below(imported, fact) for fact in FACTS)
    ]
    assert wrong == []


def test_networks_never_import_the_toolkit():
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if below(module, "lfdm_models")
        for imported in own_imports(path, set(MODULES))
        if below(imported, "lfdm_export")
    ]
    assert wrong == []


def test_imports_form_no_circle():
    known = set(MODULES)
    graph = {module: set(own_imports(path, known)) & known for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_facade_loads_only_errors_and_turns_telemetry_off():
    loaded = run_python("import sys, lfdm_export; print(sorted(m for m in sys.modules if m.startswith('lfdm_')))")
    assert loaded.returncode == 0, loaded.stderr
    assert ast.literal_eval(loaded.stdout) == ["lfdm_export", "lfdm_export.errors", "lfdm_export.telemetry"]


def test_the_facade_names_are_real():
    import lfdm_export

    for name, module in lfdm_export._LAZY.items():
        path = MODULES.get(module)
        assert path is not None, f"lfdm_export.{name} points at {module}, which does not exist"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}, name
        assert name in dir(lfdm_export)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lfdm_export.no_such_name


@pytest.fixture(scope="module")
def imports() -> dict[str, str]:
    """Output of importing each light module on a bare machine: empty, or the error."""
    done = run_python(BLOCKER.format(optional=set(OPTIONAL)) + EACH_ALONE.format(modules=LIGHT))
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_on_a_bare_machine(module: str, imports: dict[str, str]):
    assert imports[module] == ""


def test_the_blocker_blocks():
    done = run_python(BLOCKER.format(optional=set(OPTIONAL)) + "import torch\n")
    assert done.returncode != 0
    assert "blocked: torch" in done.stderr


def test_models_is_no_import_name():
    done = run_python("import lfdm_models, importlib.util; assert importlib.util.find_spec('models') is None")
    assert done.returncode == 0, done.stderr

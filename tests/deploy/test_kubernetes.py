"""deploy/kubernetes and the chart: they say the same, and a server that is started as they say does what the probes take it to do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pushstep.proto.environment import OF_CLIENTS, SETTINGS
from pushstep.server.config import Config
from tests.deploy.test_deploy import README, environment, of, options_of
from tests.support.deployments.deployed import (
    DEPLOY,
    deployed,
    make_certificate,
    make_token,
    moved,
)
from tests.support.deployments.ports import free_port
from tests.support.servers.harness import wait_until
from tests.support.source_tree import ROOT

MANIFESTS = DEPLOY / "kubernetes"
CHART = DEPLOY / "helm" / "pushstep"
EVERY_VALUE = DEPLOY / "helm" / "every_value.yaml"
BIN = Path(sys.executable).parent
Objects = dict[tuple[str, str], dict[str, Any]]


def objects(text: str) -> Objects:
    found = [each for each in yaml.safe_load_all(text) if each]
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in found}
    assert len(by_name) == len(found)
    return by_name


def run(program: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    # no file of its own outside, and no cluster
    env = os.environ | {"KUBECONFIG": os.devnull, "HELM_CACHE_HOME": os.devnull}
    done = subprocess.run(
        [BIN / program, *arguments], capture_output=True, text=True, env=env, cwd=cwd, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(*options: str | Path, release: str = "pushstep", namespace: str = "pushstep") -> Objects:
    return objects(run("helm", "template", release, CHART, "--namespace", namespace, *options))


PLAIN: Objects = {
    name: each
    for path in sorted(MANIFESTS.glob("*.yaml"))
    if path.name not in {"kustomization.yaml", "flights_workers.yaml"}
    for name, each in objects(path.read_text()).items()
}
SERVER_SET = PLAIN["StatefulSet", "pushstep"]
POD = SERVER_SET["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
JOB = objects((MANIFESTS / "flights_workers.yaml").read_text())["Job", "flights"]
WORKER_POD = JOB["spec"]["template"]["spec"]
(WORKER,) = WORKER_POD["containers"]
ENV = {each["name"]: each["value"] for each in CONTAINER["env"]}
PROBES = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}


# ---- the same in all forms ----


@pytest.mark.helm
def test_the_chart_gives_the_plain_manifests_by_default() -> None:
    kustomized = objects(run("kubectl", "kustomize", MANIFESTS))
    assert kustomized == PLAIN
    namespace = PLAIN["Namespace", "pushstep"]
    assert {**rendered(), ("Namespace", "pushstep"): namespace} == PLAIN


@pytest.mark.helm
def test_every_value_of_the_chart_does_something(tmp_path: Path) -> None:
    """Each alone changes what is rendered."""
    by_default, other = (
        yaml.safe_load((CHART / "values.yaml").read_text()),
        yaml.safe_load(EVERY_VALUE.read_text()),
    )
    assert leaves(by_default).keys() == leaves(other).keys()
    alone_or_not = {False: rendered(), True: rendered("--set", "shards=2")}
    for path, value in leaves(other).items():
        of_ranks = path in {"linkTokenSecret", "rendezvousPort"}
        *above, name = path.split(".")
        alone: dict[str, Any] = {name: not value if path == "networkPolicy.enabled" else value}
        for outer in reversed(above):
            alone = {outer: alone}
        (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
        options = ["--set", "shards=2"] if of_ranks else []
        assert rendered("--values", tmp_path / "alone.yaml", *options) != alone_or_not[of_ranks], path
    found = rendered("--values", EVERY_VALUE, release="other", namespace="training")
    assert not any(kind == "PodDisruptionBudget" for kind, _ in found)
    off = rendered("--set", "networkPolicy.enabled=false")
    assert set(PLAIN) - set(off) == {("NetworkPolicy", "pushstep"), ("Namespace", "pushstep")}
    (container,) = found["StatefulSet", "other"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1].endswith("-m pushstep.server --device cuda")
    assert container["resources"]["limits"] == {"memory": "96Gi", "nvidia.com/gpu": 1}
    (container,) = rendered("--set", "gpus=1")["StatefulSet", "pushstep"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["args"] == ["--device", "cuda"]
    assert {each["metadata"]["namespace"] for each in found.values()} == {"training"}


def leaves(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """What can be set, by its path; what is a table of the user's own is one value."""
    own = {"resources", "env", "workerLabels", "operatorLabels", "podAnnotations", "nodeSelector", "affinity"}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name not in own:
            found |= leaves(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


@pytest.mark.helm
@pytest.mark.parametrize(
    "given",
    ["replicas=2", "env.PUSHSTEP_INSECURE=true", "env.PUSHSTEP_TLS_CERT=none", "env.PUSHSTEP_TLS_CLIENT_CA=ca",
     "maxBytes=1Gi", "tokensSecret=", "networkPolicy.workerLabels=null", "persistence.accessMode=ReadWriteMany",
     "terminationGracePeriodSeconds=10"],
)  # fmt: skip
def test_the_chart_refuses_what_cannot_be_meant(given: str) -> None:
    done = subprocess.run(
        [BIN / "helm", "template", "pushstep", CHART, "--set-json" if "null" in given else "--set-string"
         if not given[-1].isdigit() else "--set", given],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert given.split("=")[0].split(".")[-1].removesuffix("=") in done.stderr


def test_versions_are_the_package_s() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version[1]
    assert CONTAINER["image"] == f"pushstep-server:{version[1]}"
    assert WORKER["image"] == f"pushstep-worker:{version[1]}"


# ---- what they say ----


@pytest.mark.parametrize(
    ("pod", "container", "image"), [(POD, CONTAINER, "server"), (WORKER_POD, WORKER, "worker")]
)
def test_a_pod_is_as_restricted_as_the_namespace_asks(
    pod: dict[str, Any], container: dict[str, Any], image: str
) -> None:
    """The rules of Kubernetes's Pod Security Standard `restricted`, and a read-only root file system."""
    assert PLAIN["Namespace", "pushstep"]["metadata"]["labels"] == {
        "pod-security.kubernetes.io/enforce": "restricted"
    }
    uid, gid = map(int, of(image, "USER")[-1].split(":"))
    security = pod["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (uid, gid, gid)
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "initContainers"} & set(pod)
    assert all({"emptyDir", "secret"} & set(volume) for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False
    # the variables of the service `pushstep` would all begin as settings do
    assert pod["enableServiceLinks"] is False
    assert {"memory"} <= set(container["resources"]["limits"])


def test_there_is_one_server_and_its_data_stay() -> None:
    spec = SERVER_SET["spec"]
    assert spec["replicas"] == 1
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]]["mountPath"] == environment("server")["PUSHSTEP_DATA"]
    assert ("Service", spec["serviceName"]) in PLAIN
    assert PLAIN["Service", spec["serviceName"]]["spec"]["clusterIP"] == "None"
    # a secret that is renewed shows in whole folders only
    assert not any("subPath" in mount for mount in mounts.values())


def test_the_server_is_given_tls_and_tokens_and_room() -> None:
    assert {name.removeprefix("PUSHSTEP_").lower() for name in ENV} <= set(SETTINGS)
    assert not any("INSECURE" in name for name in ENV)
    assert "args" not in CONTAINER
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    for name in ("PUSHSTEP_TLS_CERT", "PUSHSTEP_TLS_KEY", "PUSHSTEP_TOKENS_FILE"):
        assert volumes[mounts[str(Path(ENV[name]).parent)]]["secret"]["defaultMode"] == 0o440
    bounds = sum(int(value) for name, value in ENV.items() if name.endswith("_BYTES"))
    copy = int(ENV["PUSHSTEP_MAX_BYTES"])
    limit = CONTAINER["resources"]["limits"]["memory"]
    assert limit == "8Gi"
    assert bounds + copy + (1 << 30) <= 8 << 30
    assert POD["terminationGracePeriodSeconds"] > Config.model_fields["drain_s"].default


def test_ports_are_those_of_the_image_wherever_they_are_named() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert [str(port) for port in ports.values()] == of("server", "EXPOSE")[0].split()
    for name in ("GRPC", "HTTP"):
        key = {"GRPC": "grpc", "HTTP": "https"}[name]
        assert environment("server")[f"PUSHSTEP_{name}"] == f"0.0.0.0:{ports[key]}"
    for service in ("pushstep", "pushstep-headless"):
        spec = PLAIN["Service", service]["spec"]
        assert {port["name"]: port["port"] for port in spec["ports"]} == ports
        assert all(port["targetPort"] == port["name"] for port in spec["ports"])
        assert spec["selector"] == SERVER_SET["spec"]["selector"]["matchLabels"]
    let_in = [
        port["port"]
        for rule in PLAIN["NetworkPolicy", "pushstep"]["spec"]["ingress"]
        for port in rule["ports"]
    ]
    assert set(let_in) == set(ports)
    assert (
        SERVER_SET["spec"]["template"]["metadata"]["labels"] == SERVER_SET["spec"]["selector"]["matchLabels"]
    )


def test_the_workers_are_let_through_and_told_what_they_know() -> None:
    (workers, operators) = PLAIN["NetworkPolicy", "pushstep"]["spec"]["ingress"]
    assert workers["from"] == [
        {"podSelector": {"matchLabels": JOB["spec"]["template"]["metadata"]["labels"]}}
    ]
    assert len(operators["from"]) == 2
    options = options_of(sys.executable, "-m", "pushstep.client.demo.worker")
    given = dict(argument.split("=", 1) for argument in WORKER["args"])
    assert set(given) <= options
    assert given["--server"] == "pushstep:7070"
    assert int(given["--of"]) == JOB["spec"]["completions"]
    assert {each["name"].removeprefix("PUSHSTEP_").lower() for each in WORKER["env"]} <= set(OF_CLIENTS)
    mounts = [mount["mountPath"] for mount in WORKER["volumeMounts"]]
    assert given["--token"].removeprefix("@").rpartition("/")[0] in mounts


@pytest.mark.helm
@pytest.mark.openssl
def test_the_readme_s_commands_make_the_secrets_that_are_mounted(tmp_path: Path) -> None:
    """By kubectl itself, which asks no cluster for that."""
    secrets = tmp_path / "deploy" / "secrets"
    secrets.parent.mkdir()
    make_certificate(secrets, "pushstep")
    for role in ("worker", "operator"):
        make_token(secrets, role)
    commands = re.findall(r"^kubectl (.* create secret .*) \| kubectl apply -f -$", README, re.MULTILINE)
    made = objects("---\n".join(run("kubectl", *shlex.split(command), cwd=tmp_path) for command in commands))
    keys = {name: set(secret["data"]) for (_, name), secret in made.items()}
    assert keys == {
        "pushstep-tls": {Path(ENV["PUSHSTEP_TLS_CERT"]).name, Path(ENV["PUSHSTEP_TLS_KEY"]).name},
        "pushstep-tokens": {Path(ENV["PUSHSTEP_TOKENS_FILE"]).name},
        "pushstep-worker": {"token", "ca.pem"},
        "pushstep-link": {"token", "ca.pem"},
    }
    mounted = {
        volume["secret"]["secretName"]
        for pod in (POD, WORKER_POD)
        for volume in pod["volumes"]
        if "secret" in volume
    }
    assert mounted == set(keys) - {"pushstep-link"}  # of several shards alone
    assert {each["metadata"]["namespace"] for each in made.values()} == {"pushstep"}


def test_the_readme_deletes_what_there_is() -> None:
    (listed,) = re.findall(r"^`kubectl -n pushstep delete (statefulset.*)`", README, re.MULTILINE)
    there = {f"{kind.lower()}/{name}" for kind, name in PLAIN if kind != "Namespace"}
    assert set(listed.split()) == there


# ---- what a server makes of it ----

# Its recovery takes as long as there is no file `go` beside its models.
SLOW = """
import sys, time
from pushstep.server.models import saved_models
from pushstep.server.__main__ import main
real = saved_models.model_folders
def slow(folder):
    while not (folder.parent / "go").exists():
        time.sleep(0.01)
    return real(folder)
saved_models.model_folders = slow
main()
"""


@pytest.mark.openssl
def test_probes_let_a_recovery_take_its_time_and_the_server_ends_within_the_grace(tmp_path: Path) -> None:
    """With the image's and the manifest's variables. No probe knows the CA, as the kubelet does not."""
    secrets, data = tmp_path / "secrets", tmp_path / "data"
    make_certificate(secrets, "pushstep", "127.0.0.1")
    make_token(secrets, "viewer")
    for key, name in {"tls.crt": "server.pem", "tls.key": "server.key"}.items():
        (secrets / key).symlink_to(name)
    ports = {"grpc": free_port(), "https": free_port()}
    places: dict[str, Path | str] = {
        "/run/secrets/tls": secrets, "/run/secrets/tokens": secrets, "/data": data,
        **{f":{port['containerPort']}": f":{ports[port['name']]}" for port in CONTAINER["ports"]},
    }  # fmt: skip
    set_up = {
        name: value for name, value in environment("server").items() if name.startswith("PUSHSTEP_")
    } | ENV
    env = {name: moved(value, places) for name, value in set_up.items()}

    def probe(name: str) -> bool:
        asked = PROBES[name]["httpGet"]
        url = f"{asked['scheme'].lower()}://127.0.0.1:{ports[asked['port']]}{asked['path']}"
        try:
            return 200 <= httpx.get(url, verify=False, trust_env=False, timeout=20).status_code < 400
        except httpx.TransportError:
            return False

    with deployed([sys.executable, "-c", SLOW], env, secrets, ports["https"]) as server:
        wait_until(lambda: probe("startup"), 60)
        assert probe("liveness")
        assert not probe("readiness")
        (data / "go").touch()
        assert f"grpc=0.0.0.0:{ports['grpc']} " in server.ready()
        assert all(map(probe, PROBES))
        assert server.status() == 401
        assert server.status("viewer") == 200
        server.stop(POD["terminationGracePeriodSeconds"])


def test_probes_are_patient() -> None:
    patience = {name: probe["periodSeconds"] * probe["failureThreshold"] for name, probe in PROBES.items()}
    assert patience["startup"] >= 600
    assert patience["liveness"] >= 120
    assert PROBES["startup"]["httpGet"] == PROBES["liveness"]["httpGet"]

"""What deploy/ has for shards: Compose, the chart and Slurm start the same job of torchrun, and it trains and comes back."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pushstep.client import TLS, connect
from pushstep.optim import Adagrad
from pushstep.proto.environment import SETTINGS
from tests.deploy.test_secured import _Loader
from tests.support.deployments.deployed import DEPLOY, make_certificate, make_token
from tests.support.deployments.ports import free_port
from tests.support.servers.harness import wait_until

OVERLAY: dict[str, Any] = yaml.load((DEPLOY / "compose.shards.yaml").read_text(), _Loader)
SCRIPT = DEPLOY / "slurm" / "pushstep.sh"
BIN = Path(sys.executable).parent
RANKS = {"server": 0, "rank-1": 1}
pytestmark = pytest.mark.openssl


def options(words: list[str]) -> dict[str, str]:
    """Of a torchrun command line: its options and their values, and under "" what it starts."""
    found: dict[str, str] = {}
    words = [part for word in words for part in word.split("=", 1)]
    assert words.pop(0) == "torchrun"
    while words[0].startswith("--"):
        found[words[0]] = words[1]
        del words[:2]
    return found | {"": " ".join(words)}


def of_slurm() -> dict[str, str]:
    (command,) = re.findall(r"exec (torchrun .*?)'", SCRIPT.read_text(), re.DOTALL)
    return options(shlex.split(command.replace("\\\n", " ")))


@pytest.mark.parametrize("service", RANKS)
def test_compose_starts_ranks_as_slurm_does(service: str) -> None:
    given = options(OVERLAY["services"][service]["entrypoint"])
    assert given.keys() == of_slurm().keys()
    assert given[""] == of_slurm()[""] == "-m pushstep.server"
    assert given["--nnodes"] == str(len(RANKS))
    assert given["--node-rank"] == str(RANKS[service])
    assert given["--master-addr"] == "server"
    for variable, value in OVERLAY["services"][service]["environment"].items():
        assert variable.removeprefix("PUSHSTEP_").lower() in SETTINGS
        assert value.split(":")[0] == service


@pytest.mark.helm
def test_the_chart_starts_ranks_as_slurm_does() -> None:
    done = subprocess.run(
        [BIN / "helm", "template", "pushstep", DEPLOY / "helm" / "pushstep", "--namespace", "n", "--set", "shards=3"],
        capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"HELM_CACHE_HOME": os.devnull},
    )  # fmt: skip
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    spec = found["StatefulSet", "pushstep"]["spec"]
    assert (spec["replicas"], spec["podManagementPolicy"]) == (3, "Parallel")
    (container,) = spec["template"]["spec"]["containers"]
    given = options(shlex.split(container["command"][-1].removeprefix("exec ")))
    assert given.keys() == of_slurm().keys()
    assert given["--nnodes"] == "3"
    grace_s = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(given["--shutdown-timeout"]) < grace_s
    # by the names of Pods, which are there before they are ready
    headless = found["Service", spec["serviceName"]]["spec"]
    assert headless["publishNotReadyAddresses"]
    assert given["--master-addr"] == f"pushstep-0.{spec['serviceName']}.n.svc"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["rendezvous"]) == given["--master-port"]
    env = {each["name"]: each for each in container["env"]}
    assert {name.removeprefix("PUSHSTEP_").lower() for name in env} - {"pod_name"} <= set(SETTINGS)
    assert env["PUSHSTEP_ADVERTISE"]["value"] == f"$(POD_NAME).{spec['serviceName']}.n.svc:{ports['grpc']}"
    # workers and operators come to rank 0
    selector = found["Service", "pushstep"]["spec"]["selector"]
    assert selector["statefulset.kubernetes.io/pod-name"] == "pushstep-0"
    policy = found["NetworkPolicy", "pushstep"]["spec"]
    among = [rule for rule in policy["ingress"] if {"port": "rendezvous", "protocol": "TCP"} in rule["ports"]]
    assert [rule["from"] for rule in among] == [
        [{"podSelector": {"matchLabels": spec["selector"]["matchLabels"]}}]
    ]
    assert any(rule.get("to") == among[0]["from"] for rule in policy["egress"])


# A cluster of two nodes on this host: `srun` runs its command once for each, with what Slurm sets there. Each has a port of its own.
SRUN = """#!/bin/sh
shift
for node in 0 1; do
    SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.1 port=$((PORT + 10 * node)) "$@" &
done
trap : TERM # which its children get as well
wait
wait
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """The Slurm script's job with TLS and tokens, and the port of rank 0."""
    secrets, fakes = tmp_path / "secrets", tmp_path / "bin"
    make_certificate(secrets, "localhost", "127.0.0.1")
    for role in ("operator", "worker"):
        make_token(secrets, role)
    fakes.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o700)
    port = free_port(neighbours=12)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PUSHSTEP_", "SLURM"))} | {
        "PATH": f"{fakes}:{BIN}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "PORT": str(port), "PUSHSTEP_PORT": str(port),
        "PUSHSTEP_DATA": str(tmp_path / "data"), "PUSHSTEP_UNIX": "", "PUSHSTEP_DURABILITY": "durable",
        "PUSHSTEP_PART_BYTES": "0",  # or this small model would lie in rank 0 alone
        "PUSHSTEP_TLS_CERT": str(secrets / "server.pem"), "PUSHSTEP_TLS_KEY": str(secrets / "server.key"),
        "PUSHSTEP_TOKENS_FILE": str(secrets / "tokens"), "PUSHSTEP_LINK_CA": str(secrets / "ca.pem"),
        "PUSHSTEP_LINK_TOKEN_FILE": str(secrets / "operator.token"),
    }  # fmt: skip
    process = subprocess.Popen(
        [SCRIPT], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process, port, secrets
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)


def server_of(rank: int, data: Path) -> int:
    """The process of one rank. ValueError if there is none, or another beside it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            env = dict(
                entry.split("=", 1)
                for entry in (folder / "environ").read_text(errors="replace").split("\0")
                if "=" in entry
            )
        except OSError:
            continue
        if (env.get("PUSHSTEP_DATA"), env.get("RANK")) == (str(data), str(rank)):
            found.append(int(folder.name))
    (pid,) = found
    return pid


def test_a_job_of_two_nodes_trains_and_comes_back_when_a_rank_is_killed(
    job: tuple[subprocess.Popen[str], int, Path], tmp_path: Path
) -> None:
    _, port, secrets = job
    token = (secrets / "worker.token").read_text().strip()
    torch.manual_seed(0)
    remote, local = (torch.nn.Parameter(torch.ones(300, 100)) for _ in range(2))
    alone = Adagrad([local], lr=0.1)
    with connect(
        f"127.0.0.1:{port}", model="m", worker="w", token=token, tls=TLS(ca=secrets / "ca.pem"), wait_s=120
    ) as session:
        optimizer = session.attach(Adagrad([remote], lr=0.1))
        for step in range(4):
            if step == 2:
                os.kill(server_of(1, tmp_path / "data"), signal.SIGKILL)
            gradient = torch.randn(300, 100)
            remote.grad, local.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            alone.step()
            assert torch.equal(remote, local), step
    wait_until(lambda: (tmp_path / "data" / "rank-1").is_dir(), 30)

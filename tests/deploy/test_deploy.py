"""deploy/: no image is built here, so what can be held without one is held: facts, options, and the shell inside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pushstep.proto.environment import OF_CLIENTS, SETTINGS
from tests.support.deployments.deployed import DEPLOY
from tests.support.deployments.ports import free_port
from tests.support.source_tree import ROOT

README = (DEPLOY / "README.md").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WATCHERS = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["watch"]}
WORKERS = {name: s for name, s in SERVICES.items() if name != "server" and name not in WATCHERS}
BASE_OF = {"server": ["runtime", "server"], "worker": ["runtime", "worker"]}


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile as (instruction, arguments) by stage, in order; '' is what precedes the first FROM."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace(
        "\\\n", " "
    )
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            name = arguments.split(" AS ")[1]
            found[name] = []
        found[name].append((instruction, arguments.strip()))
    return found


STAGES = stages()
INSTRUCTIONS = [pair for stage in STAGES.values() for pair in stage]


def of(image: str, instruction: str) -> list[str]:
    """The arguments of one instruction in the stages that make up an image."""
    return [args for stage in BASE_OF[image] for name, args in STAGES[stage] if name == instruction]


def environment(image: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for args in of(image, "ENV") for pair in args.split())


def healthchecks() -> dict[str, list[str]]:
    (in_image,) = of("server", "HEALTHCHECK")
    in_compose = SERVICES["server"]["healthcheck"]["test"]
    assert in_compose[0] == "CMD"
    return {"/healthz": json.loads(in_image.split(" CMD ")[1]), "/readyz": in_compose[1:]}


def options_of(*command: str) -> set[str]:
    env = os.environ | {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", done.stdout))


@pytest.fixture(scope="module")
def server_options() -> set[str]:
    return options_of(str(Path(sys.executable).parent / "pushstep-server"))


@pytest.fixture(scope="module")
def worker_options() -> set[str]:
    return options_of(sys.executable, *json.loads(of("worker", "ENTRYPOINT")[-1])[1:])


# ---- the images ----


@pytest.mark.parametrize("image", BASE_OF)
def test_an_image_runs_one_process_as_a_fixed_user_that_is_not_root(image: str) -> None:
    assert re.fullmatch(r"[1-9]\d{3,4}:[1-9]\d{3,4}", of(image, "USER")[-1])
    assert of(image, "STOPSIGNAL") == ["SIGTERM"]
    assert not of(image, "CMD")
    (entrypoint,) = of(image, "ENTRYPOINT")
    assert isinstance(json.loads(entrypoint), list)
    assert any(args.startswith("org.opencontainers.image.title=") for args in of(image, "LABEL"))


def test_the_server_image() -> None:
    assert list(STAGES)[-1] == "server", "the last stage is what a build without --target makes"
    assert json.loads(of("server", "ENTRYPOINT")[0]) == ["pushstep-server"]
    assert of("server", "EXPOSE") == ["7070 7071"]
    assert json.loads(of("server", "VOLUME")[0]) == ["/data"]
    uid = of("server", "USER")[-1].split(":")[0]
    assert f"--uid {uid} " in of("server", "RUN")[0]
    assert f"uid {uid}" in README


@pytest.mark.parametrize(("image", "roots"), [("server", ("/data", "/tmp")), ("worker", ("/tmp",))])
def test_what_is_written_goes_to_writable_places(image: str, roots: tuple[str, ...]) -> None:
    homes = {k: v for k, v in environment(image).items() if re.search(r"HOME$|_DIR$|CONFIGDIR$|_DATA$", k)}
    assert {"HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"} <= set(homes)
    assert all(path.startswith(roots) for path in homes.values()), homes


def test_every_install_is_constrained_by_the_one_file() -> None:
    runs = [args for name, args in INSTRUCTIONS if name == "RUN"]
    commands = [
        part for run in runs for part in re.split(r";|&&", run) if re.search(r"\bpip\b.* install ", part)
    ]
    assert len(commands) >= 3
    assert all("--constraint /opt/constraints.txt" in command for command in commands), commands
    assert any("source=constraints.txt" in run and "> /opt/constraints.txt" in run for run in runs)
    assert not re.search(r"torch[=<>~]=?\d", " ".join(runs)), "torch's version is the constraints' to say"
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "README.md"])
def test_no_host_is_named_but_this_one(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert set(re.findall(r"\w+://([^/:\s'\"]+)", text)) <= {"127.0.0.1", "bucket"}
    assert not re.search(r"\b[\w-]+\.(com|org|io|dev|net)/", text)
    images = [args for instruction, args in INSTRUCTIONS if instruction == "FROM"]
    images += [s["image"] for name, s in SERVICES.items() if "image" in s and name not in WATCHERS]
    assert not any("/" in image for image in images), images


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for name, args in INSTRUCTIONS
        if name == "COPY" and not args.startswith("--from")
        for source in args.split()[:-1]
    }
    assert copied | {"constraints.txt"} == allowed
    assert all((ROOT / name).exists() for name in allowed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["package-dir"].values()) <= copied


TORCH_CHOICES = [  # TORCH, TORCH_INDEX, the build that the index serves, what the build says or None for success
    ("cpu", "", "cpu", None),
    ("cuda", "", "cuda", None),
    ("cpu", "file:///an index", "cpu", None),
    ("cpu", "", "cuda", "TORCH=cpu, but the index served a cuda build"),
    ("cuda", "", "cpu", "TORCH=cuda, but the index served a cpu build"),
    ("gpu", "", "cuda", "TORCH is 'gpu'; it must be cpu or cuda"),
]


@pytest.mark.parametrize(("wanted", "index", "served", "refusal"), TORCH_CHOICES)
def test_the_choice_of_torch(
    tmp_path: Path, wanted: str, index: str, served: str, refusal: str | None
) -> None:
    """The venv stage's own shell, with a pip that installs nothing of torch but its version file."""
    version = f"cuda = {'13.0' if served == 'cuda' else None!r}"
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "pip").write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "site = next(pathlib.Path(sys.argv[2]).parents[1].glob('lib/python*/site-packages')) / 'torch'\n"
        "site.mkdir(exist_ok=True)\n"
        f"(site / 'version.py').write_text({version!r})\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv[3:]) + '\\n')\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    script = re.sub(r"--mount=\S+", "", next(args for name, args in STAGES["venv"] if name == "RUN"))
    script = script.replace("/tmp/constraints.in", str(ROOT / "constraints.txt")).replace(
        "/opt/", f"{tmp_path}/"
    )
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "TORCH": wanted, "TORCH_INDEX": index}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=env, timeout=60)

    if refusal is not None:
        assert done.returncode == 1
        assert refusal in done.stderr
        return
    assert done.returncode == 0, done.stderr
    constrained = ["install", "--constraint", f"{tmp_path}/constraints.txt"]
    assert [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()] == [
        [*constrained, "--no-deps", *(["--index-url", index] if index else []), "torch"],
        [*constrained, "torch"],
    ]
    kept = set((tmp_path / "constraints.txt").read_text().splitlines())
    dropped = set((ROOT / "constraints.txt").read_text().splitlines()) - kept
    assert all(line.startswith("triton==") for line in dropped)


# ---- health ----


@pytest.fixture
def probed() -> Iterator[tuple[int, dict[str, int]]]:
    """A server on a free port, and the status that it gives to each path."""
    statuses: dict[str, int] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, statuses
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_health_check_says_what_the_server_says(
    probed: tuple[int, dict[str, int]], path: str, status: int, healthy: bool
) -> None:
    port, statuses = probed
    statuses[path] = status
    program, *arguments = healthchecks()[path]
    assert program == "python"
    assert "127.0.0.1:7071" in arguments[-1]
    here = [argument.replace(":7071/", f":{port}/") for argument in arguments]
    env = os.environ | {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    done = subprocess.run([sys.executable, *here], capture_output=True, env=env, timeout=30)
    assert (done.returncode == 0) is healthy


# ---- compose ----


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert service["mem_limit"]
    assert service["networks"] == ["training"]
    assert not {"privileged", "network_mode", "user", "cap_add", "devices", "pid"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    if name in WATCHERS:
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        return
    build = service["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert build["target"] in BASE_OF
    declared = {args.split("=")[0] for instruction, args in INSTRUCTIONS if instruction == "ARG"}
    assert set(build["args"]) <= declared


def test_the_server_service() -> None:
    server = SERVICES["server"]
    ports = [port.split(":") for port in server["ports"]]
    assert [(host, inside) for host, _, inside in ports] == [("127.0.0.1", "7070"), ("127.0.0.1", "7071")]
    assert " ".join(inside for _, _, inside in ports) == of("server", "EXPOSE")[0]
    assert server["volumes"] == ["data:/data"]
    assert "data" in COMPOSE["volumes"]
    assert server["stop_grace_period"] == "2m"
    assert "`stop_grace_period` (2 minutes)" in README


def test_only_the_server_is_published_and_has_a_volume() -> None:
    assert not any({"ports", "volumes"} & set(service) for service in WORKERS.values())


def test_the_server_refuses_before_the_kernel_kills() -> None:
    gib = 1 << 30
    bounds = [
        int(value) for name, value in SERVICES["server"]["environment"].items() if name.endswith("_BYTES")
    ]
    assert bounds == [gib, gib]
    assert SERVICES["server"]["mem_limit"] == "4g", "2 GiB of bounds, a copy of a model, and the process"
    assert "1 GiB each of 4" in README


def test_insecure_is_said_in_the_open() -> None:
    """The option is on the command line of compose.yaml, where it is explained, and hidden in no image."""
    assert "--insecure" in SERVICES["server"]["command"]
    assert not any("insecure" in args.lower() for _, args in INSTRUCTIONS)
    assert not any("INSECURE" in str(service.get("environment", "")) for service in SERVICES.values())


def test_the_workers_cover_the_data_once_each() -> None:
    settings = []
    for service in WORKERS.values():
        command = service["command"]
        settings.append(dict(zip(command[::2], command[1::2], strict=True)))
        assert service["depends_on"] == {"server": {"condition": "service_healthy"}}
        assert service["build"]["target"] == "worker"
    assert len({s["--worker"] for s in settings}) == len(settings) == 2
    assert sorted(int(s["--index"]) for s in settings) == list(range(len(settings)))
    assert {s["--of"] for s in settings} == {str(len(settings))}
    assert {s["--server"] for s in settings} == {"server:7070"}
    assert len({s["--model"] for s in settings}) == 1


# ---- what the programs know ----


def server_commands() -> list[list[str]]:
    """The server's command in compose.yaml and in every YAML block of the README."""
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    assert blocks
    return [SERVICES["server"]["command"], *(block["services"]["server"]["command"] for block in blocks)]


@pytest.mark.parametrize("command", server_commands(), ids=" ".join)
def test_the_server_knows_the_options_it_is_given(server_options: set[str], command: list[str]) -> None:
    given = {word.split("=")[0] for word in command if word.startswith("--")}
    assert given <= server_options


def test_the_server_knows_the_variables_it_is_given(server_options: set[str]) -> None:
    named = {name for name in environment("server") if name.startswith("PUSHSTEP_")}
    named |= set(SERVICES["server"]["environment"])
    named |= set(re.findall(r"PUSHSTEP_[A-Z]+(?:_[A-Z]+)*", README))
    named -= {f"PUSHSTEP_{name.upper()}" for name in set(OF_CLIENTS) - set(SETTINGS)}
    assert named >= {"PUSHSTEP_DATA", "PUSHSTEP_GRPC", "PUSHSTEP_HTTP"}
    as_options = {"--" + name.removeprefix("PUSHSTEP_").lower().replace("_", "-") for name in named}
    assert as_options <= server_options


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_knows_the_options_it_is_given(worker_options: set[str], name: str) -> None:
    assert set(WORKERS[name]["command"][::2]) <= worker_options


@pytest.mark.timeout(600)
def test_what_the_image_and_compose_say_starts_a_server_and_stops_it(tmp_path: Path) -> None:
    """The image's variables, compose's variables and command: both health checks pass, SIGTERM ends with 0."""
    set_up = environment("server") | SERVICES["server"]["environment"]
    ports = {"7070": str(free_port()), "7071": str(free_port())}
    here = {name: re.sub(r"^/data", str(tmp_path), value) for name, value in set_up.items() if name != "PATH"}
    here = {
        name: re.sub(r":(707\d)$", lambda port: f":{ports[port[1]]}", value) for name, value in here.items()
    }
    program = Path(sys.executable).parent / json.loads(of("server", "ENTRYPOINT")[0])[0]
    server = subprocess.Popen([program, *SERVICES["server"]["command"]], env=os.environ | here)
    try:
        deadline = time.monotonic() + 300  # the kernels are compiled anew, beside whatever the machine does
        for path in ("/healthz", "/readyz"):
            check = [
                argument.replace(":7071/", f":{ports['7071']}/") for argument in healthchecks()[path][1:]
            ]
            while subprocess.run([sys.executable, *check], capture_output=True, timeout=30).returncode != 0:
                assert server.poll() is None, "the server ended; its message is above"
                assert time.monotonic() < deadline, f"{path} did not answer 200 in time"
                time.sleep(1.0)  # each check is a process, beside a server that starts
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()

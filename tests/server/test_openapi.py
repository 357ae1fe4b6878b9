"""The REST interface is what its description says, and the committed description is this code's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pushstep.server.operator_door.openapi import FILE
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import add_hook, take_snapshot
from tests.support.workers.wire import created

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
DELETE_MODEL = "delete_model_v1_models__m__delete"
# Whether a rule has a hyperparameter, or torch a scheduler of such arguments, is more than a schema says.
NOT_CHECKED = "positive_data_acceptance"
# What is too long for its field may be too long for a request.
TOO_LARGE = """
[checks.negative_data_rejection]
expected-statuses = ["400", "404", "405", "406", "409", "413", "415", "422", "5xx"]

"""


def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def test_the_committed_description_is_fresh(server: RunningServer) -> None:
    served = server.rest("GET", "/openapi.json").json()
    assert served == described(), "run: python -m pushstep.server.operator_door"


def test_every_error_has_the_one_shape_and_every_model_may_be_missing() -> None:
    for path, operations in described()["paths"].items():
        for method, operation in operations.items():
            problems = {status for status in operation["responses"] if int(status) >= 400}
            assert problems >= {"400", "403", "408", "500", "503"}, (method, path)
            if "{m}" in path:
                assert problems >= {"404", "409"}, (method, path)
    for name, response in described()["components"]["responses"].items():
        assert list(response["content"]) == ["application/problem+json"], name
    patch = described()["paths"]["/v1/models/{m}/param-groups/{index}"]["patch"]
    assert "412" in patch["responses"]


def run_schemathesis(
    server: RunningServer, folder: Path, examples: int, *options: str, **names: str | int
) -> None:
    folder.mkdir()
    lines = "".join(f'"path.{name}" = {json.dumps(value)}\n' for name, value in names.items())
    (folder / "schemathesis.toml").write_text(f"{TOO_LARGE}[parameters]\n{lines}")
    command = [SCHEMATHESIS, "run", FILE, "--url", f"http://{server.http}", "--seed", "1", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(examples)]
    command += ["--exclude-checks", NOT_CHECKED, "--warnings", "off", "--suppress-health-check", "all"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def check(data: Path, examples: int) -> None:
    """Every operation, on a model that has one of everything and on one that is not there."""
    with running_server(data) as server:
        created(server, "m")
        snapshot = take_snapshot(server, "m")["id"]
        hook = add_hook(server, "m", "json_log", "step_post", {"every": 100})["id"]
        there: dict[str, str | int] = {
            "m": "m",
            "name": "bias",
            "worker": "owner",
            "snapshot": snapshot,
            "hook_id": hook,
            "index": 1,
        }
        others = ("--exclude-operation-id", DELETE_MODEL)
        run_schemathesis(server, data / "there", examples, *others, **there)
        run_schemathesis(server, data / "missing", examples // 2, **dict.fromkeys(there, "nothing"))
        run_schemathesis(server, data / "gone", 5, "--include-operation-id", DELETE_MODEL, m="m")
        assert server.stop() == 0
        log = server.log.read_text()
        assert "internal error" not in log
        assert "Traceback" not in log


def test_no_answer_is_another_than_described(data: Path) -> None:
    check(data, 12)


@pytest.mark.soak
def test_no_answer_is_another_than_described_at_length(data: Path) -> None:
    check(data, 1000)

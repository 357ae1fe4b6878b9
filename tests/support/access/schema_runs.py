"""schemathesis: the description of the REST interface, and requests that it makes up of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pushstep.server.operator_door.openapi import FILE
from tests.support.servers.harness import RunningServer
from tests.support.source_tree import ROOT

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
DELETE_MODEL = "delete_model_v1_models__m__delete"
# Whether a rule has a hyperparameter, or torch a scheduler of such arguments, is more than a schema says.
NOT_CHECKED = "positive_data_acceptance"
# By the first the command loads its own checks; the second says to these whose requests they look at, empty for nobody's.
HOOKS_VARIABLE, ROLE_VARIABLE = "SCHEMATHESIS_HOOKS", "PUSHSTEP_TEST_ROLE"
# It imports schemathesis, which only the command's process needs.
HOOKS = "tests.support.access.closed_routes"
# Of requests that have no token, and are refused for that: also where the path or the method is nowhere, and with 429.
OF_A_TOKEN = ("negative_data_rejection", "missing_required_header", "unsupported_method")
# What is too long for its field may be too long for a request, and what comes without its token is not looked at.
TOO_LARGE = """
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "412", "413", "415", "422", "5xx"]

"""


def described() -> dict[str, Any]:
    """The committed description."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def asking(description: dict[str, Any]) -> dict[str, Any]:
    """As it is of a server that has tokens: none of its routes that ask for one is answered without."""
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["security"] = [way for way in operation["security"] if way]
    return description


def run_schemathesis(
    server: RunningServer,
    folder: Path,
    examples: int,
    *options: str,
    phases: str = "examples,coverage,fuzzing",
    headers: Mapping[str, str] | None = None,
    role: str | None = None,
    **names: str | int,
) -> None:
    """Requests to a server, with `names` in their paths; AssertionError for an answer that is not as described.

    role: whose token is in `headers`, empty for nobody's: it is also an error if a route that is closed to the role answers.
    """
    folder.mkdir()
    headers = server.headers if headers is None else headers
    lines = "".join(f'"path.{name}" = {json.dumps(value)}\n' for name, value in names.items())
    (folder / "schemathesis.toml").write_text(f"{TOO_LARGE}[parameters]\n{lines}")
    has_tokens = bool(headers) or role is not None
    (folder / "openapi.json").write_text(json.dumps(asking(described()) if has_tokens else described()))
    command = [SCHEMATHESIS, "run", "openapi.json", "--url", f"http://{server.http}", "--seed", "1"]
    command += ["--no-color", "--phases", phases, "--max-examples", str(examples)]
    command += [word for name, value in headers.items() for word in ("--header", f"{name}: {value}")]
    left_out = [NOT_CHECKED, *(OF_A_TOKEN if role == "" else ())]
    command += ["--exclude-checks", ",".join(left_out), "--warnings", "off", "--suppress-health-check", "all"]
    environment = dict(os.environ)
    if role is not None:
        environment |= {"PYTHONPATH": str(ROOT), HOOKS_VARIABLE: HOOKS, ROLE_VARIABLE: role}
    done = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

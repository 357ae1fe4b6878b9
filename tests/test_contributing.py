"""CONTRIBUTING, followed: a rule, a hook, a policy, a route and a device more, each by the files that the page names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
# What is added: by the page's heading, the new file's text, and the line that enters it where the page says.
ADDED: dict[str, tuple[str, str, str, str]] = {
    "rule": (
        """
from typing import ClassVar

from .adagrad import AdagradRule


class AddedRule(AdagradRule):
    name = "added"
    kernel = "adagrad"
""",
        "from .rule import Rule\n",
        "from .rule import Rule\nfrom .added import AddedRule\n",
        "        AdadeltaRule(),=>        AddedRule(),\n        AdadeltaRule(),",
    ),
    "hook": (
        """
from typing import ClassVar

from .hook import Hook, Point


class Added(Hook):
    name: ClassVar[str] = "added"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})

    def step_pre(self, context):
        context.factor *= 0.5
""",
        "from .hook import",
        "from .added import Added\nfrom .hook import",
        "        ClipGradNorm,\n=>        Added,\n        ClipGradNorm,\n",
    ),
    "policy": (
        """
from typing import Literal

from .asynchronous import AsyncPolicy
from .policy import PolicySettings


class AddedSettings(PolicySettings):
    policy: Literal["added"] = "added"
    number: int = 1


class AddedPolicy(AsyncPolicy):
    name = "added"

    def _move(self, pending, version):
        from .policy import Single

        return Single(pending)
""",
        "from .asynchronous import",
        "from .added import AddedPolicy, AddedSettings\nfrom .asynchronous import",
        "    AsyncSettings: AsyncPolicy,\n=>    AddedSettings: AddedPolicy,\n    AsyncSettings: AsyncPolicy,\n",
    ),
    "route": (
        """
from fastapi import APIRouter

router = APIRouter(tags=["added"])


@router.get("/added")
async def added() -> dict[str, str]:
    return {"is": "there"}
""",
        "from .resources import (\n",
        "from .resources import (\n    added,\n",
        "    server,\n    models,=>    added,\n    server,\n    models,",
    ),
    "device": (
        """
from .device import Device


class AddedDevice(Device):
    pass
""",
        "from .device import Device\n",
        "from .added import AddedDevice\nfrom .device import Device\n",
        "DEVICES: Final[Mapping[str, Callable[[int], Device]]] = {=>"
        'DEVICES: Final[Mapping[str, Callable[[int], Device]]] = {"added": lambda index: AddedDevice(), ',
    ),
}
SCRIPT = """
import asyncio, contextlib, tempfile
from pathlib import Path
import numpy as np
import httpx, pushstep.server
assert Path(pushstep.server.__file__).is_relative_to(Path.cwd()), pushstep.server.__file__
from pushstep.client import connect
from pushstep.server.config import Config
from pushstep.server.service import Service

async def served(data):
    service = Service(Config(data=data, grpc="127.0.0.1:0", http="127.0.0.1:0", device="added"))
    running = asyncio.create_task(service.run())
    while not service.catalog.ready:
        await asyncio.sleep(0.02)
        assert not running.done(), running
    assert type(service.catalog.device).__name__ == "AddedDevice"
    await asyncio.to_thread(used, service.door.http_url, service)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running

def used(url, service):
    with httpx.Client(base_url=url, trust_env=False, timeout=20) as rest:
        assert rest.get("/v1/added").json() == {"is": "there"}
        address = rest.get("/v1").json()["grpc"]
        with connect(address, model="m", worker="w", shared_memory=False) as session:
            session.create({"p": np.ones(3, np.float32)}, [{"rule": "added", "params": ["p"], "lr": 0.5}])
            added = rest.post("/v1/models/m/hooks", json={"name": "added", "point": "step_pre"})
            assert added.status_code == 201, added.text
            changed = rest.patch("/v1/models/m/policy", json={"policy": "added", "number": 2})
            assert changed.json()["number"] == 2, changed.text
            receipt = session.push({"p": np.ones(3, np.float32)})
            assert (receipt.policy, receipt.clip_factor) == ("added", 0.5), receipt
            assert np.allclose(session.pull()["p"], 0.5)

with tempfile.TemporaryDirectory() as folder:
    asyncio.run(served(Path(folder) / "data"))
print("all of it works")
"""


def section(heading: str) -> str:
    return PAGE[PAGE.index(f"## Add a {heading}") :].split("\n## ")[0]


def files_of(heading: str) -> tuple[str, str]:
    """The new file and the one that it is entered in, as the page's first and second step name them."""
    first, second = re.findall(
        r"^[12]\. .*?`((?:optim|server)/[\w/<>]+\.py)`", section(heading), re.M | re.S
    )[:2]
    return first.replace("<name>", "added"), second


@pytest.mark.parametrize("heading", ADDED)
def test_each_page_names_a_new_file_and_where_it_is_entered(heading: str) -> None:
    new, entered = files_of(heading)
    assert (ROOT / new).parent.is_dir()
    assert (ROOT / entered).is_file()


def test_what_is_added_by_the_page_works(tmp_path: Path) -> None:
    package = tmp_path / "pushstep"
    shutil.copytree(ROOT / "package", package, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("proto", "optim", "server", "client"):
        shutil.copytree(ROOT / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
    for heading, (text, before, after, edit) in ADDED.items():
        new, entered = files_of(heading)
        (package / new).write_text(text)
        catalogue = (package / entered).read_text()
        old, put = edit.split("=>")
        assert before in catalogue, before
        assert old in catalogue, old
        (package / entered).write_text(catalogue.replace(before, after, 1).replace(old, put, 1))
    table = re.findall(r"^3\. .*?`(server/[\w/]+\.py)`", section("route"), re.M)[0]
    entries = (package / table).read_text()
    assert '"GET /v1": Need.MEMBER,' in entries
    entries = entries.replace('"GET /v1": Need', '"GET /v1/added": Need.VIEWER,\n    "GET /v1": Need')
    (package / table).write_text(entries)
    # the copy's kernels are the same, and are compiled already
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(ROOT / "optim" / "__pycache__")}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.stdout.endswith("all of it works\n"), ran.stderr

"""Exports of a model in several ranks: what one server writes that was trained the same, of one version of all ranks."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from typer.testing import CliRunner

from pushstep.client.commands import app
from tests.support.access.secured import TokenFile
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import begin_download
from tests.system.test_ranks import TRAININGS, Net, Training, attached, bits, gradients, trained

ELEMENTS = 8 << 20
LARGE = {"a": np.zeros(ELEMENTS, np.float32)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("alone")) as server:
        yield server


@pytest.fixture(scope="module", params=[2, 3])
def group(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[RankGroup]:
    with running_ranks(tmp_path_factory.mktemp("ranks"), request.param) as ranks:
        yield ranks


def exported(server: RunningServer, path: str) -> tuple[Any, bytes]:
    """A file's header, but for the model's uid, and its tensors; of a torch file all bytes."""
    answer = server.rest("GET", f"/v1/models/{path}")
    assert answer.status_code == 200, answer.text
    if "format=torch" in path:
        return None, answer.content
    length = int.from_bytes(answer.content[:8], "little")
    header = json.loads(answer.content[8 : 8 + length])
    del header["__metadata__"]["uid"]
    return header, answer.content[8 + length :]


@pytest.mark.parametrize("name", ["adadelta", "rows", "adagrad in two groups", "clip and averages"])
def test_the_same_file_as_one_server(alone: RunningServer, group: RankGroup, name: str) -> None:
    model = f"{name.replace(' ', '-')}-{group.world}"
    for server in (group.leader, alone):
        trained(server, model, TRAININGS[name])
    forms = ["", "?state=true", "?format=torch"]
    if "averages" in name:
        hooks = group.leader.rest("GET", f"/v1/models/{model}/hooks").json()["hooks"]
        average = next(hook["id"] for hook in hooks if hook["name"] == "ema")
        forms += [f"?average={average}", f"?average={average}&format=torch"]
    for form in forms:
        assert exported(group.leader, f"{model}/export{form}") == exported(alone, f"{model}/export{form}"), (
            form
        )
    shown = [server.rest("GET", f"/v1/models/{model}/state-dict").json() for server in (group.leader, alone)]
    assert shown[0] == shown[1]
    for parameter in ("weight", "table.weight", "narrow", "bias"):
        path = f"/v1/models/{model}/parameters/{parameter}"
        assert group.leader.rest("GET", path).json() == alone.rest("GET", path).json()
    ids = [
        server.rest("POST", f"/v1/models/{model}/snapshots").json()["id"] for server in (group.leader, alone)
    ]
    assert ids[0] == ids[1]
    for form in forms:
        path = f"{model}/snapshots/{ids[0]}/content{form}"
        assert exported(group.leader, path) == exported(alone, path), form


def parameters_in(content: bytes, net: Net) -> list[bytes]:
    tensors = load(content)
    return [tensors[name].view(torch.uint8).numpy().tobytes() for name, _ in net.named_parameters()]


def test_one_version_of_all_ranks_while_it_is_trained(group: RankGroup) -> None:
    session, net = group.leader.connect("moving"), Net()
    optimizer = attached(session, net, Training())
    made, over = {0: bits(net)}, threading.Event()

    def work() -> None:
        for step in itertools.count():
            gradients(net, step, Training())
            optimizer.step()
            made[optimizer.last_receipt.version] = bits(net)
            if over.is_set():
                return

    with ThreadPoolExecutor(1) as training:
        worker = training.submit(work)
        answers = [group.leader.rest("GET", "/v1/models/moving/export") for _ in range(8)]
        over.set()
        worker.result()
    session.close()
    versions = [int(answer.headers["X-Pushstep-Version"]) for answer in answers]
    assert versions == sorted(versions)
    assert versions[0] < versions[-1]
    for version, answer in zip(versions, answers, strict=True):
        assert parameters_in(answer.content, net) == made[version]


def test_who_reads_slowly_holds_up_no_push(group: RankGroup) -> None:
    session = group.leader.connect("large")
    session.create(LARGE)
    with ExitStack() as until:
        answer = begin_download(group.leader, "large/export", until, 1 << 18)
        for step in range(1, 4):
            assert session.push({"a": np.ones(ELEMENTS, np.float32)}).version == step
        tensors = load(answer.read())
    assert answer.headers["X-Pushstep-Version"] == "0"
    assert not tensors["a"].any()
    session.close()


def test_a_snapshot_that_a_rank_lacks_is_named(group: RankGroup) -> None:
    with group.leader.connect("lost") as session:
        session.create({"a": np.zeros(50_000, np.float32)})
        session.push({"a": np.ones(50_000, np.float32)})
    found = group.leader.rest("POST", "/v1/models/lost/snapshots").json()["id"]
    shutil.rmtree(group.data / "rank-1" / "models" / "lost" / "snapshots" / found)
    for _ in range(3):  # more than there may be copies at once
        answer = group.leader.rest("GET", f"/v1/models/lost/snapshots/{found}/content")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_snapshot"), answer.text
    assert group.leader.rest("GET", "/v1/models/lost/export").status_code == 200


def test_a_look_at_a_large_parameter(alone: RunningServer, group: RankGroup) -> None:
    """Of which samples are looked at, in all ranks."""
    values, model = np.arange(9_000_001, dtype=np.float32), f"samples-{group.world}"
    shown = []
    for server in (group.leader, alone):
        with server.connect(model) as session:
            session.create({"a": values})
            session.push({"a": values})
        shown.append(server.rest("GET", f"/v1/models/{model}/parameters/a").json())
    assert shown[0] == shown[1]
    assert shown[0]["looked_at"] == 9_000_001 // 3072 * 1024


def test_a_broken_download_is_gone_on_with(group: RankGroup) -> None:
    session = group.leader.connect("pinned")
    session.create(LARGE)
    path, rest = "/v1/models/pinned/export?version=0", group.leader.rest
    whole = rest("GET", path, headers={"Want-Repr-Digest": "sha-256=1"})
    digest = base64.b64encode(hashlib.sha256(whole.content).digest()).decode()
    assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
    part = rest("GET", path, headers={"Range": "bytes=1000-"})
    assert (part.status_code, part.content) == (206, whole.content[1000:])
    session.close()


def test_the_last_snapshot_of_a_job_with_tokens(tmp_path: Path) -> None:
    """At a stop each rank writes its own, and none knows those of the others."""
    tokens, operator = TokenFile(tmp_path / "tokens"), tmp_path / "operator"
    operator.write_text(tokens.tokens["operator"])
    path, headers = "/v1/models/m/", tokens.headers("viewer")
    with running_ranks(tmp_path / "data", 2, *tokens.options(), "--link-token-file", str(operator)) as group:
        with group.leader.connect("m", token=tokens.tokens["worker"]) as session:
            session.create(LARGE)
            session.push({"a": np.ones(ELEMENTS, np.float32)})
        before = group.leader.rest("GET", f"{path}export?state=true", headers=headers)
        assert before.status_code == 200, before.text
        assert group.stop() == [0, 0]
        group.start()
        found = group.leader.rest("GET", f"{path}snapshots", headers=headers).json()["snapshots"][0]["id"]
        after = group.leader.rest("GET", f"{path}snapshots/{found}/content?state=true", headers=headers)
        assert after.content == before.content


@pytest.mark.parametrize("is_sent", [False, True], ids=["while it is gathered", "while it is sent"])
def test_a_rank_that_dies_breaks_the_download(
    tmp_path: Path, is_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = RankGroup(tmp_path / "data", 2)
    try:
        group.leader.connect("m").create(LARGE)
        if not is_sent:  # it sends nothing
            group.ranks[1].process.send_signal(signal.SIGSTOP)
            with ThreadPoolExecutor(1) as asking:
                command = [
                    "export",
                    "--server",
                    f"http://{group.leader.http}",
                    "--model",
                    "m",
                    str(tmp_path / "out"),
                ]
                failed = asking.submit(CliRunner().invoke, app, command)
                wait_until(lambda: whole_files(group.leader) == 1)
                group.kill(1)
                assert failed.result().exit_code == 3, failed.result().output
            assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
            return
        with ExitStack() as until:
            # what the kernel holds is read at the end: through a small window that takes minutes
            answer = begin_download(group.leader, "m/export", until, receive_bytes=1 << 16)
            group.kill(1)
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                answer.read()
    finally:
        for rank in group.ranks:
            rank.kill()


def whole_files(server: RunningServer) -> int:
    """How many files without a name the process has open."""
    links = Path(f"/proc/{server.process.pid}/fd").iterdir()
    return sum(str(link.readlink()).startswith(f"{server.data}/rank-0/#") for link in links)

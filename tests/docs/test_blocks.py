"""Every code block and command of the documents, run against a real server, page by page."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.documents.blocks import Block, pages, read_blocks
from tests.support.documents.page_run import STARTS_A_SERVER, free_address, page_run
from tests.support.processes.forked import workers
from tests.support.servers.harness import RunningServer, running_server
from tests.support.source_tree import ROOT
from tests.support.terminals.command_shim import CommandShim

# What a block may need that a test does not have. A block that says so is not run.
NEEDS = {
    "a new machine": "it makes the environment that the tests run in",
    "an hour": "benchmarks and soaks",
    "certificates": "it serves other hosts by TLS",
    "docker": "there is no daemon where tests run",
    "helm": "there is no cluster",
    "kubernetes": "there is no cluster",
    "systemd": "it changes the machine",
    "two processes": "it is a file of the page that torchrun starts; docs/examples has one that is run",
}
# Languages of blocks that show something, and how it is held to be of that language.
SHOWN = {
    "console": str,
    "dockerfile": str,
    "ini": str,
    "json": json.loads,
    "promql": str,
    "proto": str,
    "text": str,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}
PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
WITH_BLOCKS = {name: page for name, page in PAGES.items() if any(b.is_run for b in read_blocks(page))}


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server of all pages that do not start one. Each begins without a model."""
    with running_server(tmp_path_factory.mktemp("documents") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CommandShim, Path]]:
    folder = tmp_path_factory.mktemp("programs")
    shim = CommandShim(folder, workers())
    yield shim, folder
    shim.close()


@pytest.mark.curl
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_block_runs(
    name: str, commands: tuple[CommandShim, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    blocks = [block for block in read_blocks(WITH_BLOCKS[name]) if block.is_run]
    own = any(block.language == "bash" and STARTS_A_SERVER.search(block.text) for block in blocks)
    server = None if own else request.getfixturevalue("shared_server")
    grpc, http = (server.grpc, server.http) if server is not None else (free_address(), free_address())
    try:
        with page_run(tmp_path, *commands, grpc, http) as run:
            for block in blocks:
                run.run(block)
    finally:
        if server is not None:
            forget_models(server)


def forget_models(server: RunningServer) -> None:
    """Delete what a page has left."""
    for model in server.rest("GET", "/v1/models").json()["models"]:
        assert server.rest("DELETE", f"/v1/models/{model['name']}").status_code == 204


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_or_shown(name: str) -> None:
    wrong = [f"{block}: {problem}" for block in read_blocks(PAGES[name]) if (problem := problem_of(block))]
    assert wrong == []


def problem_of(block: Block) -> str:
    """What is wrong with a block that is not run; nothing for one that is."""
    if block.needs:
        return "" if block.needs in NEEDS else f"{block.needs!r} is no reason (see NEEDS)"
    if block.is_run:
        return ""
    if block.language == "mermaid" and block.page == ROOT / "README.md":
        return ""  # the site would fetch what draws it from another host
    if block.language not in SHOWN:
        return f"{block.language!r} is neither run (bash, python) nor shown ({', '.join(SHOWN)})"
    try:
        SHOWN[block.language](block.text)
    except ValueError as error:
        return f"not {block.language}: {error}"
    return ""


@pytest.mark.curl
@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```bash\ntrue\nfalse\n```\n", "ended with 1"),
        ("```bash\ncurl -fsS localhost:7071/v1/models/nobody | cat\n```\n", "ended with 22"),
        ("```bash\npushstep models --no-such-option\n```\n", "No such option: --no-such-option"),
        ("```python\nx = 1\n```\n```python\nassert x == 2, x\n```\n", "AssertionError: 1"),
        ("```python\nimport sys\nsys.exit(3)\n```\n", "SystemExit: 3"),
        ("```bash\ncd /\n```\n```python\nimport os\nraise OSError(os.getcwd())\n```\n", "OSError: /\n"),
    ],
)
def test_a_block_that_fails_is_noticed(
    page: str, said: str, commands: tuple[CommandShim, Path], shared_server: RunningServer, tmp_path: Path
) -> None:
    """With what it said; what blocks before it have done still holds."""
    written = ROOT / "docs" / "page-of-a-test.md"
    blocks = [
        Block(written, 10 * number, *each)
        for number, each in enumerate(
            (language, text, "") for language, text in re.findall(r"```(\w+)\n(.*?)```\n", page, re.DOTALL)
        )
    ]
    with page_run(tmp_path, *commands, shared_server.grpc, shared_server.http) as run:
        for block in blocks[:-1]:
            run.run(block)
        with pytest.raises(AssertionError) as failed:
            run.run(blocks[-1])
    assert said in str(failed.value)

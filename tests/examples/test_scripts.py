"""The scripts of `docs/examples`: each ends at the loss of its local run."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes.forked import Origin, origin_of
from tests.support.servers.harness import RunningServer, running_server
from tests.support.terminals.command_shim import CommandShim

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ONE_PERCENT = 0.01
# what starts a script, and its options
LAUNCHERS: dict[str, list[str]] = {"python": [], "torchrun": ["--standalone", "--nproc-per-node", "2"]}
# Trainers that take seconds to import. Not MLX, whose threads a forked process would lack.
TRAINERS = (
    "lightning",
    "accelerate",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "keras",
)
# by script: what starts it, by how much its loss may differ, and how many versions it makes: half as many with two ranks
SCRIPTS: dict[str, tuple[str, float, int]] = {
    "torch_loop.py": ("python", 0.0, 160),
    "lightning_fit.py": ("python", 0.0, 32),
    "hf_trainer.py": ("python", 0.0, 16),
    "keras_fit.py": ("python", ONE_PERCENT, 32),
    "mlx_arrays.py": ("python", ONE_PERCENT, 32),
    "accelerate_two.py": ("torchrun", ONE_PERCENT, 32),
    "torchrun_two.py": ("torchrun", ONE_PERCENT, 32),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A server in which no model has the name of an example's yet."""
    with running_server(tmp_path_factory.mktemp("examples") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShim]:
    folder = tmp_path_factory.mktemp("programs")
    settings = {"KERAS_BACKEND": "torch", "KERAS_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    shim = CommandShim(folder, origin_of(*Origin.OF_WORKERS, *TRAINERS, **settings))
    yield shim
    shim.close()


@pytest.fixture(scope="module")
def local_loss_of(programs: CommandShim, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """The loss of a script's local run, which is made for the first test that asks for it."""
    folder = tmp_path_factory.mktemp("local")

    @functools.cache
    def found(script: str) -> float:
        return loss_of([*command_of(programs, script, SCRIPTS[script][0]), "local"], folder)

    return found


def loss_of(command: list[str | Path], folder: Path, environment: dict[str, str] | None = None) -> float:
    known = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # the networks are too small for more
        "KERAS_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        # torchrun's ranks are not forked: beside each other's threads they have hung in gloo
        "PYTHON_EXEC": sys.executable,
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, cwd=folder, env=known
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("loss ")]
    return float(line.split()[1])


def command_of(programs: CommandShim, script: str, launcher: str) -> list[str | Path]:
    program = {"python": programs.python, "torchrun": programs.torchrun}[launcher]
    return [program, *LAUNCHERS[launcher], EXAMPLES / script]


def version_of(served: RunningServer, model: str) -> int:
    return int(served.rest("GET", f"/v1/models/{model}").json()["version"])


def test_each_script_is_in_the_table_and_on_the_page() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    said = (EXAMPLES / "README.md").read_text().splitlines()
    for script, (launcher, *_) in SCRIPTS.items():
        assert " ".join([launcher, *LAUNCHERS[launcher], f"docs/examples/{script}"]) in said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_ends_at_the_loss_of_its_local_run(
    script: str,
    served: RunningServer,
    programs: CommandShim,
    local_loss_of: Callable[[str], float],
    tmp_path: Path,
) -> None:
    launcher, differs, versions = SCRIPTS[script]
    remote = loss_of([*command_of(programs, script, launcher), served.grpc], tmp_path)
    assert remote == pytest.approx(local_loss_of(script), rel=differs, abs=0.0)
    assert version_of(served, script.removesuffix(".py").replace("_", "-")) == versions


@pytest.mark.timeout(600)
def test_two_ranks_of_the_trainer_train_as_one_process(
    served: RunningServer, programs: CommandShim, local_loss_of: Callable[[str], float], tmp_path: Path
) -> None:
    """With half the batch each. The order of the samples is another, so the losses on the way differ a little."""
    remote = loss_of([*command_of(programs, "hf_trainer.py", "torchrun"), served.grpc], tmp_path)
    assert remote == pytest.approx(local_loss_of("hf_trainer.py"), rel=ONE_PERCENT, abs=0.0)
    assert version_of(served, "hf-trainer-2") == 16


@pytest.mark.node
@pytest.mark.timeout(600)
def test_a_worker_in_javascript(served: RunningServer, tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json", "train.mjs"):
        shutil.copy(EXAMPLES / "node" / name, tmp_path)
    cache = {**os.environ, "npm_config_cache": str(tmp_path / "cache"), "npm_config_update_notifier": "false"}
    installed = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"],
        capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path, env=cache,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    protos = tmp_path / "protos" / "pushstep"
    protos.mkdir(parents=True)
    (protos / "proto").symlink_to(EXAMPLES.parents[1] / "proto")
    command: list[str | Path] = ["node", tmp_path / "train.mjs", tmp_path / "protos"]
    remote = loss_of([*command, served.grpc], tmp_path)
    local = loss_of([*command, "local"], tmp_path)
    assert abs(remote - local) < ONE_PERCENT * max(local, 1e-4)
    assert served.rest("GET", "/v1/models/node").json()["version"] == 40

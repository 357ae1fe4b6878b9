"""Rows kept at the worker: as old as the bound allows and no older, prefetched beside a push, forgotten at a restore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pushstep.client import Session
from pushstep.proto.errors import InvalidSettings, RowOutOfRange
from tests.support.servers import operators
from tests.support.servers.harness import RunningServer

TABLES = {"a": np.arange(60, dtype=np.float32).reshape(20, 3), "b": np.ones((5000, 1), np.float32)}


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Session:
    made = server.connect(model_name, on_restore="continue")
    made.create(TABLES, [{"rule": "adagrad", "params": ["a", "b"]}])
    return made


def push(session: Session, *rows: int) -> None:
    session.push({"a": (np.array(rows), np.ones((len(rows), 3), np.float32))})


def counted(session: Session, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many pulls of rows the session has made."""
    pulls: list[Any] = []
    pull = session._worker.pull_rows
    monkeypatch.setattr(session._worker, "pull_rows", lambda *asked: (pulls.append(asked), pull(*asked))[1])
    return lambda: len(pulls)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_row_is_as_old_as_the_bound_allows(
    session: Session, monkeypatch: pytest.MonkeyPatch, max_staleness: int
) -> None:
    pulls = counted(session, monkeypatch)
    cache = session.row_cache(max_staleness)
    ids = {"a": np.array([3, 1, 3]), "b": np.array([4999])}
    first = cache.get(ids)
    assert np.array_equal(first["a"], TABLES["a"][[3, 1, 3]])
    for _ in range(max_staleness):
        push(session, 1, 2)
        assert all(np.array_equal(now, first[name]) for name, now in cache.get(ids).items())
    assert pulls() == 1
    push(session, 1, 2)
    now = cache.get(ids)
    assert pulls() == 2
    assert np.array_equal(now["a"], session.pull()["a"][[3, 1, 3]])
    assert not np.array_equal(now["a"], first["a"])


def test_rows_asked_for_beside_a_push_need_no_pull(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls = counted(session, monkeypatch)
    cache = session.row_cache(1)
    for batch in range(6):
        cache.prefetch({"a": [batch, batch, batch + 1], "b": np.arange(batch, 5000, 7)})
        push(session, batch)
        rows = cache.get({"a": [batch, batch, batch + 1], "b": np.arange(batch, 5000, 7)})
        assert rows["a"].shape == (3, 3)
        assert (rows["b"] == 1).all()
    assert pulls() == 0
    assert cache.misses == 0


def test_what_is_forgotten_is_pulled_anew(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls = counted(session, monkeypatch)
    cache = session.row_cache(1)
    for forgotten in (cache.forget, lambda: None):
        cache.prefetch({"a": [1, 2]})
        forgotten()
        assert np.array_equal(cache.get({"a": [1, 2]})["a"], TABLES["a"][[1, 2]])
        assert pulls() == 1


def test_a_full_table_begins_anew(session: Session) -> None:
    cache, draw = session.row_cache(5, most_rows=50), np.random.default_rng(0)
    for _ in range(20):
        ids = draw.integers(0, 20, 30)
        many = draw.integers(0, 5000, 40)
        rows = cache.get({"a": ids, "b": many})
        assert np.array_equal(rows["a"], TABLES["a"][ids])
        assert (rows["b"] == 1).all()


@pytest.mark.filterwarnings("ignore:model .* was restored")
def test_a_restore_leaves_nothing_of_it(server: RunningServer, session: Session) -> None:
    push(session, 1)
    saved = operators.take_snapshot(server, session.model)["id"]
    push(session, 1, 2)
    cache = session.row_cache(1000)
    before = cache.get({"a": [1, 2]})
    operators.restore(server, session.model, saved)
    push(session, 5)  # the session learns of it
    assert not np.array_equal(cache.get({"a": [1, 2]})["a"], before["a"])
    assert np.array_equal(cache.get({"a": [1, 2, 3]})["a"], session.pull()["a"][[1, 2, 3]])


def test_what_is_refused(session: Session) -> None:
    for wrong in ({"max_staleness": -1}, {"most_rows": 0}):
        with pytest.raises(InvalidSettings):
            session.row_cache(**wrong)
    with pytest.raises(RowOutOfRange):
        session.row_cache().get({"a": [20]})
    with pytest.raises(RowOutOfRange):
        session.row_cache().prefetch({"a": [-1]})

"""Nonsense for the policy and the gate, from operators and workers: refused by name, and nothing changes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from pushstep.client import Outcome
from pushstep.proto.errors import InvalidSettings, InvalidText, TooLong
from tests.support.servers.harness import RunningServer
from tests.support.workers.wire import GROUPS, PARAMETERS, created, untouched

DEEP = "[" * 100_000
NONSENSE = {
    "no JSON": "{",
    "no object": "[1]",
    "null": "null",
    "deep": DEEP,
    "deep inside": '{"policy": ' + DEEP,
    "endless number": '{"quorum": ' + "9" * 5000 + "}",
    "lone surrogate": '{"\\ud800": 1}',
    "lone surrogate as policy": '{"policy": "\\ud800"}',
    "long name": '{"' + "x" * 100_000 + '": 1}',
    "many names": "{" + ", ".join(f'"{number}": 1' for number in range(10_000)) + "}",
    "no such policy": '{"policy": {"policy": "sync"}, "nonfinite": 1}',
    "NaN": '{"policy": "sync", "timeout_s": NaN, "norm_outlier": NaN}',
    "infinite": '{"policy": "sync", "timeout_s": 1e999, "norm_outlier": Infinity}',
    "negative": '{"policy": "bounded", "bound": -1, "norm_warmup": -1}',
    "fraction": '{"policy": "sync", "quorum": 1.5, "quarantine_after": 1.5}',
    "list": '{"policy": "sync", "min_workers": [1], "norm_outlier": [1]}',
    "groups": '{"max_staleness_by_group": {"x": 1}}',
    "group -1": '{"max_staleness_by_group": {"-1": 1}}',
    "zero": '{"policy": "sync", "timeout_s": 0, "norm_outlier": 0}',
    "huge": '{"policy": "bounded", "bound": 9007199254740993, "norm_warmup": 9007199254740993}',
    "huge by far": '{"policy": "bounded", "bound": ' + "9" * 4000 + ', "norm_warmup": ' + "9" * 4000 + "}",
    "words for a number": '{"policy": "bounded", "bound": "3", "norm_outlier": "1e3"}',
    "a number for a flag": '{"policy": "async", "scale": 1, "nonfinite": 1}',
    "words for a flag": '{"policy": "async", "scale": "yes", "nonfinite": "yes"}',
    "a whole number that is none": '{"policy": "bounded", "bound": 3.0, "norm_warmup": 3.0}',
    "a name twice": '{"policy": "bounded", "bound": 3, "bound": 4, "norm_warmup": 3, "norm_warmup": 4}',
    "a control character": '{"policy": "as\\u0000ync", "nonfinite": "sk\\u0000ip"}',
    "nested": '{"a": ' + "[" * 40 + "]" * 40 + "}",
}


def patched(server: RunningServer, model: str, what: str, body: str) -> httpx.Response:
    return server.rest(
        "PATCH",
        f"/v1/models/{model}/{what}",
        content=body.encode(),
        headers={"content-type": "application/json"},
    )


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_an_operator_is_told_by_name(server: RunningServer, model_name: str, body: str) -> None:
    created(server, model_name)
    paths = [f"/v1/models/{model_name}/{what}" for what in ("policy", "gate")]
    before = [server.rest("GET", path).json() for path in paths]
    with untouched(server, model_name):
        for what in ("policy", "gate"):
            answer = patched(server, model_name, what, body)
            assert answer.status_code == 422, answer.text[:500]
            assert answer.json()["code"] == ("invalid_text" if "\\u" in body else "invalid_settings")
            assert len(answer.content) < 10_000
    assert [server.rest("GET", path).json() for path in paths] == before


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_a_worker_is_told_by_name(
    server: RunningServer, model_name: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the policy of a model that it creates; the name stays free."""
    session = server.connect(model_name)
    with monkeypatch.context() as patch, pytest.raises((InvalidSettings, InvalidText, TooLong)):
        patch.setattr("pushstep.client.membership.membership.to_wire", lambda _: body)
        session.create(PARAMETERS, GROUPS)
    session.create(PARAMETERS, GROUPS)


LARGEST = 2**53
HUGE = [
    ("policy", {"policy": "bounded", "bound": LARGEST}),
    ("policy", {"policy": "sync", "timeout_s": 1e9, "quorum": LARGEST}),
    ("policy", {"policy": "async", "max_staleness": LARGEST, "max_staleness_by_group": {10**9: 0}}),
    ("gate", {"norm_outlier": 1e308, "norm_warmup": 1}),
    ("gate", {"norm_outlier": 5e-324, "norm_warmup": LARGEST, "quarantine_after": LARGEST}),
]


@pytest.mark.parametrize(("what", "settings"), HUGE)
def test_huge_numbers_are_only_numbers(
    server: RunningServer, model_name: str, what: str, settings: dict[str, Any]
) -> None:
    """They are taken, shown, told to who joins, and pushes go on."""
    session = created(server, model_name)
    assert patched(server, model_name, what, json.dumps(settings)).status_code == 200
    assert server.rest("GET", f"/v1/models/{model_name}/{what}").status_code == 200
    receipt = session.push({"bias": np.ones(4, np.float32)})
    assert (receipt.outcome, receipt.version) == (Outcome.APPLIED, 2)
    server.connect(model_name, "late").create(PARAMETERS, GROUPS)


def test_a_round_for_more_workers_than_there_is_staging_is_refused(
    server: RunningServer, model_name: str
) -> None:
    created(server, model_name)
    answer = patched(server, model_name, "policy", json.dumps({"policy": "sync", "min_workers": LARGEST}))
    assert answer.json()["code"] == "over_capacity"

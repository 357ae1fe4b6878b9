"""What a worker's terminal and notebook show: short texts, HTML that no name gets out of, and progress as it comes."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress as RichProgress
from tqdm import tqdm

from pushstep.client import Outcome, Receipt
from pushstep.optim import Adagrad
from pushstep.proto.errors import InvalidSettings
from tests.support.servers.harness import RunningServer

USUAL: dict[str, Any] = {
    "outcome": Outcome.APPLIED,
    "reason": "",
    "worker": "w0",
    "epoch": 1,
    "sequence": 3,
    "timeline": 1,
    "version": 12,
}
# what a receipt holds beside the usual, what its sentences say, and what they do not
EXPLAINED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "applied": ({}, ["was applied and made version 12", "newest version"], ["Why", "clipping", "retry"]),
    "stale": ({"staleness": 3}, ["3 versions behind"], ["newest version:"]),
    "clipped": (
        {"gradient_norm": 8.0, "clip_factor": 0.125},
        ["norm was 8", "multiplied by 0.125 before the step, as clipping does"],
        [],
    ),
    "weighed": ({"lr_scale": 0.5}, ["multiplied the learning rate by 0.5"], []),
    "learning rates": ({"effective_lr": [0.5, 0.25]}, ["by group: 0.5, 0.25"], []),
    "a duplicate": ({"duplicates": 2}, ["came 2 times more, as a retry does; it counts once"], []),
    "one duplicate": ({"duplicates": 1}, ["came once more"], []),
    "a round": ({"contributors": ["a", "b"]}, ["adds up the pushes of 2 workers: a, b"], []),
    "rejected": (
        {"outcome": Outcome.REJECTED, "reason": "nonfinite_gradient"},
        ["was rejected", "stayed at version 12", "nonfinite_gradient"],
        ["newest version"],
    ),
    "a reason that is not known here": ({"outcome": Outcome.REJECTED, "reason": "new"}, ["(new)"], []),
    "skipped": ({"outcome": Outcome.SKIPPED}, ["was skipped", "on purpose"], []),
    "late": ({"outcome": Outcome.DROPPED_LATE}, ["its round had closed", "timeout_s of the policy"], []),
    "too stale": ({"outcome": Outcome.TOO_STALE}, ["too stale", "max_staleness"], []),
    "superseded": ({"outcome": Outcome.SUPERSEDED, "reason": "superseded"}, ["restored meanwhile"], []),
    "notes": ({"notes": ["gradient scaled by 0.5"]}, ["On the way: gradient scaled by 0.5"], []),
    "ignored edits": ({"ignored_edits": ["0.lr"]}, ["did not count: 0.lr", "Only the lead's"], []),
    "metrics": ({"missing_metrics": ["loss"]}, ["optimizer.report()"], []),
    "in memory": ({"durability": "applied", "durable_version": 9}, ["set the model back to version 9"], []),
    "on the disk": ({"durability": "durable"}, ["on the disk before"], []),
    "where time went": (
        {"times": {"receive_s": 0.002, "queue_s": 0.5, "wait_s": 1.5, "step_s": 0.0, "publish_s": 0.0}},
        ["took the server 2 s: 1.5 s waiting for its policy to let it in, 500 ms waiting for its turn"],
        ["received"],
    ),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_a_receipt_explains_itself(case: str) -> None:
    fields, said, unsaid = EXPLAINED[case]
    receipt = Receipt(**{**USUAL, **fields})
    text = receipt.explain()
    assert str(receipt) == text
    assert all(words in text for words in said), text
    assert not any(words in text for words in unsaid), text
    assert all(line.endswith(".") for line in text.splitlines())


def test_every_outcome_has_its_sentence() -> None:
    firsts = {Receipt(**{**USUAL, "outcome": outcome}).explain().splitlines()[0] for outcome in Outcome}
    assert len(firsts) == len(Outcome)


class Tags(HTMLParser):
    """Which tags a text has, balanced or not, and what it says between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(value: Any) -> Tags:
    found = Tags(value._repr_html_())
    assert found.open == []
    assert found.seen <= {"div", "strong", "table", "tr", "th", "td"}
    return found


def test_nothing_in_a_receipt_gets_out_of_its_html() -> None:
    evil = "<script>alert('&')</script>"
    hostile = {"worker": evil, "reason": evil, "policy": evil, "notes": [evil], "contributors": [evil] * 2}
    for outcome in (Outcome.APPLIED, Outcome.REJECTED):
        found = shown(Receipt(**{**USUAL, **hostile, "outcome": outcome}))
        assert "script" not in found.seen and evil in found.text


def test_what_a_session_and_an_optimizer_show(server: RunningServer, model_name: str) -> None:
    secret = "token-that-nobody-sees"
    session = server.connect(model_name, token=secret)
    assert "reader" in repr(session)
    two = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    groups: list[dict[str, Any]] = [{"params": [two[0]], "lr": 0.5}, {"params": [two[1]], "lr": 0.25}]
    remote = session.attach(Adagrad(groups), names=["a", "b"])
    assert "none yet" in shown(session).text and "none yet" in shown(remote).text
    two[0].grad = torch.ones(3)
    remote.step()
    for one in (session, remote):
        assert "made version 1" in shown(one).text
        assert model_name in repr(one) and "'w0'" in repr(one)
        assert "\n" not in repr(one) and len(repr(one)) < 300
        assert secret not in repr(one) + str(one) + one._repr_html_()
    assert "group 1: lr=0.25" in repr(remote)
    session.close()
    assert "closed" in repr(session)


def loss(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.square().sum() + parameter.sum()


@pytest.mark.parametrize("prefetch", [False, True])
def test_progress_has_each_receipt_once(server: RunningServer, model_name: str, prefetch: bool) -> None:
    told: list[Receipt] = []
    session = server.connect(model_name)
    parameter = torch.nn.Parameter(torch.ones(3))
    remote = session.attach(Adagrad([parameter]), names=["w"], prefetch=prefetch, progress=told.append)
    with tqdm(total=4, disable=True) as bar, RichProgress(disable=True) as rich:
        task = rich.add_task("train", total=4)
        for _ in range(4):
            remote.zero_grad()
            loss(parameter).backward()  # type: ignore[no-untyped-call]
            remote.step()
            bar.update(len(told) - bar.n)
            rich.update(task, completed=len(told))
    assert len(told) == (3 if prefetch else 4)
    remote.synchronize()
    remote.synchronize()
    assert [receipt.version for receipt in told] == [1, 2, 3, 4]
    assert told[-1] is remote.last_receipt


@pytest.mark.parametrize("prefetch", [False, True])
def test_progress_that_raises_breaks_nothing(server: RunningServer, model_name: str, prefetch: bool) -> None:
    """The step is taken, the error comes out, and the next step goes on."""

    def fail(receipt: Receipt) -> None:
        raise ValueError(receipt.version)

    session = server.connect(model_name)
    parameter = torch.nn.Parameter(torch.ones(3))
    remote = session.attach(Adagrad([parameter]), names=["w"], prefetch=prefetch, progress=fail)
    for number in range(3):
        remote.zero_grad()
        loss(parameter).backward()  # type: ignore[no-untyped-call]
        if prefetch and not number:
            remote.step()
        else:
            with pytest.raises(ValueError, match=r"[123]"):
                remote.step()
    if prefetch:
        with pytest.warns(RuntimeWarning, match="progress= of attach has failed: ValueError: 3"):
            session.close()
    else:
        session.close()
    pulled = server.connect(model_name, worker="w1").pull()["w"]
    assert np.isfinite(pulled).all()
    assert server.rest("GET", f"/v1/models/{model_name}").json()["version"] == 3


def test_progress_is_called(server: RunningServer, model_name: str) -> None:
    with pytest.raises(InvalidSettings, match="called with each step's receipt"):
        server.connect(model_name).attach(
            Adagrad([torch.nn.Parameter(torch.ones(1))]),
            names=["w"],
            progress="bar",  # type: ignore[arg-type]
        )

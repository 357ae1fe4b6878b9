"""Hooks: installed, ordered and removed over REST; a chain, a scheduler and the observers as they run."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from pushstep.client import Outcome, Session
from pushstep.proto.errors import (
    HeldByHook,
    InvalidHook,
    NonfiniteGradient,
    PushstepError,
    RejectedByHook,
    UnknownGroup,
    UnknownHook,
)
from pushstep.proto.types_pb2 import ParamGroup
from pushstep.server.coordinator.groups import Group, ParamGroups
from pushstep.server.coordinator.hooks.catalogue import CATALOGUE
from pushstep.server.coordinator.hooks.chain import MAX_HOOKS, HookChain
from pushstep.server.coordinator.hooks.hook import Hook, Point, StepContext
from pushstep.server.coordinator.hooks.schedulers import KINDS
from pushstep.server.observers import observers as at_work
from pushstep.server.observers.catalogue import OBSERVERS
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import set_gate
from tests.support.workers.wire import created, untouched

ONES = {"bias": np.ones(4, np.float32)}


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Session:
    return created(server, model_name)


@pytest.fixture
def hooks(session: Session) -> str:
    return f"/v1/models/{session.model}/hooks"


def context(norm: float = 1.0, **more: Any) -> StepContext:
    fields: dict[str, Any] = {
        "worker": "w",
        "base_version": 0,
        "version": 1,
        "staleness": 0,
        "metrics": {},
    }
    return StepContext(**{**fields, "gradient_norm": norm, **more})


def groups(*lrs: float) -> ParamGroups:
    made = ParamGroups(Group.make(ParamGroup(rule="adadelta")) for _ in lrs or (1.0,))
    for group, lr in zip(made.list, lrs or (1.0,), strict=True):
        group.values["lr"] = lr
    return made


def install(
    installed: HookChain, of: ParamGroups, scheduler: str, arguments: Any = None, **settings: Any
) -> Hook:
    whole = {"scheduler": scheduler, "arguments": arguments or {}, **settings}
    return installed.add("lr_scheduler", "step_post", whole, of, "m")


def test_catalogue_says_what_can_be_installed(server: RunningServer) -> None:
    shown = {entry["name"]: entry for entry in server.rest("GET", "/v1/hooks").json()["hooks"]}
    assert set(shown) == {*CATALOGUE, *(kind.name for kind in OBSERVERS)}
    for entry in shown.values():
        assert entry["kind"] in ("transform", "guard", "observer")
        assert entry["description"]
        assert set(entry["points"]) <= {str(point) for point in Point}
        kinds = [entry["settings"], *entry["settings"].get("$defs", {}).values()]
        assert {kind["additionalProperties"] for kind in kinds if "properties" in kind} == {False}
    assert set(shown["json_log"]["points"]) == {str(point) for point in Point}
    assert shown["clip_grad_norm"]["settings"]["properties"]["max_norm"]["exclusiveMinimum"] == 0


def test_added_listed_ordered_and_removed(server: RunningServer, session: Session, hooks: str) -> None:
    def add(name: str, point: str, **more: Any) -> dict[str, Any]:
        answer = server.rest("POST", hooks, json={"name": name, "point": point, **more})
        assert answer.status_code == 201
        shown: dict[str, Any] = answer.json()
        return shown

    clip = add("clip_grad_norm", "step_pre", settings={"max_norm": 0.5})
    assert clip["effective_version"] == 2
    first = session.push(ONES)
    guard = add("finite_guard", "step_pre", settings={"action": "skip"}, prepend=True)
    log = add("json_log", "step_post")
    assert guard["effective_version"] == 3
    assert first.clip_factor == pytest.approx(0.25, rel=1e-5)

    def listed() -> list[str]:
        return [hook["id"] for hook in server.rest("GET", hooks).json()["hooks"]]

    assert listed() == [guard["id"], clip["id"], log["id"]]
    shown = server.rest("GET", f"{hooks}/{clip['id']}").json()
    assert (shown["kind"], shown["point"], shown["settings"]) == (
        "transform",
        "step_pre",
        {"max_norm": 0.5, "norm_type": 2.0, "error_if_nonfinite": False},
    )
    assert server.rest("GET", f"/v1/models/{session.model}").json()["nonfinite"] == "skip"
    skipped = session.push({"bias": np.full(4, np.nan, np.float32)})
    assert (skipped.outcome, skipped.version) == (Outcome.SKIPPED, 2)
    gone = server.rest("DELETE", f"{hooks}/{guard['id']}")
    assert gone.json() == {"id": guard["id"], "effective_version": 3}
    assert listed() == [clip["id"], log["id"]]
    for method in ("GET", "DELETE"):
        answer = server.rest(method, f"{hooks}/{guard['id']}")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_hook")
    with pytest.raises(PushstepError) as caught:
        session.push({"bias": np.full(4, np.nan, np.float32)})
    assert caught.value.code == "nonfinite_gradient"
    server.rest("DELETE", f"{hooks}/{clip['id']}")
    assert session.push(ONES).clip_factor == 1.0
    again = add("clip_grad_norm", "step_pre", settings={"max_norm": 1})
    assert again["id"] not in (clip["id"], guard["id"], log["id"])


def test_nonfinite_apply_does_as_torch_does(server: RunningServer, session: Session, hooks: str) -> None:
    settings = {"name": "finite_guard", "point": "step_pre", "settings": {"action": "apply"}}
    assert server.rest("POST", hooks, json=settings).status_code == 201
    gradient = np.array([np.nan, 1, np.inf, 1], np.float32)
    assert session.push({"bias": gradient}).outcome is Outcome.APPLIED
    assert np.isnan(session.pull()["bias"]).tolist() == [True, False, True, False]
    # what is not a number is no JSON either
    for path in ("", "/parameters/bias", "/workers", "/state-dict", "/events", "/param-groups"):
        answer = server.rest("GET", f"/v1/models/{session.model}{path}")
        assert answer.status_code == 200
        json.loads(answer.text, parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("norm_type", [2.0, "inf"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_error_if_nonfinite_is_torchs(
    server: RunningServer, session: Session, hooks: str, value: float, norm_type: float | str
) -> None:
    """Where the gate lets such gradients in, the hook rejects what torch raises for, until it is told not to."""
    gradient = np.array([value, 1, 1, 1], np.float32)
    set_gate(server, session.model, nonfinite="apply")
    settings = {"max_norm": 0.5, "norm_type": norm_type, "error_if_nonfinite": True}
    installed = {"name": "clip_grad_norm", "point": "step_pre", "settings": settings}
    hook = server.rest("POST", hooks, json=installed).json()["id"]
    for raises in (True, False):
        parameter = torch.zeros(4, requires_grad=True)
        parameter.grad = torch.from_numpy(gradient.copy())
        with pytest.raises(RuntimeError, match="non-finite") if raises else contextlib.nullcontext():
            torch.nn.utils.clip_grad_norm_([parameter], 0.5, float(norm_type), error_if_nonfinite=raises)
        if raises:
            with untouched(server, session.model), pytest.raises(NonfiniteGradient):
                session.push({"bias": gradient})
            assert server.rest("GET", f"/v1/models/{session.model}").json()["nonfinite"] == "reject"
            lenient = {"settings": {**settings, "error_if_nonfinite": False}}
            assert server.rest("PATCH", f"{hooks}/{hook}", json=lenient).status_code == 200
        else:
            assert session.push({"bias": gradient}).outcome is Outcome.APPLIED
            held = np.isnan(session.pull()["bias"])
            assert held.tolist() == parameter.grad.isnan().tolist()


def test_a_scheduler_holds_its_lr(server: RunningServer, session: Session, hooks: str) -> None:
    group = f"/v1/models/{session.model}/param-groups"
    settings = {"scheduler": "StepLR", "arguments": {"step_size": 1, "gamma": 0.5}, "groups": [1]}
    installed = server.rest(
        "POST", hooks, json={"name": "lr_scheduler", "point": "step_post", "settings": settings}
    )
    assert installed.status_code == 201
    held = server.rest("PATCH", f"{group}/1", json={"lr": 9.0})
    assert (held.status_code, held.json()["code"]) == (409, "held_by_hook")
    assert installed.json()["id"] in held.json()["detail"]
    assert server.rest("PATCH", f"{group}/1", json={"rho": 0.8}).status_code == 200
    assert server.rest("PATCH", f"{group}/0", json={"lr": 0.3}).status_code == 200
    assert [session.push(ONES).groups[1]["lr"] for _ in range(3)] == [0.5, 0.25, 0.125]
    twice = server.rest(
        "POST", hooks, json={"name": "lr_scheduler", "point": "step_post", "settings": settings}
    )
    assert (twice.status_code, twice.json()["code"]) == (409, "held_by_hook")
    server.rest("DELETE", f"{hooks}/{installed.json()['id']}")
    assert server.rest("GET", f"{group}/1").json()["lr"] == 0.125
    assert session.push(ONES).groups[1]["lr"] == 0.125


ARGUMENTS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.9, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.25, "total_iters": 4},
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.1},
    "OneCycleLR": {"max_lr": 0.7, "total_steps": 9},
    "PolynomialLR": {"total_iters": 6, "power": 2.0},
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.5},
    "StepLR": {"step_size": 2, "gamma": 0.3},
    "SequentialLR": {
        "schedulers": [
            {"scheduler": "LinearLR", "arguments": {"start_factor": 0.5, "total_iters": 2}},
            {"scheduler": "ExponentialLR", "arguments": {"gamma": 0.8}},
        ],
        "milestones": [3],
    },
    "ChainedScheduler": {
        "schedulers": [
            {"scheduler": "ConstantLR", "arguments": {"factor": 0.5, "total_iters": 3}},
            {"scheduler": "StepLR", "arguments": {"step_size": 2}},
        ]
    },
}


def torchs(name: str, arguments: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    keywords = copy.deepcopy(dict(arguments))
    if name in ("CyclicLR", "OneCycleLR"):
        keywords["cycle_momentum"] = False
    for entry in keywords.get("schedulers", []):
        entry["made"] = torchs(entry["scheduler"], entry["arguments"], optimizer)
    if "schedulers" in keywords:
        keywords["schedulers"] = [entry["made"] for entry in keywords["schedulers"]]
    kind = getattr(lr_scheduler, name)
    return kind(**keywords) if name == "ChainedScheduler" else kind(optimizer, **keywords)


@pytest.mark.parametrize("name", KINDS)
def test_schedulers_are_torchs_also_over_a_snapshot(name: str) -> None:
    """Every lr is torch's, bit for bit, and stays so when the chain is dumped as JSON and read in mid-way."""
    losses = [3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0]
    lrs = (1.0, 0.5)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(())], "lr": lr} for lr in lrs], lr=0.0)
    expected = torchs(name, ARGUMENTS[name], optimizer)
    of, installed = groups(*lrs), HookChain()
    install(installed, of, name, ARGUMENTS[name])
    moved = False
    for number, loss in enumerate(losses):
        moved |= of.list[0].values["lr"] != lrs[0]
        assert [group.values["lr"] for group in of.list] == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        expected.step(loss) if name == "ReduceLROnPlateau" else expected.step()
        if number == 3:
            dumped, of = json.loads(json.dumps(installed.dump())), ParamGroups.parse(of.dump())
            installed = HookChain.parsed(dumped, of, "m")
        installed.step_post(context(metrics={"loss": loss}), of)
    assert [group.values["lr"] for group in of.list] == [group["lr"] for group in optimizer.param_groups]
    assert moved
    assert installed.list[0].failures == 0


BAD_SCHEDULERS: dict[str, tuple[str, Any]] = {
    "unknown": ("LambdaLR", {"lr_lambda": "x"}),
    "private": ("LRScheduler", {}),
    "no argument of its": ("StepLR", {"step_size": 1, "steps": 2}),
    "an argument missing": ("StepLR", {}),
    "a callable": ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "scale_fn": "eval"}),
    "an optimizer": ("StepLR", {"step_size": 1, "optimizer": 1}),
    "words for a number": ("StepLR", {"step_size": "3"}),
    "words for a factor": ("ExponentialLR", {"gamma": "x"}),
    "nothing for a factor": ("ExponentialLR", {"gamma": None}),
    "a step of 0": ("StepLR", {"step_size": 0}),
    "a period of 0": ("CosineAnnealingLR", {"T_max": 0}),
    "a number for a list": ("MultiStepLR", {"milestones": 5}),
    "a negative lr at once": ("LinearLR", {"start_factor": -1.0}),
    "in mid-run": ("StepLR", {"step_size": 1, "last_epoch": 3}),
    "no schedulers": ("ChainedScheduler", {"schedulers": []}),
    "schedulers that are none": ("ChainedScheduler", {"schedulers": [1]}),
    "schedulers that are a number": ("SequentialLR", {"schedulers": 3, "milestones": []}),
    "more lrs than groups": ("CyclicLR", {"base_lr": [1, 2, 3], "max_lr": 1}),
    "infinity": ("ExponentialLR", {"gamma": math.inf}),
    "NaN": ("ExponentialLR", {"gamma": math.nan}),
    "huge": ("ExponentialLR", {"gamma": 1e300}),
    "whole and huge": ("StepLR", {"step_size": 10**4000}),
    "a whole factor that is huge": ("StepLR", {"step_size": 1, "gamma": 10**1000}),
    "a power without end": (
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 1, "mode": "exp_range", "gamma": 7, "last_epoch": 10**9},
    ),
    "a product without end": ("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 10**1000}),
    "milestones without end": ("MultiStepLR", {"milestones": [1] * 1001}),
    "schedulers without end": (
        "ChainedScheduler",
        {"schedulers": [{"scheduler": "StepLR", "arguments": {"step_size": 1}}] * 33},
    ),
    "a text without end": ("StepLR", {"step_size": 1, "x" * 201: 1}),
    "a factor below 0": ("ExponentialLR", {"gamma": -1.0}),
    "a power below 0": ("PolynomialLR", {"total_iters": 3, "power": -1}),
    "a milestone that is NaN": ("MultiStepLR", {"milestones": [1, math.nan]}),
    "a milestone of words": ("MultiStepLR", {"milestones": ["1"]}),
    "a period of NaN": ("CosineAnnealingLR", {"T_max": math.nan}),
    "a least lr below 0": ("CosineAnnealingLR", {"T_max": 3, "eta_min": -1.0}),
    "a base below 0": ("CyclicLR", {"base_lr": -0.1, "max_lr": 0.9}),
    "an end beyond the start": ("LinearLR", {"start_factor": 0.5, "end_factor": 1.5}),
    "a share beyond 1": ("OneCycleLR", {"max_lr": 0.7, "total_steps": 9, "pct_start": 1.5}),
    "a division by 0": ("OneCycleLR", {"max_lr": 0.7, "total_steps": 9, "div_factor": 0.0}),
    "a momentum": ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.9, "base_momentum": 0.9}),
    "a factor that does not reduce": ("ReduceLROnPlateau", {"factor": 1.0}),
    "patience below 0": ("ReduceLROnPlateau", {"patience": -1}),
    "an inner one that is bad": (
        "SequentialLR",
        {"schedulers": [{"scheduler": "StepLR", "arguments": {"step_size": 0}}], "milestones": []},
    ),
    "no steps at all": ("LinearLR", {"total_iters": 0}),
}


@pytest.mark.parametrize("case", BAD_SCHEDULERS)
def test_a_scheduler_that_cannot_work_is_not_installed(case: str) -> None:
    name, arguments = BAD_SCHEDULERS[case]
    of, installed = groups(1.0, 0.5), HookChain()
    before = of.dump()
    with pytest.raises(InvalidHook):
        install(installed, of, name, arguments)
    assert installed.list == []
    assert of.dump() == before
    assert [group.scheduled_by for group in of.list] == [None, None]
    install(installed, of, "StepLR", {"step_size": 1})


def test_nesting_has_an_end() -> None:
    nested: dict[str, Any] = {"scheduler": "StepLR", "arguments": {"step_size": 1}}
    for _ in range(50):
        nested = {"scheduler": "ChainedScheduler", "arguments": {"schedulers": [nested]}}
    with pytest.raises(InvalidHook):
        install(HookChain(), groups(), nested["scheduler"], nested["arguments"])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 3}),
        ("ExponentialLR", {"gamma": 1e12}),
    ],
)
def test_a_scheduler_that_fails_leaves_the_lr_where_it_is(name: str, arguments: dict[str, Any]) -> None:
    """The step that it follows is decided: what it fails with is counted, and no rule is handed its number."""
    of, installed = groups(1.0), HookChain()
    hook = install(installed, of, name, arguments)
    for _ in range(5):
        installed.step_post(context(), of)
        lr = of.list[0].values["lr"]
        assert 0 <= lr < 1e38
    assert hook.failures > 0


@pytest.mark.parametrize(
    ("wanted", "error"), [([], InvalidHook), ([0, 0], InvalidHook), ([2], UnknownGroup), ([-1], InvalidHook)]
)
def test_groups_of_a_scheduler(wanted: list[int], error: type[PushstepError]) -> None:
    of, installed = groups(1.0, 0.5), HookChain()
    with pytest.raises(error):
        install(installed, of, "StepLR", {"step_size": 1}, groups=wanted)
    install(installed, of, "StepLR", {"step_size": 1, "gamma": 0.5}, groups=[1])
    with pytest.raises(HeldByHook):
        install(installed, of, "StepLR", {"step_size": 1}, groups=[0, 1])
    install(installed, of, "StepLR", {"step_size": 1, "gamma": 0.1}, groups=[0])
    installed.step_post(context(), of)
    assert [group.values["lr"] for group in of.list] == [0.1, 0.25]


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 2.0, 1e30, math.inf, math.nan])
def test_clipping_is_torchs_formula(norm: float) -> None:
    installed = HookChain()
    installed.add("clip_grad_norm", "step_pre", {"max_norm": 1.0}, groups(), "m")
    seen = context(norm)
    installed.step_pre(seen)
    expected = torch.clamp(torch.tensor(1.0 / (norm + 1e-6), dtype=torch.float64), max=1.0).item()
    assert seen.factor == expected or (math.isnan(seen.factor) and math.isnan(expected))


def test_transforms_run_in_order_and_see_each_other() -> None:
    installed = HookChain()
    for limit in (2.0, 1.0):
        installed.add("clip_grad_norm", "step_pre", {"max_norm": limit}, groups(), "m")
    seen = context(4.0)
    installed.step_pre(seen)
    first = 2.0 / (4.0 + 1e-6)
    assert seen.factor == first * (1.0 / (4.0 * first + 1e-6))


def test_chain_has_a_limit_and_knows_its_own() -> None:
    installed = HookChain()
    for _ in range(MAX_HOOKS):
        installed.add("finite_guard", "step_pre", {}, groups(), "m")
    with pytest.raises(InvalidHook):
        installed.add("finite_guard", "step_pre", {}, groups(), "m")
    assert len({hook.hook_id for hook in installed.list}) == MAX_HOOKS
    with pytest.raises(UnknownHook):
        installed.remove("finite_guard-0", groups(), "m")


class Failing(Hook):
    """Fails wherever it is asked."""

    name: ClassVar[str] = "failing"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset(Point)
    go: ClassVar[threading.Event] = threading.Event()
    seen: ClassVar[list[Mapping[str, Any]]] = []

    def step_pre(self, context: StepContext) -> None:
        raise ValueError("no good")

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        raise RuntimeError("not now")

    def observe(self, event: Mapping[str, Any]) -> str | None:
        self.go.wait(60)
        self.seen.append(event)
        raise RuntimeError("blind")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setitem(CATALOGUE, "failing", Failing)
    Failing.go.clear()
    Failing.seen.clear()
    return Failing


def test_a_failing_hook_refuses_before_the_step_and_never_after(failing: type[Failing]) -> None:
    installed = HookChain()
    before = installed.add("failing", "step_pre", {}, groups(), "m")
    with pytest.raises(RejectedByHook, match="no good") as caught:
        installed.step_pre(context())
    assert caught.value.fields["hook"] == before.hook_id
    after = installed.add("failing", "step_post", {}, groups(), "m")
    installed.step_post(context(), groups())
    assert after.failures == 1


def test_observers_that_are_behind_cost_nothing_and_are_counted(
    failing: type[Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "OBSERVER_QUEUE", 5)
    installed = HookChain()
    hook = installed.add("failing", "step_post", {}, groups(), "m")
    assert installed.observers(Point.STEP_PRE) == []
    looking = at_work.Observers()
    for number in range(20):
        looking.tell(installed.observers(Point.STEP_POST), {"n": number})
    assert 14 <= hook.dropped <= 15
    failing.go.set()
    wait_until(lambda: len(failing.seen) == 20 - hook.dropped)
    wait_until(lambda: hook.failures == len(failing.seen))
    looking.close()
    assert [event["n"] for event in failing.seen] == sorted(event["n"] for event in failing.seen)


def test_a_slow_observer_keeps_no_other_from_its_events(
    failing: type[Failing], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(at_work, "OBSERVER_QUEUE", 5)
    installed = HookChain()
    slow = installed.add("failing", "step_post", {}, groups(), "m")
    quick = installed.add("json_log", "step_post", {}, groups(), "m")
    looking = at_work.Observers()
    with caplog.at_level("INFO", "pushstep.hooks.json_log"):
        for number in range(20):
            looking.tell(installed.observers(Point.STEP_POST), {"n": number})
            wait_until(lambda seen=number + 1: len(caplog.messages) == seen)
    assert quick.dropped == 0
    assert 14 <= slow.dropped <= 15
    assert looking.dropped == slow.dropped
    installed.remove(slow.hook_id, groups(), "m")
    looking.keep(installed.list)
    failing.go.set()
    wait_until(lambda: slow.failures == 20 - slow.dropped)
    looking.close()


def test_json_log_writes_what_happened(server: RunningServer, session: Session, hooks: str) -> None:
    for point in Point:
        added = {"name": "json_log", "point": point, "settings": {"every": 2 if point == "step_post" else 1}}
        assert server.rest("POST", hooks, json=added).status_code == 201
    for _ in range(4):
        session.push(ONES, metrics={"loss": 0.25})
    snapshot = server.rest("POST", f"/v1/models/{session.model}/snapshots").json()["id"]
    server.rest("POST", f"/v1/models/{session.model}/snapshots/{snapshot}/restore")

    def lines() -> list[dict[str, Any]]:
        text = server.log.read_text().splitlines()
        found = [json.loads(line[line.index("{") :]) for line in text if "hooks.json_log: {" in line]
        return [event for event in found if event["model"] == session.model]

    wait_until(lambda: {event["point"] for event in lines()} == {str(point) for point in Point})
    steps = [event for event in lines() if event["point"] == "step_pre"]
    assert [event["version"] for event in steps] == [2, 3, 4, 5]
    assert all(event["metrics"] == {"loss": 0.25} and event["worker"] == "owner" for event in steps)
    assert len([event for event in lines() if event["point"] == "step_post"]) == 2

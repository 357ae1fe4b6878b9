"""Edits of hooks over REST: order, settings, budgets, points; and any sequence of them, with pushes between and a replay after."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pushstep.client import Outcome, Session
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import add_hook, restore, take_snapshot
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad, backward
from tests.support.workers.wire import GROUPS, PARAMETERS, created

ONES = {"bias": np.ones(4, np.float32)}
DENSE = {name: np.full(value.shape, 0.5, np.float32) for name, value in PARAMETERS.items()}
ROWS = (np.array([3, 0, 3]), np.full((3, 3), 0.25, np.float32))
_numbers = itertools.count()


@pytest.fixture(scope="module")
def journaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose models have a journal, so that every edit is in one."""
    folder = tmp_path_factory.mktemp("journaled") / "data"
    options = ("--durability", "everysec", "--snapshot-every-s", "100000", "--max-bytes", str(40 << 10))
    with running_server(folder, *options) as running:
        yield running


def ask(server: RunningServer, method: str, path: str, status: int = 200, **how: Any) -> Any:
    answer = server.rest(method, path, **how)
    assert answer.status_code == status, answer.text
    return answer


def held(server: RunningServer, model: str) -> dict[str, Any]:
    """Everything that a model is, as bytes."""
    path = f"/v1/models/{model}"
    hooks = ask(server, "GET", f"{path}/state-dict").json()["hooks"]
    ids = [hook["id"] for hook in hooks if hook["name"] == "ema"]
    exports = {
        hook: sorted_bytes(
            ask(server, "GET", f"{path}/export", params={"average": hook, "state": "true"}).content
        )
        for hook in ("", *ids)
    }
    groups = ask(server, "GET", f"{path}/param-groups").json()["param_groups"]
    # its timeline is in an ETag, and another one after a restore
    groups = [{key: value for key, value in group.items() if key != "etag"} for group in groups]
    return {"hooks": hooks, "exports": exports, "groups": groups}


def sorted_bytes(file: bytes) -> list[tuple[str, bytes]]:
    """A safetensors file's tensors, by name."""
    length = int.from_bytes(file[:8], "little")
    header, body = json.loads(file[8 : 8 + length]), file[8 + length :]
    return sorted(
        (name, body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    )


def test_settings_and_order_are_changed_by_patch(journaled: RunningServer) -> None:
    """From the next version on, with an ETag, tried first by a dry run, and brought back by a replay."""
    model = f"p{next(_numbers)}"
    path = f"/v1/models/{model}/hooks"
    with created(journaled, model) as session:
        clip = add_hook(journaled, model, "clip_grad_norm", "step_pre", {"max_norm": 0.5})["id"]
        value = add_hook(journaled, model, "clip_grad_value", "step_pre", {"clip_value": 0.25})["id"]
        # norm 2: to 0.5, then each element is 0.25 and stays
        assert session.push(ONES).clip_factor == pytest.approx(0.25, rel=1e-5)
        etag = ask(journaled, "GET", f"{path}/{value}").headers["etag"]
        body = {"position": 0, "settings": {"clip_value": 0.125}}
        planned = ask(journaled, "PATCH", f"{path}/{value}?dry_run=true", json=body).json()
        assert (planned["before"]["order"], planned["after"]["order"]) == ([clip, value], [value, clip])
        assert planned["after"]["settings"] == {"clip_value": 0.125}
        assert [hook["id"] for hook in ask(journaled, "GET", path).json()["hooks"]] == [clip, value]
        done = ask(journaled, "PATCH", f"{path}/{value}", json=body, headers={"If-Match": etag})
        assert done.json()["order"] == [value, clip]
        assert done.json()["effective_version"] == 3
        assert done.headers["etag"] != etag
        stale = ask(journaled, "PATCH", f"{path}/{value}", 412, json=body, headers={"If-Match": etag})
        assert stale.json()["code"] == "stale_etag"
        # now to 0.125 each, which is a norm of 0.25: nothing is left to clip
        assert session.push(ONES).clip_factor == 1
        events = ask(journaled, "GET", f"/v1/models/{model}/events").json()["events"]
        changed = [event for event in events if event["kind"] == "hook_changed"]
        assert [(event["hook"], event["position"]) for event in changed] == [(value, 0)]
        for bad, code in (
            ({"settings": {"clip_value": -1}}, "invalid_hook"),
            ({"settings": {"unknown": 1}}, "invalid_hook"),
            ({"position": 2}, "invalid_hook"),
            ({"position": -1}, "invalid_settings"),
            ({"point": "step_post"}, "invalid_settings"),
        ):
            assert ask(journaled, "PATCH", f"{path}/{value}", 422, json=bad).json()["code"] == code
        assert ask(journaled, "PATCH", f"{path}/ema-7", 404, json={}).json()["code"] == "unknown_hook"
        before = held(journaled, model)
        ask(journaled, "POST", f"/v1/models/{model}/restore", json={"version": 3})
        assert held(journaled, model) == before
    ask(journaled, "DELETE", f"/v1/models/{model}", 204)


def test_a_scheduler_is_changed_or_stays_as_it_was(journaled: RunningServer) -> None:
    model = f"p{next(_numbers)}"
    path = f"/v1/models/{model}/hooks"
    with created(journaled, model) as session:
        halving = {"scheduler": "StepLR", "arguments": {"step_size": 1, "gamma": 0.5}, "groups": [1]}
        hook = add_hook(journaled, model, "lr_scheduler", "step_post", halving)["id"]
        other = add_hook(journaled, model, "lr_scheduler", "step_post", {**halving, "groups": [0]})["id"]
        assert session.push(ONES).groups[1]["lr"] == 0.5
        # the other one holds group 0: nothing changes, and group 1 is held as before
        refused = ask(journaled, "PATCH", f"{path}/{hook}", 409, json={"settings": {"groups": [0, 1]}})
        assert refused.json()["code"] == "held_by_hook"
        ask(journaled, "PATCH", f"/v1/models/{model}/param-groups/1", 409, json={"lr": 1.0})
        assert session.push(ONES).groups[1]["lr"] == 0.25
        # another scheduler takes over where the lr is now, with none of the old arguments
        ask(
            journaled,
            "PATCH",
            f"{path}/{hook}",
            json={"settings": {"scheduler": "ExponentialLR", "arguments": {"gamma": 0.1}}},
        )
        assert session.push(ONES).groups[1]["lr"] == pytest.approx(0.025)
        assert ask(journaled, "GET", f"{path}/{other}").json()["failures"] == 0
    ask(journaled, "DELETE", f"/v1/models/{model}", 204)


def test_averages_count_in_the_budget_and_go_with_their_hook(journaled: RunningServer) -> None:
    model = f"p{next(_numbers)}"
    path = f"/v1/models/{model}"
    with created(journaled, model) as session:
        before = ask(journaled, "GET", path).json()["bytes"]
        elements = sum(value.size for value in PARAMETERS.values())
        hook = add_hook(journaled, model, "ema", "step_post", {})["id"]
        assert ask(journaled, "GET", path).json()["bytes"] == before + 4 * elements
        only = add_hook(journaled, model, "ema", "step_post", {"groups": [1], "momentum": 0.5})["id"]
        session.push(DENSE)
        patched = ask(journaled, "PATCH", f"{path}/hooks/{only}", json={"settings": {"momentum": 0.25}})
        assert patched.json()["settings"]["momentum"] == 0.25
        fixed = ask(journaled, "PATCH", f"{path}/hooks/{only}", 422, json={"settings": {"groups": [0]}})
        assert fixed.json()["code"] == "invalid_hook"
        unknown = {"name": "ema", "point": "step_post", "settings": {"groups": [9]}}
        assert ask(journaled, "POST", f"{path}/hooks", 404, json=unknown).json()["code"] == "unknown_group"
        # a model as large as what is left of --max-bytes leaves no room for another average
        left = (40 << 10) - ask(journaled, "GET", path).json()["bytes"]
        with journaled.connect(f"{model}-large") as other:
            size = (left - (2 << 10)) // 16
            other.create({"w": np.zeros(size, np.float32)}, [{"rule": "adagrad", "params": ["w"], "lr": 0.1}])
            body = {"name": "ema", "point": "step_post"}
            for dry in ("", "?dry_run=true"):
                refused = ask(journaled, "POST", f"/v1/models/{model}-large/hooks{dry}", 409, json=body)
                assert refused.json()["code"] == "over_capacity"
            assert ask(journaled, "GET", f"/v1/models/{model}-large/hooks").json()["hooks"] == []
            assert other.push({"w": np.ones(size, np.float32)}).outcome is Outcome.APPLIED
        ask(journaled, "DELETE", f"/v1/models/{model}-large", 204)
        for each in (hook, only):
            ask(journaled, "DELETE", f"{path}/hooks/{each}")
        assert ask(journaled, "GET", path).json()["bytes"] == before
        assert session.push(DENSE).outcome is Outcome.APPLIED
    ask(journaled, "DELETE", f"/v1/models/{model}", 204)


def points_seen(server: RunningServer, model: str) -> list[tuple[str, int]]:
    """The points at which the JSON log was told of a model, in order, with the version."""
    text = server.log.read_text().splitlines()
    found = [json.loads(line[line.index("{") :]) for line in text if "hooks.json_log: {" in line]
    return [(event["point"], event["version"]) for event in found if event["model"] == model]


def test_each_point_fires_where_torchs_does(journaled: RunningServer) -> None:
    """Before and after: a step, a snapshot, an export, a worker's state_dict; a restore, an import."""
    model = f"p{next(_numbers)}"
    path = f"/v1/models/{model}"
    with created(journaled, model) as session:
        for point in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            add_hook(journaled, model, "json_log", point, {})
        expected: list[str] = []

        def check(*points: str) -> None:
            expected.extend(points)
            wait_until(
                lambda: sorted(point for point, _ in points_seen(journaled, model)) == sorted(expected)
            )

        export = ask(journaled, "GET", f"{path}/export", params={"state": "true"}).content
        check("state_dict_pre", "state_dict_post")
        ask(journaled, "GET", f"{path}/state-dict")
        check("state_dict_pre", "state_dict_post")
        snapshot = take_snapshot(journaled, model)["id"]
        check("state_dict_pre", "state_dict_post")
        # with a journal, what was loaded is saved again
        loads = ("load_state_dict_pre", "load_state_dict_post", "state_dict_pre", "state_dict_post")
        restore(journaled, model, snapshot)
        check(*loads)
        ask(journaled, "PUT", f"{path}/state-dict", content=export)
        check(*loads)
        assert session.model == model
    with journaled.connect(model, "steps") as session:
        for point in ("step_pre", "step_post"):
            add_hook(journaled, model, "json_log", point, {})
        version = session.push(ONES).version
        check("step_pre", "step_post")
        assert [at for point, at in points_seen(journaled, model) if point.startswith("step_p")] == [
            version
        ] * 2
    ask(journaled, "DELETE", f"/v1/models/{model}", 204)


def test_a_worker_s_state_dict_is_one_too(journaled: RunningServer) -> None:
    model = f"p{next(_numbers)}"
    with journaled.connect(model) as session:
        network = Network()
        remote = session.attach(adagrad(network), module=network)
        for point in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            add_hook(journaled, model, "json_log", point, {})
        state = remote.state_dict()
        wait_until(lambda: len(points_seen(journaled, model)) == 2)
        backward(network, [remote], 0)
        remote.step()
        remote.load_state_dict(state)
        points = ["load_state_dict_post", "load_state_dict_pre", "state_dict_post", "state_dict_pre"]
        wait_until(lambda: sorted({point for point, _ in points_seen(journaled, model)}) == points)
    ask(journaled, "DELETE", f"/v1/models/{model}", 204)


# Settings at the ends of what is accepted, and beyond: those are refused, and refused edits change nothing.
TINY, HUGE = 1e-300, 1e300
NUMBERS = st.sampled_from([TINY, 1e-6, 0.1, 1.0, 1e6, 1e12, 3e38, HUGE])
SCHEDULES = st.sampled_from(
    [
        {"scheduler": "StepLR", "arguments": {"step_size": 1, "gamma": 1e12}},
        {"scheduler": "ExponentialLR", "arguments": {"gamma": 1e-3}},
        {"scheduler": "OneCycleLR", "arguments": {"max_lr": 1.0, "total_steps": 2}},
        {"scheduler": "LinearLR", "arguments": {"start_factor": 0.5, "total_iters": 2}, "groups": [0]},
        {
            "scheduler": "CyclicLR",
            "arguments": {"base_lr": 0.1, "max_lr": 1e12, "step_size_up": 1},
            "groups": [1],
        },
        {"scheduler": "ReduceLROnPlateau", "arguments": {"patience": 0}},
    ]
)
KINDS: dict[str, tuple[str, st.SearchStrategy[dict[str, Any]]]] = {
    "clip_grad_norm": ("step_pre", st.fixed_dictionaries({"max_norm": NUMBERS})),
    "clip_grad_value": ("step_pre", st.fixed_dictionaries({"clip_value": NUMBERS})),
    "clipnorm": ("step_pre", st.fixed_dictionaries({"clipnorm": NUMBERS})),
    "global_clipnorm": ("step_pre", st.fixed_dictionaries({"global_clipnorm": NUMBERS})),
    "gradient_centralization": ("step_pre", st.just({})),
    "gradient_noise": (
        "step_pre",
        st.fixed_dictionaries(
            {"eta": NUMBERS, "gamma": st.sampled_from([0.0, 0.55, 10.0]), "seed": st.integers(0, 2**53)}
        ),
    ),
    "finite_guard": (
        "step_pre",
        st.fixed_dictionaries({"action": st.sampled_from(["reject", "skip", "apply"])}),
    ),
    "ema": (
        "step_post",
        st.fixed_dictionaries(
            {"momentum": st.sampled_from([0.0, 0.5, 1.0])},
            optional={
                "overwrite_frequency": st.integers(1, 3),
                "groups": st.sampled_from([[0], [1], [0, 1], [2]]),
            },
        ),
    ),
    "lr_scheduler": ("step_post", SCHEDULES),
    "json_log": ("load_state_dict_post", st.just({})),
}


@st.composite
def edits(draw: st.DrawFn) -> tuple[Any, ...]:
    """One edit or push."""
    what = draw(st.sampled_from(["add", "add", "change", "move", "remove", "push", "push", "rows"]))
    if what == "add":
        name = draw(st.sampled_from(sorted(KINDS)))
        return what, name, draw(KINDS[name][1]), draw(st.booleans())
    if what == "change":
        return (
            what,
            draw(st.integers(0, 5)),
            draw(st.sampled_from(sorted(KINDS)).flatmap(lambda n: KINDS[n][1])),
        )
    if what == "move":
        return what, draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return what, draw(st.integers(0, 5))


def pushed(session: Session, what: str, number: int) -> None:
    """A push of finite gradients, dense or of rows. It is applied, whatever the hooks are."""
    gradients: dict[str, Any] = {**DENSE} if what == "push" else {"table": ROWS, "bias": ONES["bias"]}
    if number % 2:
        gradients.pop("bias")
    receipt = session.push(gradients, metrics={"loss": float(number)})
    assert receipt.outcome is Outcome.APPLIED


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(edits(), min_size=1, max_size=14))
@example(
    [
        ("add", "ema", {"momentum": 0.5, "overwrite_frequency": 1}, False),
        ("rows", 1),
        ("remove", 0),
        ("push", 0),
    ]
)
@example(
    [
        ("add", "gradient_noise", {"eta": 1e12, "gamma": 0.0, "seed": 1}, False),
        ("push", 0),
        ("rows", 0),
        ("push", 0),
    ]
)
@example(
    [
        ("add", "lr_scheduler", {"scheduler": "StepLR", "arguments": {"step_size": 1, "gamma": 1e12}}, False),
        *[("push", 0)] * 6,
    ]
)
def test_no_edits_of_hooks_make_a_step_fail(
    journaled: RunningServer, sequence: list[tuple[Any, ...]]
) -> None:
    """Refused edits change nothing, accepted ones fail no later step, and a replay of it all has the same bytes."""
    model = f"p{next(_numbers)}"
    path = f"/v1/models/{model}/hooks"
    with journaled.connect(model, "owner") as session:
        session.create(PARAMETERS, GROUPS)
        version = 0
        for what, *rest in sequence:
            if what in ("push", "rows"):
                pushed(session, what, rest[0])
                version += 1
                continue
            before = ask(journaled, "GET", path).json()["hooks"]
            if what == "add":
                name, chosen, prepend = rest
                body = {"name": name, "point": KINDS[name][0], "settings": chosen, "prepend": prepend}
                answer = journaled.rest("POST", path, json=body)
            elif not before:
                continue
            elif what == "remove":
                answer = journaled.rest("DELETE", f"{path}/{before[rest[0] % len(before)]['id']}")
            else:
                hook = before[rest[0] % len(before)]["id"]
                change = {"settings": rest[1]} if what == "change" else {"position": rest[1] % len(before)}
                answer = journaled.rest("PATCH", f"{path}/{hook}", json=change)
            assert answer.status_code in (200, 201, 404, 409, 422), answer.text
            if answer.status_code >= 400:
                assert answer.json()["code"] in (
                    "invalid_hook",
                    "held_by_hook",
                    "unknown_group",
                    "over_capacity",
                )
                assert ask(journaled, "GET", path).json()["hooks"] == before
        for what in ("push", "rows", "push"):
            pushed(session, what, 0)
            version += 1
        kept = held(journaled, model)
        ask(journaled, "POST", f"/v1/models/{model}/restore", json={"version": version})
        after = held(journaled, model)
        assert after == kept
    ask(journaled, "DELETE", f"/v1/models/{model}", 204)

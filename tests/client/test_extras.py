"""A module's buffers and frozen values: exports and snapshots hold them, so a checkpoint loads whole."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from pushstep.client import Session
from pushstep.client.attachment import buffers as extras
from pushstep.client.membership import uploads
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import ManifestMismatch
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import restore, take_snapshot


def _module() -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    network[0].weight.requires_grad_(False)
    return network


def _train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


def test_a_closed_session_leaves_a_checkpoint_that_loads_whole(
    server: RunningServer, model_name: str
) -> None:
    network = _module()
    session = server.connect(model_name)
    stepped = [parameter for parameter in network.parameters() if parameter.requires_grad]
    _train(network, session.attach(Adadelta(stepped), module=network), 7)
    snapshot = server.rest("POST", f"/v1/models/{model_name}/snapshots").json()["id"]
    session.close()

    exported = load(server.rest("GET", f"/v1/models/{model_name}/export").content)
    fresh = _module()
    fresh.load_state_dict(exported)
    for name, value in network.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert int(exported["1.num_batches_tracked"]) == 7

    # the snapshot was taken before the last buffers came: it has those of its own moment
    content = server.rest("GET", f"/v1/models/{model_name}/snapshots/{snapshot}/content").content
    assert int(load(content)["1.num_batches_tracked"]) == 0
    assert server.rest("POST", f"/v1/models/{model_name}/snapshots/{snapshot}/restore").status_code == 200
    assert (
        int(load(server.rest("GET", f"/v1/models/{model_name}/export").content)["1.num_batches_tracked"]) == 0
    )


def test_only_the_lead_worker_s_count(server: RunningServer, model_name: str) -> None:
    lead, second = _module(), _module()
    first = server.connect(model_name, "w0")
    first.attach(Adadelta([p for p in lead.parameters() if p.requires_grad]), module=lead)
    other = server.connect(model_name, "w1")
    _train(
        second, other.attach(Adadelta([p for p in second.parameters() if p.requires_grad]), module=second), 3
    )
    other.close()
    exported = load(server.rest("GET", f"/v1/models/{model_name}/export").content)
    assert int(exported["1.num_batches_tracked"]) == 0


# --- down at attach, and up when they have changed


class Held(nn.Module):
    """Random features that are frozen, statistics, and a layer that is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        """A number per row."""
        result: Tensor = self.out(self.norm(self.fixed(numbers)))
        return result


def _attached(server: RunningServer, model: str, worker: str, module: nn.Module) -> tuple[Session, Any]:
    session = server.connect(model, worker)
    stepped = [p for p in module.parameters() if p.requires_grad]
    return session, session.attach(Adagrad(stepped, lr=0.05), module=module)


def _exported(server: RunningServer, model: str) -> dict[str, Tensor]:
    return load(server.rest("GET", f"/v1/models/{model}/export").content)


def _check_same(one: nn.Module, held: dict[str, Any]) -> None:
    assert one.state_dict().keys() == held.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, held[name]), name


def test_a_script_that_is_started_again_goes_on_with_them(server: RunningServer, model_name: str) -> None:
    """From its first step, and before: an evaluation sees what was trained, and so does an export at any time."""
    module = Held(0)
    session, remote = _attached(server, model_name, "w0", module)
    _train(module, remote, 5)
    session.close()
    trained = copy.deepcopy(module.state_dict())
    again = Held(1)
    session, remote = _attached(server, model_name, "w0", again)
    _check_same(again, trained)
    _check_same(again, _exported(server, model_name))
    batch = torch.randn(3, 4)
    assert torch.equal(again.eval()(batch), module.eval()(batch))
    again.train()
    _train(again, remote, 2)
    session.close()
    _check_same(again, _exported(server, model_name))
    assert int(_exported(server, model_name)["norm.num_batches_tracked"]) == 7


def test_every_worker_has_the_same_frozen_layers(server: RunningServer, model_name: str) -> None:
    """Whoever comes first, and however close behind it the others are."""
    barrier = threading.Barrier(4)
    modules = [Held(seed) for seed in range(4)]

    def run(number: int) -> None:
        barrier.wait()
        _attached(server, model_name, f"w{number}", modules[number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    for module in modules[1:]:
        _check_same(module, modules[0].state_dict())
    _check_same(modules[0], _exported(server, model_name))


def test_a_worker_that_has_come_to_lead_sends_its_own(server: RunningServer, model_name: str) -> None:
    modules = [Held(seed) for seed in range(2)]
    (lead, _), (second, remote) = (_attached(server, model_name, f"w{k}", m) for k, m in enumerate(modules))
    _train(modules[1], remote, 3)
    lead.close()
    assert int(_exported(server, model_name)["norm.num_batches_tracked"]) == 0
    _train(modules[1], remote, 1)
    second.close()
    _check_same(modules[1], _exported(server, model_name))


def test_a_restore_brings_them_back_in_every_worker(server: RunningServer, model_name: str) -> None:
    modules = [Held(seed) for seed in range(2)]
    remotes = [_attached(server, model_name, f"w{k}", m)[1] for k, m in enumerate(modules)]
    snapshot = take_snapshot(server, model_name)["id"]
    saved = copy.deepcopy(modules[0].state_dict())
    for module, remote in zip(modules, remotes, strict=True):
        _train(module, remote, 3)
    modules[0].fixed.weight.data.mul_(2)
    restore(server, model_name, snapshot)
    for module, remote in zip(modules, remotes, strict=True):
        module(torch.randn(16, 4)).square().mean().backward()
        with pytest.warns(RuntimeWarning, match="restored"):
            remote.step()
        _check_same(module, saved)


def test_only_what_has_changed_is_sent(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen trunk of many gigabytes goes up once, with the model."""
    sent: list[set[str]] = []
    make = uploads.extras

    def counted(model: str, member: Any, tensors: Any, **options: Any) -> Any:
        sent.append(set(tensors))
        return make(model, member, tensors, **options)

    monkeypatch.setattr(uploads, "extras", counted)
    monkeypatch.setattr(extras, "EVERY_STEPS", 1)
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    module = Held(0)
    module.register_buffer("idle", torch.zeros(3))
    module.register_buffer("large", torch.zeros(1 << 19))
    session, remote = _attached(server, model_name, "w0", module)
    _train(module, remote, 2)
    assert sent == [statistics, statistics]
    module.fixed.weight.data.mul_(0.5)  # an average that a loop keeps through .data
    module.large.data.add_(1)  # type: ignore[operator,union-attr]
    module.register_buffer("late", torch.ones(2))
    module.idle = torch.zeros(3)  # another tensor, of the same values
    _train(module, remote, 1)
    assert sent[2:] == [{*statistics, "fixed.weight", "large", "late"}]
    del module.idle
    _train(module, remote, 1)
    assert "idle" not in _exported(server, model_name)
    module.fixed.bias.data.add_(1)
    session.close()
    _check_same(module, _exported(server, model_name))
    # by the next lead, nothing
    del sent[:]
    again = Held(1)
    again.register_buffer("large", torch.zeros(1 << 19))
    again.register_buffer("late", torch.zeros(2))
    session, _ = _attached(server, model_name, "w0", again)
    session.close()
    assert sent == []
    again.register_buffer("more", torch.zeros(1))
    session, _ = _attached(server, model_name, "w0", again)
    assert sent == [{"more"}]


def test_a_frozen_layer_of_another_shape_is_refused(server: RunningServer, model_name: str) -> None:
    _attached(server, model_name, "w0", Held(0))
    other = Held(1)
    other.fixed = nn.Linear(5, 4).requires_grad_(False)
    with pytest.raises(
        ManifestMismatch, match=r"frozen 'fixed\.weight': the server has \(4, 4\), this worker \(4, 5\)"
    ):
        _attached(server, model_name, "w1", other)
    grown = Held(1)
    grown.register_buffer("positions", torch.zeros(3))
    grown.register_buffer("wide", torch.zeros(3))
    session, _ = _attached(server, f"{model_name}-grown", "w0", grown)
    session.close()
    grown.positions = torch.zeros(5)
    grown.wide = torch.ones(1).expand(3)
    with pytest.warns(
        RuntimeWarning,
        match="these buffers keep their local values, .*: positions, wide",
    ):
        session, _ = _attached(server, f"{model_name}-grown", "w0", grown)
    assert grown.positions.shape == (5,)


class Stateful(nn.Module):
    """With a state of its own making, which is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_extra_state(self) -> Tensor:
        """torch's hook."""
        return torch.tensor([self.count])

    def set_extra_state(self, state: Any) -> None:
        """torch's hook."""
        self.count = int(state)


def _odd(module: Any) -> None:
    """Everything that a file can hold, in every form."""
    shared = torch.arange(12.0)
    for name, value in {
        "shared": shared,
        "part of it": shared[:4],
        "turned": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.ones(1).expand(3),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "a half": torch.randn(3).to(torch.bfloat16),
        "eighth": torch.randn(3).to(torch.float8_e5m2),
        "wide": torch.randn(3, dtype=torch.float64),
        "phase": torch.randn(3, dtype=torch.complex64),
        "turned back": torch.randn(3, dtype=torch.complex64).conj(),
    }.items():
        module.register_buffer(name, value)
    module.register_buffer("not kept", torch.ones(1), persistent=False)
    module.tied = nn.Embedding(9, 4).requires_grad_(False)
    module.twin = nn.Linear(4, 9, bias=False)
    module.twin.weight = module.tied.weight
    module.view = nn.Parameter(module.out.weight.data.view(-1)[:2], requires_grad=False)
    module.state = Stateful()


def test_whatever_a_module_holds(server: RunningServer, model_name: str) -> None:
    module = Held(0)
    _odd(module)
    module.state.count = 5
    session, remote = _attached(server, model_name, "w0", module)
    _train(module, remote, 2)
    session.close()
    held = _exported(server, model_name)
    _check_same(module, held)
    again = Held(1)
    _odd(again)
    with torch.no_grad():
        for buffer in again.buffers():
            if not buffer.is_complex() or not buffer.is_conj():
                buffer.copy_(torch.zeros_like(buffer)) if buffer.is_contiguous() else None
    session, remote = _attached(server, model_name, "w0", again)
    _check_same(again, held)
    assert again.state.count == 5 and again.tied.weight is again.twin.weight
    _train(again, remote, 1)
    session.close()
    _check_same(again, _exported(server, model_name))


LEFT_OUT: dict[str, Callable[[], Tensor]] = {
    "sparse_coo": lambda: torch.eye(4).to_sparse(),
    "sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "complex128": lambda: torch.zeros(3, dtype=torch.complex128),
    "on the meta device": lambda: torch.zeros(3, device="meta"),
    "made in inference mode": lambda: _in_inference_mode(),
}


def _in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("why", "make"), LEFT_OUT.items(), ids=LEFT_OUT)
def test_what_no_file_can_hold_is_said(
    server: RunningServer, model_name: str, why: str, make: Callable[[], Tensor]
) -> None:
    module = Held(0)
    module.register_buffer("odd", make())
    with pytest.warns(RuntimeWarning, match=rf"will lack these buffers of the module: 'odd' \({why}\)"):
        session, remote = _attached(server, model_name, "w0", module)
    _train(module, remote, 2)
    session.close()
    held = _exported(server, model_name)
    assert set(held) == set(module.state_dict()) - {"odd"}


def test_a_buffer_over_a_parameter_s_memory(server: RunningServer, model_name: str) -> None:
    """It comes down first: the parameter's own value is the one that counts."""
    module = Held(0)
    module.register_buffer("seen", module.out.weight.detach())
    session, remote = _attached(server, model_name, "w0", module)
    _train(module, remote, 3)
    remote._attached.extras._module = None  # so that the end sends nothing newer
    session.close()
    again = Held(1)
    again.register_buffer("seen", again.out.weight.detach())
    _attached(server, model_name, "w0", again)
    assert torch.equal(again.out.weight, module.out.weight)
    assert torch.equal(again.seen, module.out.weight)  # type: ignore[arg-type]


def test_a_large_file_comes_in_pieces(server: RunningServer, model_name: str) -> None:
    module = Held(0)
    module.register_buffer("large", torch.randn(3 << 20))
    _attached(server, model_name, "w0", module)
    other = Held(1)
    other.register_buffer("large", torch.zeros(3 << 20))
    _attached(server, model_name, "w1", other)
    _check_same(other, module.state_dict())

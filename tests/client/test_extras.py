"""A module's buffers and frozen values: exports and snapshots hold them, so a checkpoint loads whole."""

from __future__ import annotations

import torch
from harness import RunningServer
from safetensors.torch import load
from torch import nn

from pushstep.optim import Adadelta


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

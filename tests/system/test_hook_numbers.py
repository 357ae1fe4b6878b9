"""Every hook that changes numbers, through REST and a worker's pushes: 20 steps against torch's and Keras's own."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pushstep.client import Session
from pushstep.optim import keras as terms
from pushstep.optim.ops.normal import noise_key, normals
from tests.support.numbers.optimizer_peers import KerasRun
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import add_hook, restore, take_snapshot
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad, backward, both
from tests.support.trainings.twins import Twins

STEPS = 20
CLIP_VALUE, MAX_NORM, SEED, ETA, GAMMA = 0.02, 0.05, 7, 1e-3, 0.55
# A norm in float32, as torch takes it, beside one in float64: of 50 elements.
NORMS = {"rtol": 2e-6, "atol": 1e-7}
Params = list[tuple[str, nn.Parameter]]


def values(parameter: nn.Parameter) -> Tensor:
    """A gradient's elements; of a sparse one those of its rows, duplicates summed as torch does."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        parameter.grad = parameter.grad.coalesce()
        return parameter.grad.values()
    return parameter.grad


def clip_value(params: Params, version: int) -> None:
    if any(p.grad is not None and p.grad.is_sparse for _, p in params):
        for _, p in params:
            values(p).clamp_(-CLIP_VALUE, CLIP_VALUE)
    else:
        torch.nn.utils.clip_grad_value_([p for _, p in params], CLIP_VALUE)


def clip_by(norm_type: float) -> Callable[[Params, int], None]:
    def clip(params: Params, version: int) -> None:
        stand_ins = [nn.Parameter(torch.zeros_like(values(p))) for _, p in params]
        for stand_in, (_, p) in zip(stand_ins, params, strict=True):
            stand_in.grad = values(p)
        torch.nn.utils.clip_grad_norm_(stand_ins, MAX_NORM, norm_type)

    return clip


def keras_global(params: Params, version: int) -> None:
    norm = torch.stack([values(p).norm() for _, p in params]).norm()
    for _, p in params:
        values(p).mul_(MAX_NORM / max(norm, torch.tensor(MAX_NORM)))


def keras_each(params: Params, version: int) -> None:
    for _, p in params:
        g = values(p)
        g.mul_(MAX_NORM / max(g.norm(), torch.tensor(MAX_NORM)))


def centralize(params: Params, version: int) -> None:
    for _, p in params:
        if (g := values(p)).dim() > 1:
            g.sub_(g.mean(dim=tuple(range(1, g.dim())), keepdim=True))


def noise(params: Params, version: int) -> None:
    stddev = (ETA / float(version) ** GAMMA) ** 0.5
    for index, (_, p) in enumerate(params):
        g = values(p)
        numbers = np.arange(p.numel()).reshape(p.shape)
        if p.grad is not None and p.grad.is_sparse:
            numbers = numbers[p.grad.indices()[0].numpy()]
        drawn = normals(noise_key(SEED, version, index), numbers.reshape(-1)).reshape(g.shape)
        g.add_(torch.from_numpy(stddev * drawn).to(g.dtype))


Hook = tuple[str, dict[str, Any]]
HOOKS: dict[str, tuple[Hook, Callable[[Params, int], None], bool]] = {
    "by value": (("clip_grad_value", {"clip_value": CLIP_VALUE}), clip_value, True),
    "by norm": (("clip_grad_norm", {"max_norm": MAX_NORM}), clip_by(2.0), False),
    **{
        f"by norm {norm_type}": (
            ("clip_grad_norm", {"max_norm": MAX_NORM, "norm_type": norm_type}),
            clip_by(float(norm_type)),
            False,
        )
        for norm_type in ("inf", 1.0, 3.5)
    },
    "by global norm": (("global_clipnorm", {"global_clipnorm": MAX_NORM}), keras_global, False),
    "each by norm": (("clipnorm", {"clipnorm": MAX_NORM}), keras_each, False),
    "centralized": (("gradient_centralization", {}), centralize, False),
    "noise": (("gradient_noise", {"eta": ETA, "gamma": GAMMA, "seed": SEED}), noise, True),
}
CHAINS = {
    **{name: [name] for name in HOOKS},
    "value, then norm": ["by value", "by norm"],
    "norm, then value": ["by norm", "by value"],
    "each norm of torch's": ["by norm inf", "by norm 3.5", "by norm 1.0", "by norm"],
    "all of them": ["noise", "by value", "centralized", "each by norm", "by global norm", "by norm"],
    "norms only": ["each by norm", "by norm", "by global norm"],
    "value twice": ["by value", "by value"],
}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_are_changed_as_torch_changes_them(
    server: RunningServer, model_name: str, name: str, sparse: bool
) -> None:
    """The twin here changes its gradients by torch's own functions, in the hooks' order, and steps."""
    chain = [HOOKS[each] for each in CHAINS[name]]
    shared = {"shared_memory": True, "address": f"unix:{server.unix}"} if name != "norms only" else {}
    with server.connect(model_name, **shared) as session:
        twins = Twins(session, Network(sparse=sparse), both if sparse else adagrad)
        for (hook, settings), _, _ in chain:
            add_hook(server, model_name, hook, "step_pre", settings)
        exact = all(is_exact for *_, is_exact in chain)
        for seed in range(STEPS):
            backward(twins.model, [twins.remote], seed)
            backward(twins.local_model, twins.local, seed)
            before = [p.grad.clone() for p in twins.model.parameters() if p.grad is not None]
            twins.remote.step()
            for _, change, _ in chain:
                change(list(twins.local_model.named_parameters()), seed + 1)
            for optimizer in twins.local:
                optimizer.step()
            after = [p.grad for p in twins.model.parameters() if p.grad is not None]
            # hooks leave the worker's own gradients alone, also where they lie in shared memory
            for one, other in zip(before, after, strict=True):
                assert torch.equal(one.to_dense(), other.to_dense())
            if exact:
                twins.check()
        theirs = dict(twins.local_model.named_parameters())
        for key, parameter in twins.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), theirs[key].detach(), **NORMS)
        check_receipt(twins, CHAINS[name])


def check_receipt(twins: Twins, chain: Sequence[str]) -> None:
    receipt = twins.remote.last_receipt
    assert receipt is not None
    if any(name.startswith("by norm") or name == "by global norm" for name in chain):
        assert 0 < receipt.clip_factor < 1 or len(chain) > 1
    else:
        assert receipt.clip_factor == 1
    assert any("gradient" in note for note in receipt.notes)


@dataclass(frozen=True)
class Peer:
    """A hook, and the argument of Keras's optimizer that it is."""

    hook: tuple[str, str, dict[str, Any]]
    argument: dict[str, Any]


PEERS = {
    "clipvalue": Peer(("clip_grad_value", "step_pre", {"clip_value": 0.3}), {"clipvalue": 0.3}),
    "clipnorm": Peer(("clipnorm", "step_pre", {"clipnorm": 0.5}), {"clipnorm": 0.5}),
    "global_clipnorm": Peer(
        ("global_clipnorm", "step_pre", {"global_clipnorm": 0.5}), {"global_clipnorm": 0.5}
    ),
    "use_ema": Peer(("ema", "step_post", {"momentum": 0.9}), {"use_ema": True, "ema_momentum": 0.9}),
    "ema_overwrite_frequency": Peer(
        ("ema", "step_post", {"momentum": 0.8, "overwrite_frequency": 3}),
        {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_hooks_are_kerass_arguments(server: RunningServer, session: Session, name: str) -> None:
    """The real Keras optimizer beside the served one with the hook; now and then a parameter has no gradient."""
    peer = PEERS[name]
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator) for shape in ((7, 5), (11,), ())]
    params = [nn.Parameter(value.clone()) for value in start]
    remote = session.attach(terms.Adagrad(params, learning_rate=0.1), names=["a", "b", "c"])
    hook = add_hook(server, session.model, *peer.hook)
    theirs = KerasRun("Adagrad", start, torch.float32, learning_rate=0.1, **peer.argument)
    for step in range(STEPS):
        grads: list[Tensor | None] = [torch.randn(value.shape, generator=generator) for value in start]
        if step % 5 == 3:
            grads[1] = None
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        remote.step()
        with pytest.warns(UserWarning) if grads[1] is None else contextlib.nullcontext():
            theirs.step(grads)
        for param, expected in zip(params, theirs.params, strict=True):
            torch.testing.assert_close(param.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    if "ema" in name:
        found = exported(server, session.model, hook["id"])
        for key, states in zip("abc", theirs.states, strict=True):
            torch.testing.assert_close(found[key], states["average"].detach(), rtol=1e-6, atol=1e-6)


def exported(
    server: RunningServer, model: str, hook: str, what: str = "export", form: str = "safetensors"
) -> dict[str, Tensor]:
    """The averages of a hook, as a file has them."""
    answer = server.rest("GET", f"/v1/models/{model}/{what}", params={"average": hook, "format": form})
    assert answer.status_code == 200, answer.text
    if form == "safetensors":
        return load(answer.content)
    found: dict[str, Tensor] = torch.load(io.BytesIO(answer.content), weights_only=True)["model"]
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
def test_averages_are_torchs_and_are_kept(server: RunningServer, model_name: str, sparse: bool) -> None:
    """torch's AveragedModel; of rows that no gradient names, too. A snapshot, a restore and a torch file have them."""
    with server.connect(model_name) as session:
        network = Network(sparse=sparse)
        remote = session.attach(adagrad(network), module=network)
        hook = add_hook(server, model_name, "ema", "step_post", {"momentum": 0.75})["id"]
        first = {name: p.detach().clone() for name, p in network.named_parameters()}
        assert same(exported(server, model_name, hook), first)
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        for seed in range(STEPS):
            backward(network, [remote], seed)
            remote.step()
            average.update_parameters(network)
        theirs = dict(average.module.named_parameters())
        found = exported(server, model_name, hook)
        assert found.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(found[name], expected.detach(), rtol=2e-6, atol=1e-7)
        # the same file in torch's format, and as a snapshot's content
        assert same(exported(server, model_name, hook, form="torch"), found)
        snapshot = take_snapshot(server, model_name)["id"]
        assert same(exported(server, model_name, hook, f"snapshots/{snapshot}/content"), found)
        # what is trained after it is undone by a restore, in the averages as in the parameters
        kept = copy.deepcopy(found)
        for seed in range(2):
            backward(network, [remote], seed)
            remote.step()
        assert not same(exported(server, model_name, hook), kept)
        restore(server, model_name, snapshot)
        assert same(exported(server, model_name, hook), kept)
        state = server.rest("GET", f"/v1/models/{model_name}/state-dict").json()["hooks"]
        assert [entry["state"] for entry in state] == [{"steps": STEPS, "groups": [0]}]
        missing = server.rest("GET", f"/v1/models/{model_name}/export?average=ema-9")
        assert (missing.status_code, missing.json()["code"]) == (404, "unknown_hook")


def test_averages_that_overwrite_reach_every_reader(server: RunningServer, model_name: str) -> None:
    """Workers that share memory, that pull rows they have, and that join later: all have the averages."""
    with (
        server.connect(model_name, "frames", shared_memory=False) as one,
        server.connect(model_name, "memory", address=f"unix:{server.unix}") as other,
    ):
        networks = [Network(sparse=True) for _ in range(2)]
        remotes = [
            session.attach(both(network), module=network)
            for session, network in zip((one, other), networks, strict=True)
        ]
        hook = add_hook(server, model_name, "ema", "step_post", {"momentum": 0.5, "overwrite_frequency": 2})[
            "id"
        ]
        for seed in range(4):
            for number, (network, remote) in enumerate(zip(networks, remotes, strict=True)):
                backward(network, [remote], seed)
                remote.step()
                receipt = remote.last_receipt
                assert receipt is not None
                found = exported(server, model_name, hook)
                is_average = same(found, dict(network.state_dict()))
                assert is_average == (receipt.version % 2 == 0 or receipt.version == 1), (seed, number)


def test_a_half_model_has_float32_averages(server: RunningServer, model_name: str) -> None:
    """Averages of bfloat16 parameters move by less than a bfloat16 can hold; they are sent rounded."""
    with server.connect(model_name) as session:
        network = Network(dtype=torch.bfloat16)
        remote = session.attach(adagrad(network), module=network)
        hook = add_hook(server, model_name, "ema", "step_post", {"momentum": 0.999})["id"]
        expected = {}
        for seed in range(5):
            backward(network, [remote], seed)
            remote.step()
            for name, p in network.named_parameters():
                now = p.detach().double()
                expected[name] = now if seed == 0 else expected[name] + 0.001 * (now - expected[name])
        for name, value in exported(server, model_name, hook).items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, expected[name].to(torch.bfloat16)), name

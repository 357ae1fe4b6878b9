"""Parameters over one storage: whatever lies over each other is stepped one after the other, as torch does it."""

from __future__ import annotations

import copy

import pytest
import torch

from pushstep.optim import Adadelta, Adagrad, mlx
from pushstep.optim import keras as keras
from pushstep.optim.cpu import dense as backend
from pushstep.optim.step.overlaps import waves_of

N = 60_000
MAKES = {
    "Adagrad": lambda params: Adagrad(params, lr=0.5),
    "Adadelta": lambda params: Adadelta(params, lr=1.0, sparse=True),
    "Adadelta, decay": lambda params: Adadelta(params, weight_decay=0.1),
    "Keras": lambda params: keras.Adadelta(params, 0.5, weight_decay=0.1, use_ema=True),
    "MLX": lambda params: mlx.Adagrad(params, 0.5),
}
STORAGE = 2 * N + 10


def _whole(memory):
    return memory[:N]


# Which views of one storage are parameters: (start, function of the storage).
TIES = {
    "one view": [_whole, _whole],
    "one view, three times": [_whole, _whole, _whole],
    "the second half of the first": [_whole, lambda m: m[N // 2 : N // 2 + N]],
    "by one element": [_whole, lambda m: m[1 : N + 1]],
    "inside": [lambda m: m[: 2 * N], lambda m: m[100:200], lambda m: m[150:N]],
    "among others": [
        lambda m: m[2 * N :],
        _whole,
        lambda m: m[N : N + 5],
        _whole,
        lambda m: m[N + 5 : 2 * N],
    ],
    "transposed": [lambda m: m[:N].view(300, 200), lambda m: m[:N].view(200, 300).t()],
    "with gaps": [_whole, lambda m: m[: 2 * N].view(N, 2)[:, 0]],
    "a column beside a column": [
        lambda m: m[: 2 * N].view(N, 2)[:, 0],
        lambda m: m[: 2 * N].view(N, 2)[:, 1],
    ],
}


@pytest.fixture(autouse=True)
def _many_slices(monkeypatch):
    """Short slices for several threads: an update that two of them make at once is lost."""
    monkeypatch.setattr(backend, "SLICE_ELEMENTS", 1 << 10)
    monkeypatch.setattr(backend, "INLINE_ELEMENTS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _tied(views):
    memory = torch.randn(STORAGE, generator=torch.Generator().manual_seed(0))
    params = []
    for view in views:
        params.append(torch.nn.Parameter(torch.empty(0)))
        params[-1].data = view(memory)
    return memory, params


def _set_grads(params, k, sparse=()):
    draw = torch.Generator().manual_seed(k)
    for number, param in enumerate(params):
        grad = torch.randn(param.shape, generator=draw)
        if number in sparse:
            ids = torch.randint(0, len(param), (1, 40), generator=draw)
            rows = torch.randn(40, *param.shape[1:], generator=draw)
            grad = torch.sparse_coo_tensor(ids, rows, param.shape, check_invariants=True)
        param.grad = grad


def _run(make, views, *, together, steps=6, sparse=()):
    """The storage after some steps of one optimizer, or of one for each parameter in their order."""
    memory, params = _tied(views)
    optimizers = [make(params)] if together else [make([param]) for param in params]
    for k in range(steps):
        _set_grads(params, k, sparse)
        for optimizer in optimizers:
            optimizer.step()
    states = [
        value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()
    ]
    return [memory, *states]


@pytest.mark.parametrize("views", TIES.values(), ids=TIES)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_list_is_stepped_as_its_parameters_one_by_one(make, views):
    if make is MAKES["Keras"] and len(views) != 2:
        views = views[:2]
    got, want = _run(make, views, together=True), _run(make, views, together=False)
    if make is MAKES["Keras"]:  # averages are taken of all parameters after all of them have moved
        got, want = got[:1], want[:1]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sparse", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", ["Adagrad", "Adadelta"])
def test_rows_and_a_dense_gradient_of_one_storage_keep_their_order(name, sparse):
    views = [lambda m: m[:N].view(-1, 30), lambda m: m[:N].view(-1, 60)]
    got = _run(MAKES[name], views, together=True, sparse=sparse)
    want = _run(MAKES[name], views, together=False, sparse=sparse)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("views", TIES.values(), ids=TIES)
def test_the_numbers_are_torchs(views):
    # torch's fused Adagrad takes IEEE's roots as the kernels do, so nothing is left to rounding; its for-loops do not
    got = _run(MAKES["Adagrad"], views, together=True)[0]
    if all(view(torch.empty(STORAGE)).is_contiguous() for view in views):
        fused = _run(lambda params: torch.optim.Adagrad(params, lr=0.5, fused=True), views, together=True)[0]
        assert torch.equal(got, fused)
    plain = _run(lambda params: torch.optim.Adagrad(params, lr=0.5), views, together=True, steps=1)[0]
    ours = _run(MAKES["Adagrad"], views, together=True, steps=1)[0]
    # an ulp of the largest parameter for each that lies there, three at most
    torch.testing.assert_close(ours, plain, rtol=0, atol=3 * 2.0**-21)


def test_a_state_that_two_parameters_share():
    def run(together):
        params = [torch.nn.Parameter(torch.ones(N)) for _ in range(2)]
        optimizers = [Adagrad(params)] if together else [Adagrad([p]) for p in params]
        shared = torch.zeros(N)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                state["sum"] = shared
        for k in range(5):
            _set_grads(params, k)
            for optimizer in optimizers:
                optimizer.step()
        return [*(p.detach() for p in params), shared]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_two_parameters_share_and_that_is_unscaled():
    def run(together):
        params = [torch.nn.Parameter(torch.ones(N)) for _ in range(2)]
        optimizers = [Adagrad(params)] if together else [Adagrad([p]) for p in params]
        for _ in range(3):
            params[0].grad = params[1].grad = torch.full((N,), 64.0)
            for optimizer in optimizers:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
                optimizer.step()
        return [*(p.detach() for p in params), params[0].grad]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [Adadelta, Adagrad])
def test_a_state_over_its_own_parameter_is_refused_and_nothing_moves(make):
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = make(params)
    for param in params:
        param.grad = torch.ones(8)
    optimizer.step()
    memory = torch.ones(12)
    params[1].data = memory[:8]
    optimizer.state[params[1]][optimizer.rule.state_names[0]] = memory[4:]
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match="lies over each other"):
        optimizer.step()
    for a, b in zip(params, before[0], strict=True):
        assert torch.equal(a, b)
    assert optimizer.state[params[0]]["step"] == before[1]["state"][0]["step"] == 1


def test_ties_come_and_go_between_steps():
    params = [torch.nn.Parameter(torch.ones(N)) for _ in range(3)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together, alone = Adagrad(params), [Adagrad([p]) for p in twins]
    for k, tie in enumerate([None, (0, 2), (0, 2), None, (1, 2)]):
        for some in (params, twins):
            for p in some:
                p.data = p.data.clone()
            if tie is not None:
                some[tie[1]].data = some[tie[0]].data
            _set_grads(some, k)
        together.step()
        for optimizer in alone:
            optimizer.step()
        for a, b in zip(params, twins, strict=True):
            assert torch.equal(a, b)


def test_waves_keep_the_order_of_what_overlaps_and_nothing_else():
    memory = torch.zeros(100)
    apart = [memory[k : k + 10] for k in range(0, 100, 10)]
    assert waves_of([apart]) is None
    assert waves_of([[*apart, memory[100:], torch.empty(0)]]) is None
    assert waves_of([[memory[:10], memory[20:30], memory[5:25], memory[24:26], memory[50:]]]) == [
        [0, 1, 4],
        [2],
        [3],
    ]
    # a state counts as its parameter does
    assert waves_of([apart[:3], [apart[5], apart[6], apart[5]]]) == [[0, 1], [2]]

"""Layouts, whole optimizers and graphs on CUDA. In the interpreter or on a device: `test_cuda` runs this file."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pushstep.optim import Adadelta, Adagrad
from pushstep.optim.backends import dispatch
from pushstep.optim.cpu import dense as cpu
from pushstep.optim.cuda import steps as cuda
from pushstep.optim.cuda import tables as cuda_tables
from tests.support.cuda.comparison import BLOCK, DEVICE, INTERPRETED, REFERENCE, assert_same, count_launches
from tests.support.cuda.steps import OPTIONS, SIZES, make_step, moved


@pytest.fixture
def launches(monkeypatch):
    return count_launches(monkeypatch)


def channels_last(shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "transposed both": lambda: (torch.randn(31, 57).t(), torch.randn(31, 57).t()),
    "transposed grad": lambda: (torch.randn(57, 31), torch.randn(31, 57).t()),
    "transposed param": lambda: (torch.randn(31, 57).t(), torch.randn(57, 31)),
    "channels last": lambda: (channels_last((4, 8, 5, 3)), channels_last((4, 8, 5, 3))),
    "channels last param": lambda: (channels_last((4, 8, 5, 3)), torch.randn(4, 8, 5, 3)),
    "expanded grad": lambda: (torch.randn(64, 33), torch.randn(33).expand(64, 33)),
    "gaps": lambda: (torch.randn(64, 33, 2)[..., 0], torch.randn(64, 33)),
    "offset": lambda: (torch.randn(1025)[1:], torch.randn(1027)[3:]),
    "strided grad": lambda: (torch.randn(1000), torch.randn(3000)[::3]),
    "negated grad": lambda: (torch.randn(100), torch._neg_view(torch.randn(100))),
    "scalar": lambda: (torch.randn(()), torch.randn(())),
    "lazy zeros": lambda: (torch.randn(9), torch._efficientzerotensor(9)),
}


# of an expanded gradient, which "all" would write to, nothing is stepped: `test_operands`
CASES = [case for case in itertools.product(LAYOUTS, ("plain", "all")) if case != ("expanded grad", "all")]


class TestLayouts:
    @pytest.mark.parametrize(("layout", "option"), CASES)
    def test_like_contiguous(self, layout, option, launches):
        torch.manual_seed(0)
        param, grad = LAYOUTS[layout]()
        for rule in ("adadelta", "adagrad"):
            launches.clear()
            shapes = make_step(rule, (param.numel(), 5), options=OPTIONS[option])
            states = [[torch.empty_like(param).copy_(s[0].view(param.shape)), s[1]] for s in shapes.states]
            extra = {
                name: [torch.empty_like(param, dtype=t[0].dtype).copy_(t[0].view(param.shape)), t[1]]
                for name in ("ema", "copy_out")
                if (t := getattr(shapes, name))
            }
            odd = dataclasses.replace(
                shapes,
                params=[param, shapes.params[1]],
                grads=[grad, shapes.grads[1]],
                states=states,
                **extra,
            )

            def place(tensor):
                if tensor._is_zerotensor():
                    return torch._efficientzerotensor(tensor.shape, device=DEVICE)
                # .to and .clone keep neither gaps nor expansions: move the storage under the same view.
                if tensor.is_neg():
                    return torch._neg_view(place(torch._neg_view(tensor)))
                storage = (
                    torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE, copy=True)
                )
                return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

            def each(values, function):
                return [each(v, function) if isinstance(v, list) else function(v) for v in values]

            def rebuilt(function, odd=odd):
                lists = ("params", "grads", "states", "ema", "copy_out")
                fields = {
                    name: each(list(v), function) for name in lists if (v := getattr(odd, name)) is not None
                }
                return dataclasses.replace(odd, **fields)

            got, want = (
                rebuilt(place),
                rebuilt(lambda t: t.clone(memory_format=torch.contiguous_format).resolve_neg()),
            )
            assert got.grads[0].stride() == grad.stride()
            REFERENCE.step(want)
            cuda.step(got)
            assert launches == ["step_list"]  # copies or not, there is one launch
            assert_same(got, want)
            for a, b in zip(got.grads, want.grads, strict=True):
                assert torch.equal(a.cpu(), b)

    def test_shapes_must_agree(self):
        step = moved(make_step("adagrad", (6, 8)), DEVICE)
        step.grads[1] = step.grads[1][:4].view(2, 2)
        with pytest.raises(RuntimeError, match=r"the gradient has shape \(2, 2\), its parameter \(8,\)"):
            cuda.step(step)

    def test_refuses(self):
        assert cuda.refuses(torch.zeros(3, device=DEVICE)) is None
        assert "complex64" in (cuda.refuses(torch.zeros(3, dtype=torch.complex64, device=DEVICE)) or "")
        assert "share" in (cuda.refuses(torch.zeros(1, device=DEVICE).expand(3)) or "")


class TestOptimizers:
    """The classes over this backend, against torch."""

    @pytest.fixture(autouse=True)
    def through_cuda(self, monkeypatch):
        if INTERPRETED:
            monkeypatch.setitem(dispatch.BACKENDS, "cpu", dispatch.BACKENDS["cuda"])
        dispatch.backend.cache_clear()
        yield
        dispatch.backend.cache_clear()

    @pytest.mark.parametrize(
        "ours, theirs, arguments",
        [
            (Adadelta, torch.optim.Adadelta, {}),
            (
                Adadelta,
                torch.optim.Adadelta,
                {"lr": torch.tensor(0.5), "weight_decay": 0.1, "maximize": True},
            ),
            (Adagrad, torch.optim.Adagrad, {}),
            (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}),
        ],
    )
    def test_dense(self, ours, theirs, arguments, launches):
        torch.manual_seed(0)
        shapes = [(7, 5), (3,), (BLOCK + 1,)]
        mine = [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]
        yours = [p.detach().clone().requires_grad_() for p in mine]
        optimizers = ours(mine, **copy.deepcopy(arguments)), theirs(yours, **copy.deepcopy(arguments))
        for _ in range(5):
            for a, b in zip(mine, yours, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert "step_list" in launches
        for a, b in zip(mine, yours, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        for a, b in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
            assert a["step"].item() == b["step"].item() == 5

    def test_sparse(self, launches):
        torch.manual_seed(0)
        mine = torch.randn(20, 4, device=DEVICE).requires_grad_()
        yours = mine.detach().clone().requires_grad_()
        optimizers = Adagrad([mine], lr=0.1), torch.optim.Adagrad([yours], lr=0.1)
        with torch.sparse.check_sparse_tensor_invariants():
            for _ in range(3):
                ids = torch.randint(20, (1, 9), device=DEVICE)
                for p in (mine, yours):
                    p.grad = torch.sparse_coo_tensor(ids, torch.ones(9, 4, device=DEVICE), (20, 4))
                for optimizer in optimizers:
                    optimizer.step()
        assert "step_rows" in launches
        torch.testing.assert_close(mine, yours)

    def test_scaled(self):
        param = torch.ones(9, device=DEVICE).requires_grad_()
        optimizer = Adagrad([param], lr=0.1, fused=True)
        assert optimizer._step_supports_amp_scaling
        for found in (1.0, 0.0):
            param.grad = torch.full_like(param, 8.0)
            optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(found, device=DEVICE)
            optimizer.step()
        assert optimizer.state[param]["step"].item() == 1
        assert param.grad.unique().tolist() == [2.0]
        torch.testing.assert_close(param.detach(), torch.full_like(param, 0.9).detach())


@pytest.mark.gpu
class TestGraphs:
    """What the interpreter has nothing of: streams, capture, waiting."""

    def test_replay(self):
        counters = [torch.zeros(()) for _ in SIZES]
        want = make_step("adagrad", lr_decay=0.5, steps=counters, lr=torch.tensor(0.1))
        got = moved(want, DEVICE)
        got.found_inf, got.grad_scale = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
        want.grad_scale = 1.0
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            cuda.step(got)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda.step(got)
        for _ in range(3):
            graph.replay()
        got.found_inf.fill_(1)
        graph.replay()
        for _ in range(4):
            cpu.step(want)
        assert_same(got, want)

    def test_new_tensors_under_capture(self):
        warm = moved(make_step("adadelta"), DEVICE)
        cuda.step(warm)
        fresh = moved(make_step("adadelta", seed=3), DEVICE)
        want = moved(fresh, "cpu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda.step(fresh)
        for k in range(3 * cuda_tables.KEPT_TABLES):  # what the graph reads must outlive the cache
            cuda_tables.pointers(np.array([16 * k + 1]), DEVICE)
        graph.replay()
        cpu.step(want)
        assert_same(fresh, want)

    def test_counters_on_the_host_are_refused(self):
        step = moved(make_step("adagrad", (5,)), DEVICE)
        step.steps = [torch.zeros(())]
        cuda.step(step)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="fused=True"), torch.cuda.graph(graph):
            cuda.step(step)

    def test_nothing_waits(self):
        counters = [torch.zeros((), device=DEVICE) for _ in SIZES]
        step = moved(make_step("adagrad", lr_decay=0.5), DEVICE)
        step.steps, step.lr = counters, torch.tensor(0.1, device=DEVICE)
        step.grad_scale, step.found_inf = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
        cuda.step(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.grads = [g.clone() for g in step.grads]  # new addresses, so a new table too
            cuda.step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

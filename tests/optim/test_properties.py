"""Random groups, options, dtypes, sparsity, missing gradients, hooks and reloads: fused against torch's own path."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pushstep.optim import Adadelta, Adagrad

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

# Few combinations of dtype and flags, or a fresh machine compiles for minutes; what varies freely is data and shape.
OPTIONS = {
    Adadelta: st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1.0, 0.01]),
            "rho": st.sampled_from([0.0, 0.9, 1.0]),
            "eps": st.sampled_from([1e-6, 1e-3]),
        }
    ),
    Adagrad: st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.01, 1.0]),
            "lr_decay": st.sampled_from([0.0, 0.5]),
            "eps": st.sampled_from([1e-10, 1e-3]),
        }
    ),
}
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def runs(draw):
    make = draw(st.sampled_from([Adadelta, Adagrad]))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        options = draw(OPTIONS[make])
        sparse, row_wise = draw(st.booleans()), draw(st.booleans())
        if make is Adadelta or not sparse:  # torch's Adagrad refuses decay of sparse gradients
            flags = draw(
                st.sampled_from([{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}])
            )
            options = {**options, **flags}
        options = {**options, "row_wise": row_wise}
        if make is Adadelta:
            options["sparse"] = sparse
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
        if sparse:
            shapes = [(draw(st.integers(1, 20)), *shape[1:]) for shape in shapes]
        groups.append((options, dtype, shapes, sparse))
    steps = draw(st.integers(1, 4))
    return make, groups, steps, draw(st.integers(0, 2**31)), draw(st.booleans()), draw(st.booleans())


def _gradient(p, sparse, generator):
    kind = int(torch.randint(0, 5, (), generator=generator))
    if kind == 0:
        return None
    if not sparse:
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if kind == 1:
            return torch.zeros_like(g)
        if kind == 2 and p.dim() == 2:
            return g.t().contiguous().t()
        if kind == 3 and p.dim():
            return g[:1].expand(p.shape) if p.shape[0] else g
        return g
    count = int(torch.randint(0, 12, (), generator=generator))
    ids = torch.randint(0, p.shape[0], (1, count), generator=generator)
    values = torch.randn(count, *p.shape[1:], generator=generator, dtype=p.dtype)
    return torch.sparse_coo_tensor(ids, values, p.shape, check_invariants=True)


@settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "30")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(runs())
def test_the_fused_path_follows_torchs(run):
    make, groups, steps, seed, with_hooks, reload = run
    generator = torch.Generator().manual_seed(seed)
    mine, torchs, sparsity = [], [], []
    for options, dtype, shapes, sparse in groups:
        params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
        sparsity += [sparse] * len(shapes)
        mine.append({"params": params, **options})
        torchs.append({"params": [copy.deepcopy(p) for p in params], **options})
    fused, reference = make(mine), make(torchs, fused=False)
    if with_hooks:
        for optimizer in (fused, reference):
            optimizer.register_step_pre_hook(
                lambda o, *_: [g.update(lr=g["lr"] * 0.5) for g in o.param_groups] and None
            )
    both = [p for g in mine for p in g["params"]], [p for g in torchs for p in g["params"]]
    for _ in range(steps):
        for p, q, sparse in zip(*both, sparsity, strict=True):
            p.grad = _gradient(p, sparse, generator)
            q.grad = None if p.grad is None else p.grad.clone()
        fused.step()
        reference.step()
        if reload:
            twin = make([{name: g[name] for name in ("params", "row_wise")} for g in mine])
            twin.load_state_dict(copy.deepcopy(fused.state_dict()))
            if with_hooks:
                twin.register_step_pre_hook(
                    lambda o, *_: [g.update(lr=g["lr"] * 0.5) for g in o.param_groups] and None
                )
            fused = twin
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        a, b = fused.state.get(p, {}), reference.state.get(q, {})
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=2e-5, atol=1e-9)

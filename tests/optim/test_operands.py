"""Tensors that do not fit each other: every way into a kernel says so by name, and nothing has moved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pushstep.optim import RULES, Adadelta, Adagrad
from pushstep.optim.backends import reference as eager
from pushstep.optim.cpu import dense as cpu
from pushstep.optim.ops import rows
from pushstep.optim.ops import streaming as arriving
from pushstep.optim.ops.digest import xxh3_64
from pushstep.optim.ops.quantise import code_bytes, dequantise, dequantise_rows, quantise
from pushstep.optim.ops.select import select
from pushstep.optim.ops.sums import weighted_sum
from pushstep.optim.step.operands import OperandError
from pushstep.optim.step.step import RowStep, Step
from tests.support.numbers.row_steps import row_step

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ROWS, WIDTH, COUNT = 10, 4, 3


def dense(name="adadelta"):
    """A step of two parameters with everything that a step may have."""
    shapes = [(ROWS, WIDTH), (5,)]

    def some(dtype=F32):
        return [torch.ones(shape, dtype=dtype) for shape in shapes]

    return Step(
        rule=name, params=some(), grads=some(), states=[some() for _ in RULES[name].state_names], lr=0.1, eps=1e-6,
        rho=0.9, steps=[torch.tensor(1.0) for _ in shapes], ema=some(), copy_out=some(BF16), factor=[1.0, 0.5],
    )  # fmt: skip


def by_rows(name="adadelta"):
    """A step over rows."""
    return RowStep(
        rule=name, param=torch.ones(ROWS, WIDTH), ids=torch.tensor([1, 5, 1]), rows=torch.ones(COUNT, WIDTH),
        unique=False, states=[torch.ones(ROWS, WIDTH) for _ in RULES[name].state_names], lr=0.1, eps=1e-6, rho=0.9,
        steps=torch.tensor(1.0),
    )  # fmt: skip


def freed():
    tensor = torch.ones(ROWS, WIDTH)
    tensor.untyped_storage().resize_(0)
    return tensor


def expanded(rows=ROWS, dtype=F32):
    return torch.ones(1, WIDTH, dtype=dtype).expand(rows, WIDTH)


OVER = torch.ones(2 * ROWS * WIDTH)
META = torch.ones(ROWS, WIDTH, device="meta")
# name: (what is put in the place of the first parameter's, and what the error says)
DENSE = {
    "a gradient of fewer elements": ("grads", torch.ones(ROWS, 3), "gradient has shape"),
    "a gradient of another shape": ("grads", torch.ones(WIDTH, ROWS), "gradient has shape"),
    "a gradient elsewhere": ("grads", META, "gradient is on meta"),
    "a gradient of integers": ("grads", torch.ones(ROWS, WIDTH, dtype=torch.int64), "have a kernel"),
    "a sparse gradient": ("grads", torch.ones(ROWS, WIDTH).to_sparse(), "layout"),
    "a gradient that was freed": ("grads", freed(), "gradient has no memory"),
    "a state of fewer rows": ("states", torch.ones(4, WIDTH), "state has shape"),
    "one state per row beside another": ("states", torch.ones(ROWS, 1), "must be alike"),
    "a state of another dtype": ("states", torch.ones(ROWS, WIDTH, dtype=F64), "must be alike"),
    "a state elsewhere": ("states", META, "state is on meta"),
    "a state that was freed": ("states", freed(), "state has no memory"),
    "an average of fewer elements": ("ema", torch.ones(3), "ema has shape"),
    "an average elsewhere": ("ema", META, "ema is on meta"),
    "a copy of fewer elements": ("copy_out", torch.ones(3), "copy_out has shape"),
    "a copy of integers": ("copy_out", torch.ones(ROWS, WIDTH, dtype=torch.int8), "have a kernel"),
    "an expanded state": ("states", expanded(), "state is expanded"),
    "an expanded average": ("ema", expanded(), "ema is expanded"),
    "an expanded copy": ("copy_out", expanded(dtype=BF16), "copy_out is expanded"),
    "an expanded parameter": ("params", expanded(), "parameter is expanded"),
    "a sparse parameter": ("params", torch.ones(ROWS, WIDTH).to_sparse(), "layout"),
    "a counter of several": ("steps", torch.ones(2), "step counter has shape"),
    "a parameter that was freed": ("params", freed(), "parameter has no memory"),
}
LISTS = {
    "no gradient for the last": {"grads": [torch.ones(ROWS, WIDTH)]},
    "a state too few": {"states": [[torch.ones(ROWS, WIDTH), torch.ones(5)]]},
    "no states of the last": {"states": [[torch.ones(ROWS, WIDTH)]] * 2},
    "one counter for two": {"steps": [torch.tensor(1.0)]},
    "one average for two": {"ema": [torch.ones(ROWS, WIDTH)]},
    "one copy for two": {"copy_out": [torch.ones(ROWS, WIDTH)]},
    "one factor for two": {"factor": [0.5]},
    "a rule that has no kernel": {"rule": "keras_adadelta"},
}
BY_ROWS = {
    "more ids than rows": ({"ids": torch.arange(4)}, "4 row ids"),
    "fewer ids than rows": ({"ids": torch.arange(2)}, "2 row ids"),
    "ids in two dimensions": ({"ids": torch.ones(COUNT, 1, dtype=torch.int64)}, "1-d int64"),
    "ids of int32": ({"ids": torch.arange(COUNT, dtype=torch.int32)}, "1-d int64"),
    "ids that are no whole numbers": ({"ids": torch.ones(COUNT)}, "1-d int64"),
    "rows that are wider": ({"rows": torch.ones(COUNT, WIDTH + 1)}, "not rows of a table"),
    "rows that are narrower": ({"rows": torch.ones(COUNT, 1)}, "not rows of a table"),
    "rows without a width": ({"rows": torch.ones(COUNT)}, "not rows of a table"),
    "rows of integers": ({"rows": torch.ones(COUNT, WIDTH, dtype=torch.int32)}, "kernel"),
    "rows elsewhere": ({"rows": META[:COUNT]}, "on meta"),
    "a table without dimensions": ({"param": torch.tensor(1.0)}, "without dimensions"),
    "a table of fewer rows than its states": ({"param": torch.ones(6, WIDTH)}, "state has shape"),
    "a table that was freed": ({"param": freed()}, "has no memory"),
    "states of fewer rows": ({"states": [torch.ones(4, WIDTH)] * 2}, "state has shape"),
    "states of fewer columns": ({"states": [torch.ones(ROWS, 2)] * 2}, "state has shape"),
    "one state of another shape": (
        {"states": [torch.ones(ROWS, WIDTH), torch.ones(ROWS, 1)]},
        "must be alike",
    ),
    "one state of another dtype": (
        {"states": [torch.ones(ROWS, WIDTH), torch.ones(ROWS, WIDTH, dtype=F64)]},
        "must be alike",
    ),
    "a state too few": ({"states": [torch.ones(ROWS, WIDTH)]}, "keeps 2 states"),
    "an expanded table": ({"param": expanded()}, "parameter is expanded"),
    "an expanded state": ({"states": [torch.ones(ROWS, WIDTH), expanded()]}, "state is expanded"),
    "sparse states": ({"states": [torch.ones(ROWS, WIDTH).to_sparse()] * 2}, "layout"),
    "one state for two": ({"states": [torch.ones(ROWS, WIDTH)] * 2}, "over each other in memory"),
    "a state over the table": (
        {
            "param": OVER[:40].view(ROWS, WIDTH),
            "states": [torch.ones(ROWS, WIDTH), OVER[39:79].view(ROWS, WIDTH)],
        },
        "over each other in memory",
    ),
    "a state elsewhere": ({"states": [META, META]}, "state is on meta"),
    "a counter of several": ({"steps": torch.ones(2)}, "step counter has shape"),
}


def contents(step):
    """The bytes of everything that a step may write to."""
    found = []
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        stack = list(value) if isinstance(value, list | tuple) else [value]
        while stack:
            one = stack.pop()
            if isinstance(one, list | tuple):
                stack += one
            elif isinstance(one, torch.Tensor) and one.is_cpu and one.layout is torch.strided:
                held = one.untyped_storage().nbytes() >= one.nbytes
                found.append(one.clone() if held else None)
    return found


def assert_refused(call, step, match):
    before = contents(step)
    with pytest.raises(OperandError, match=match):
        call(step)
    for a, b in zip(contents(step), before, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("what, wrong, match", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("place", [0, 1])
def test_a_dense_step(what, wrong, match, place):
    step = dense()
    if what == "states":
        step.states[1][0] = wrong
    else:
        getattr(step, what)[0] = wrong
    if place:  # behind one that fits, which must not have moved either
        for some in (step.params, step.grads, *step.states, step.steps, step.ema, step.copy_out):
            some.reverse()
    assert_refused(cpu.step, step, match)
    if "memory" not in match and "kernel" not in match:
        assert_refused(eager.step, step, match)


@pytest.mark.parametrize("written", [{"grad_scale": 2.0}, {"zero_grad": True}], ids=str)
@pytest.mark.parametrize("backend", [cpu, eager], ids=["cpu", "eager"])
def test_an_expanded_gradient_that_is_written_to(backend, written):
    step = dense()
    step.grads[0] = expanded()
    assert_refused(backend.step, dataclasses.replace(step, **written), "gradient is expanded")
    backend.step(step)  # to be read it may be


@pytest.mark.parametrize("wrong", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("backend", [cpu, eager], ids=["cpu", "eager"])
def test_lists_of_other_lengths(wrong, backend):
    assert_refused(
        backend.step, dataclasses.replace(dense(), **wrong), "beside 2 parameters|keeps 2 states|no kernel"
    )


@pytest.mark.parametrize("wrong, match", BY_ROWS.values(), ids=BY_ROWS)
def test_a_step_over_rows(wrong, match):
    step = dataclasses.replace(by_rows(), **wrong)
    assert_refused(cpu.step_rows, step, match)
    if "memory" not in match and "kernel" not in match:
        assert_refused(eager.step_rows, step, match)
    given = {name: getattr(step, name) for name in ("param", "ids", "rows")}
    with pytest.raises(OperandError) if step.steps.numel() == 1 else pytest.raises(AssertionError):
        cpu.step_rows(row_step(RULES["adadelta"], **given, states=step.states, unique=False))
        raise AssertionError("without counters it fits")


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("backend", [cpu, eager], ids=["cpu", "eager"])
def test_an_id_outside_of_the_table_moves_no_counter(backend, unique):
    for bad in (-1, ROWS):
        step = dataclasses.replace(by_rows(), ids=torch.tensor([1, bad, 2]), unique=unique)
        before = contents(step)
        with pytest.raises(IndexError, match=f"index {bad} is out of bounds"):
            backend.step_rows(step)
        for a, b in zip(contents(step), before, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["gradient", "state", "second state", "copy"])
def test_a_rule_over_one_tensor(what):
    """The way of the server's arenas."""
    rule = RULES["adadelta"]
    tensors = {name: torch.ones(8) for name in ("param", "gradient", "state", "second state", "copy")}
    for wrong in (torch.ones(7), torch.ones(9), torch.ones(2, 4), torch.ones(8, device="meta")):
        given = {**tensors, what: wrong}
        with pytest.raises(OperandError):
            rule.step_dense(
                given["param"], given["gradient"], [given["state"], given["second state"]], rule.defaults, step=1,
                copy_out=given["copy"],
            )  # fmt: skip
    assert all(torch.equal(tensor, torch.ones(8)) for tensor in tensors.values())


@pytest.mark.parametrize("make", [lambda p: Adadelta(p, sparse=True), Adagrad], ids=["Adadelta", "Adagrad"])
def test_a_checkpoint_of_a_smaller_vocabulary(make):
    small, large = torch.nn.Parameter(torch.ones(4, 8)), torch.nn.Parameter(torch.ones(900, 8))
    first, second = make([small]), make([large])
    small.grad = torch.ones(4, 8)
    first.step()
    buffer = torch.full((1000,), 7.0)
    saved = first.state_dict()
    for name, value in saved["state"][0].items():
        if value.dim():
            saved["state"][0][name] = buffer[:32].view(4, 8)
    second.load_state_dict(saved)
    for grad in (
        torch.sparse_coo_tensor([[1, 500, 899]], torch.ones(3, 8), (900, 8), check_invariants=True),
        torch.ones(900, 8),
    ):
        large.grad = grad
        with pytest.raises(RuntimeError, match=r"state has shape \(4, 8\), its parameter \(900, 8\)"):
            second.step()
    assert (buffer == 7).all()
    assert (large == 1).all()
    assert second.state[large]["step"] == 1


def _quantised(**wrong):
    block, length, units = 256, 300, 2
    given = {
        "source": torch.ones(units * length), "residual": torch.ones(units * length),
        "rest": torch.ones(units * length), "length": length, "block": block,
        "codes": torch.zeros(units * code_bytes(length, block), dtype=torch.uint8),
    }  # fmt: skip
    given.update(wrong)
    return lambda: quantise(**given)


def _dequantised(**wrong):
    lengths, block = [300, 40], 256
    given = {
        "codes": torch.zeros(sum(code_bytes(n, block) for n in lengths), dtype=torch.uint8),
        "values": torch.ones(sum(lengths)), "lengths": lengths, "block": block,
    }  # fmt: skip
    given.update(wrong)
    return lambda: dequantise(**given)


def _selected(**wrong):
    given = {
        "source": torch.ones(100), "residual": torch.ones(100), "rest": torch.ones(100), "k": 10, "wire": F32,
    }  # fmt: skip
    given.update(wrong)
    return lambda: select(**given)


def _summed(**wrong):
    given = {
        "total": torch.ones(50), "terms": [torch.ones(50), torch.ones(50)], "weights": [1.0, 2.0], "divisor": 3.0,
        "sizes": [20, 30],
    }  # fmt: skip
    given.update(wrong)
    return lambda: weighted_sum(**given)


STREAMED = torch.zeros(code_bytes(40, 256), dtype=torch.uint8)
OTHERS = {
    "quantise, a short residual": _quantised(residual=torch.ones(599)),
    "quantise, a residual of half floats": _quantised(residual=torch.ones(600, dtype=BF16)),
    "quantise, a rest of half floats": _quantised(rest=torch.ones(600, dtype=BF16)),
    "quantise, a short rest": _quantised(rest=torch.ones(10)),
    "quantise, few codes": _quantised(codes=torch.zeros(600, dtype=torch.uint8)),
    "quantise, codes of int8": _quantised(codes=torch.zeros(624, dtype=torch.int8)),
    "quantise, no whole units": _quantised(source=torch.ones(700)),
    "quantise, integers": _quantised(source=torch.ones(600, dtype=torch.int64)),
    "quantise, gaps": _quantised(source=torch.ones(1200)[::2]),
    "quantise, blocks from below": _quantised(begin=-1),
    "quantise, blocks from beyond": _quantised(begin=5),
    "quantise, no blocks": _quantised(block=0),
    "dequantise, few codes": _dequantised(codes=torch.zeros(340, dtype=torch.uint8)),
    "dequantise, few values": _dequantised(values=torch.ones(339)),
    "dequantise, values of half floats": _dequantised(values=torch.ones(340, dtype=BF16)),
    "dequantise, a length below zero": _dequantised(lengths=[300, -40]),
    "dequantise, blocks across borders": _dequantised(block=300),
    "dequantise rows, three dimensions": lambda: dequantise_rows(STREAMED, torch.ones(1, 4, 10), block=256),
    "dequantise rows, few codes": lambda: dequantise_rows(STREAMED[1:], torch.ones(1, 40), block=256),
    "select, a short residual": _selected(residual=torch.ones(99)),
    "select, a residual of half floats": _selected(residual=torch.ones(100, dtype=BF16)),
    "select, a residual of another dtype": _selected(residual=torch.ones(100, dtype=F64)),
    "select, a short rest": _selected(rest=torch.ones(99)),
    "select, a rest of half floats": _selected(rest=torch.ones(100, dtype=BF16), residual=None),
    "select, more than there are": _selected(k=101),
    "select, none of them": _selected(k=0),
    "select, in integers": _selected(wire=torch.int32),
    "sums, a short term": _summed(terms=[torch.ones(50), torch.ones(49)]),
    "sums, terms of two dtypes": _summed(terms=[torch.ones(50), torch.ones(50, dtype=F64)]),
    "sums, a weight too few": _summed(weights=[1.0]),
    "sums, no terms": _summed(terms=[], weights=[]),
    "sums, a short total": _summed(total=torch.ones(49)),
    "sums, a total of half floats": _summed(total=torch.ones(50, dtype=BF16)),
    "sums, sizes of more": _summed(sizes=[20, 31]),
    "sums, a size below zero": _summed(sizes=[60, -10]),
    "arriving, few values": lambda: arriving.floats(torch.ones(9), arriving.Blocks([4, 6])),
    "arriving, a length below zero": lambda: arriving.floats(torch.ones(9), arriving.Blocks([10, -1])),
    "arriving, integers": lambda: arriving.floats(torch.ones(10, dtype=torch.int64), arriving.Blocks([4, 6])),
    "arriving, few codes": lambda: arriving.codes(
        STREAMED[1:], torch.ones(40), arriving.Blocks([40]), block=256
    ),
    "arriving, few values of codes": lambda: arriving.codes(
        STREAMED, torch.ones(39), arriving.Blocks([40]), block=256
    ),
    "arriving, values of half floats": lambda: arriving.codes(
        STREAMED, torch.ones(40, dtype=BF16), arriving.Blocks([40]), block=256
    ),
    "coalesce, more ids than rows": lambda: rows.coalesce(torch.arange(4), torch.ones(3, 2)),
    "coalesce, ids of int32": lambda: rows.coalesce(torch.arange(3, dtype=torch.int32), torch.ones(3, 2)),
    "coalesce, ids in two dimensions": lambda: rows.coalesce(
        torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 2)
    ),
    "coalesce, no rows": lambda: rows.coalesce(torch.arange(1), torch.tensor(1.0)),
    "digest, floats": lambda: xxh3_64(b"", [torch.ones(1 << 18)]),
    "digest, two dimensions": lambda: xxh3_64(b"", [torch.zeros(2, 1 << 18, dtype=torch.uint8)]),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_every_other_way_into_a_kernel(call):
    with pytest.raises(OperandError):
        call()


def test_the_kinds_that_are_there_fit():
    for make in (_quantised, _dequantised, _selected, _summed):
        make()()
    for backend in (cpu, eager):
        backend.step(dense())
        backend.step_rows(by_rows())

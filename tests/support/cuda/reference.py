"""What a step is, from the equations of torch's and Keras's documentation, in float64: for any kernel to be held to.

Nothing here follows a kernel's order of operations. Numbers are `Near`: a value, and how far a computation in the step's
own precision may be from it, whatever order it takes and wherever it rounds once instead of twice. So a result that is
farther off is another formula, and not another rounding.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from pushstep.optim.step.step import number

# Half the distance of neighbours, relative to a number: what one rounding may add; and the smallest that there is.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}


@dataclasses.dataclass
class Near:
    """Numbers, and how far from them a computation in `dtype` may have come."""

    value: np.ndarray
    error: np.ndarray
    dtype: torch.dtype

    def rounded(self, value, error, dtype=None):
        dtype = dtype or self.dtype
        # a rounding of what was computed, which is at most `error` from the value
        added = ROUNDING[dtype] * (np.abs(value) + error) + SMALLEST[dtype]
        return Near(value, error + added, self.dtype)

    def _other(self, other):
        if isinstance(other, Near):
            return other
        value = np.asarray(other, np.float64)
        return Near(
            value, ROUNDING[self.dtype] * np.abs(value), self.dtype
        )  # a number of the host, rounded once

    def __add__(self, other):
        other = self._other(other)
        return self.rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        return self + -self._other(other)

    def __neg__(self):
        return Near(-self.value, self.error, self.dtype)

    def __mul__(self, other):
        other = self._other(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return self.rounded(self.value * other.value, error)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other):
        other = self._other(other)
        least = np.abs(other.value) - other.error
        assert (least > 0).all(), "a divisor that may be zero has no bound"
        value = self.value / other.value
        return self.rounded(value, (self.error + np.abs(value) * other.error) / least)

    def sqrt(self):
        """Of what is positive by more than its error: eps is inside, or the sum has begun."""
        value = np.sqrt(self.value)
        least = np.sqrt(np.maximum(self.value - self.error, 0))
        return self.rounded(
            value, np.where(self.error > 0, self.error / np.maximum(value + least, 1e-300), 0)
        )

    def clip(self, bound):
        bound = self._other(bound)
        return Near(np.clip(self.value, -bound.value, bound.value), self.error + bound.error, self.dtype)

    def mean_over_rows(self):
        """Summed in float64."""
        return self.rounded(self.value.mean(1, keepdims=True), self.error.mean(1, keepdims=True))

    def held(self, dtype):
        """As it lies in memory."""
        return self.rounded(self.value, self.error, dtype)


def read(tensor, dtype):
    """The numbers of a tensor: exact."""
    value = tensor.detach().cpu().to(torch.float64).numpy().copy()
    return Near(value, np.zeros_like(value), dtype)


def assert_near(got, wanted, what):
    """Raise unless a tensor is as near as the equations say."""
    value = got.detach().cpu().to(torch.float64).numpy()
    wanted = wanted.held(got.dtype)
    far = np.abs(value - wanted.value) > wanted.error * (1 + 2.0**-20)
    assert not far.any(), (
        f"{what}: {value[far][:3]}, by the equations {wanted.value[far][:3]} give or take {wanted.error[far][:3]}"
    )


def update(step, p, g, states, lr, *, mean=lambda x: x):
    """The equations: the parameter and the states after. `mean`: over a row, where it has one state number."""
    if step.rule == "adagrad":
        h = states[0] + mean(g * g)
        inside = getattr(step, "eps_inside_root", False)
        root = (h + step.eps).sqrt() if inside else h.sqrt() + step.eps
        return p - g * lr / root, [h]
    v = states[0] * step.rho + mean(g * g) * (1 - step.rho)
    d = (states[1] + step.eps).sqrt() / (v + step.eps).sqrt() * g
    u = states[1] * step.rho + mean(d * d) * (1 - step.rho)
    return p - d * lr, [v, u]


def precision(param, state):
    """Arithmetic is float64 if the parameter or its state is, else float32."""
    return torch.float64 if torch.float64 in (param.dtype, state.dtype) else torch.float32


def learning_rate(step, counter):
    t = step.step if counter is None else counter.item() + 1
    return number(step.lr) / (1 + (t - 1) * step.lr_decay)


def assert_step(before, after):
    """Hold the tensors of a dense step to what they were before it."""
    for k, param in enumerate(before.params):
        states = [state[k] for state in before.states]
        real = precision(param, states[0])
        lr = learning_rate(before, None if before.steps is None else before.steps[k])
        p, g = read(param, real), read(before.grads[k], real)
        if before.grad_scale is not None:
            g = g / number(before.grad_scale)
        if before.zero_grad:
            assert not after.grads[k].any()
        else:
            assert_near(after.grads[k], g, f"gradient {k}")
        g = g * (before.factor if isinstance(before.factor, float) else before.factor[k])
        if before.clip_value is not None:
            g = g.clip(before.clip_value)
        if before.maximize:
            g = -g
        if before.weight_decay and before.decoupled:
            p = p * (1 - lr * before.weight_decay)
        elif before.weight_decay:
            g = g + p * before.weight_decay
        p, new = update(before, p, g, [read(state, real) for state in states], lr)
        assert_near(after.params[k], p, f"parameter {k}")
        for place, value in enumerate(new):
            assert_near(after.states[place][k], value, f"state {place} of {k}")
        if before.ema is not None:
            momentum = before.ema_momentum
            average = read(before.ema[k], real) * momentum + p * (1 - momentum)
            # weights that are rounded apart need not add up to 1
            average.error += 2 * ROUNDING[real] * (np.abs(average.value) + np.abs(p.value))
            assert_near(after.ema[k], average, f"average {k}")
        if before.copy_out is not None:
            assert_near(after.copy_out[k], p, f"copy {k}")
        if before.steps is not None:
            assert after.steps[k].item() == before.steps[k].item() + 1


def assert_rows(before, after):
    """The same of a step over rows: those that are not named have not moved."""
    real = precision(before.param, before.states[0])
    lr = learning_rate(before, before.steps)
    ids = before.ids.tolist()
    rows = read(before.rows, real)
    if before.grad_scale is not None:
        rows = (rows * (1 / np.float32(number(before.grad_scale)).astype(np.float64))).held(before.rows.dtype)
        assert_near(after.rows, rows, "gradient rows")
    width = max(1, math.prod(before.param.shape[1:]))
    row_wise = before.states[0].numel() != before.param.numel()
    for row in dict.fromkeys(ids):
        places = [place for place, other in enumerate(ids) if other == row]
        g = Near(rows.value[places[0]], rows.error[places[0]], real)
        for place in places[1:]:
            g = g + Near(rows.value[place], rows.error[place], real)
        if len(places) > 1:
            g = g.held(before.rows.dtype)
        g = Near(g.value.reshape(1, width), g.error.reshape(1, width), real) * before.factor
        if before.maximize:
            g = -g
        p = read(before.param[row].reshape(1, width), real)
        if before.weight_decay:
            g = g + p * before.weight_decay
        states = [read(state[row].reshape(1, 1 if row_wise else width), real) for state in before.states]
        p, new = update(before, p, g, states, lr, mean=Near.mean_over_rows if row_wise else lambda x: x)
        assert_near(after.param[row].reshape(1, width), p, f"row {row}")
        for state, value in zip(after.states, new, strict=True):
            assert_near(state[row].reshape(value.value.shape), value, f"state of row {row}")
    others = torch.ones(len(before.param), dtype=torch.bool)
    others[before.ids.cpu()] = False
    for was, now in zip((before.param, *before.states), (after.param, *after.states), strict=True):
        assert torch.equal(was.cpu()[others], now.cpu()[others])
    if before.steps is not None:
        assert after.steps.item() == before.steps.item() + 1


def square_sum(tensor):
    """The sum of squares in the order that `norms` and `norm_kernels` write down: blocks, lanes, halves."""
    flat, total = tensor.reshape(-1).to(torch.float64).numpy(), 0.0
    for start in range(0, len(flat), 4096):
        block = np.zeros(4096)
        block[: len(flat[start : start + 4096])] = flat[start : start + 4096]
        lanes = np.zeros(256)
        for chunk in (block * block).reshape(16, 256):
            lanes = lanes + chunk
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += float(lanes[0])
    return total

"""The whole surface under torch's global settings, one after the other: `... GRPC_ADDRESS HTTP_ADDRESS PREFIX [SETTING]`.

Prints a line of JSON for each setting and each part of the surface: what came of it, as a digest of every bit, or the error.
All that goes in (parameters, gradients, modules) is made before the setting is, so whatever differs is pushstep's doing.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
import traceback

import httpx
import numpy as np
import torch
from torch import nn

from pushstep import optim
from pushstep.client import connect
from pushstep.optim import conversion, mlx
from pushstep.optim import keras as keras
from pushstep.optim.ops import norms, rows
from pushstep.optim.ops import streaming as arriving
from pushstep.optim.ops.copies import copy as copy_tensor
from pushstep.optim.ops.quantise import code_bytes, dequantise, quantise
from pushstep.optim.ops.select import select
from pushstep.optim.ops.sums import weighted_sum
from tests.support.numbers.torch_settings import SETTINGS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
_REST = httpx.Client(trust_env=False, timeout=20)


# ---- what goes in ----------------------------------------------------------------------------------------------


def drawn(shape, seed, dtype=F32, scale=1.0):
    """The same values for the same seed; some are too small to be normal numbers."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    flat = values.reshape(-1)
    flat[::5] *= 1e-39
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def sparse(shape, count, seed, dtype=F32):
    """A row-sparse gradient with rows that come twice."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, shape[0], (1, count)))
    return torch.sparse_coo_tensor(ids, drawn((count, *shape[1:]), seed, dtype), shape, check_invariants=True)


SHAPES = [(33, 7), (5,), (), (0, 3), (1031,)]
MANY = 300_001  # for several threads to share


def params_of(dtype):
    made = [nn.Parameter(drawn(shape, 1, dtype)) for shape in SHAPES]
    made.append(nn.Parameter(drawn((6, 4, 2), 2, dtype)[..., 0]))
    made.append(nn.Parameter(drawn((7, 9), 3, dtype).t()))
    return made


class Module(nn.Module):
    """A table, a layer, a half-precision scale and a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(drawn((30, 6), 4))
        self.layer = nn.Parameter(drawn((6, 3000), 5))
        self.scale = nn.Parameter(drawn((12,), 6, BF16))
        self.register_buffer("seen", torch.zeros(2, dtype=F32))

    def grads(self, k):
        """One step's gradients by name."""
        return {
            "table": sparse((30, 6), 9, 10 + k), "layer": drawn((6, 3000), 20 + k), "scale": drawn((12,), 30 + k, BF16),
        }  # fmt: skip


# ---- parts of the surface: each prepares, and gives what runs: to its first yield under the setting ----------------


def _dense_jobs(*makes, dtypes=(F32, F64, BF16, F16)):
    return [
        (
            make,
            params_of(dtype),
            [[drawn(p.shape, 40 + k, dtype) for p in params_of(dtype)] for k in range(3)],
        )
        for make in makes
        for dtype in dtypes
    ]


def _row_jobs(*makes):
    return [
        (
            make,
            [nn.Parameter(drawn(shape, 1, dtype)) for shape in ((40, 5), (30, 1))],
            [[sparse(shape, 12, 50 + k, dtype) for shape in ((40, 5), (30, 1))] for k in range(3)],
        )
        for make in makes
        for dtype in (F32, BF16)
    ]


def _large_job(make):
    grads = [[drawn((MANY,), 40 + k)] for k in range(3)]
    return make, [nn.Parameter(drawn((MANY,), 1))], grads


def _all(jobs):
    """Steps under the setting, and the last one after it."""

    def run():
        made = [make(params) for make, params, _ in jobs]
        for before in (True, False):
            found = []
            for optimizer, (_, params, steps) in zip(made, jobs, strict=True):
                found.append(_stepped(optimizer, params, steps[:-1] if before else steps[-1:]))
            yield found

    return run


def optim_kernels():
    return _all(
        [
            *_dense_jobs(
                lambda p: optim.Adadelta(p, weight_decay=0.1),
                lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.1, maximize=True),
            ),
            _large_job(optim.Adadelta),
            *_dense_jobs(lambda p: optim.Adagrad(p, state_dtype="param"), dtypes=(BF16,)),
            *_row_jobs(
                lambda p: optim.Adadelta(p, sparse=True),
                lambda p: optim.Adagrad(p),
                lambda p: optim.Adagrad(p, row_wise=True),
            ),
        ]
    )


def optim_operations():
    jobs = _dense_jobs(lambda p: optim.Adadelta(p, fused=False), dtypes=(F32, BF16))
    jobs += _row_jobs(lambda p: optim.Adadelta(p, sparse=True, fused=False))
    halves = [torch.complex(drawn((9, 2), k), drawn((9, 2), k + 1)) for k in (1, 3)]
    ids = torch.tensor([[1, 7]])
    grad = torch.sparse_coo_tensor(ids, halves[1][:2], (9, 2), check_invariants=True)
    jobs.append((lambda p: optim.Adadelta(p, sparse=True), [nn.Parameter(halves[0])], [[grad]] * 2))
    return _all(jobs)


def optim_peers():
    return _all(
        _dense_jobs(
            lambda p: keras.Adadelta(p, 0.5, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=2),
            lambda p: keras.Adadelta(p, lambda: 0.25, global_clipnorm=0.5),
            lambda p: mlx.AdaDelta(p, lambda step: 0.5 / (1 + step)),
            lambda p: mlx.Adagrad(p, 0.1),
            dtypes=(F32, BF16),
        )
    )


def optim_accumulation():
    return _all(
        _dense_jobs(
            lambda p: keras.Adagrad(
                p, 0.5, clipnorm=0.5, loss_scale_factor=3.0, gradient_accumulation_steps=2
            ),
            lambda p: keras.Adadelta(p, 0.5, use_ema=True, fused=False),
            dtypes=(F32,),
        )
    )


def optim_state():
    params, twins = params_of(F32), params_of(F32)
    grads = [[drawn(p.shape, 70 + k) for p in params] for k in range(3)]

    def run():
        first, second = optim.Adadelta(params), optim.Adadelta(twins)
        _stepped(first, params, grads[:1])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        found = [_stepped(second, twins, grads[1:])]
        target = keras.Adadelta(params, 0.5)
        target.load_state_dict(conversion.convert(first.state_dict(), target))
        back = optim.Adadelta(params)
        back.load_state_dict(conversion.convert(target.state_dict(), back))
        yield [*found, _stepped(target, params, grads[:1]), _stepped(back, params, grads[:1])]
        yield _stepped(second, twins, grads[:1])

    return run


def optim_functions():
    n = 70_001
    values = {dtype: drawn((n,), 80, dtype) for dtype in (F32, F64, BF16, F16)}
    residual, many = drawn((n,), 81), [drawn((n,), 82), drawn((n,), 83)]
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 50, 200))
    their_rows = {dtype: drawn((200, 3), 84, dtype) for dtype in (F32, BF16)}

    def run():
        found = [norms.square_sums(list(values.values())), norms.global_norm(many)]
        found += [rows.coalesce(ids, some) for some in their_rows.values()]
        body = arriving.floats(values[F32], arriving.Blocks([n]))
        body.advance(4 * n)
        found.append(body.square_sums())
        for source in values.values():
            codes = np.zeros(code_bytes(n, 256), np.uint8)
            rest = torch.from_numpy(np.zeros(n, np.float32))
            quantise(source, residual, rest, torch.from_numpy(codes), length=n, block=256)
            read = torch.from_numpy(np.zeros(n, np.float32))
            found += [codes, rest, dequantise(torch.from_numpy(codes), read, [n], block=256), read]
        found.append(select(values[F32], residual, torch.from_numpy(np.zeros(n, np.float32)), 99, wire=BF16))
        total = torch.from_numpy(np.zeros(n, np.float32))
        found += [weighted_sum(total, many, [2.0, 3.0], 5.0, [n]), total]
        target = torch.from_numpy(np.zeros(n, np.float32))
        for source in (values[F32], values[BF16]):
            copy_tensor(target, source)
            found.append(target.clone())
        yield found

    return run


def client(**options):
    """Attached optimizers: steps, state there and back, an upload, a restore."""
    attached = {name: options.pop(name) for name in ("overlap", "prefetch") if name in options}

    def prepare():
        module, steps = Module(), [Module().grads(k) for k in range(5)]
        edited, lr = drawn((6, 3000), 90), torch.tensor(0.1, dtype=F64)

        def run(grpc, http, model):
            with connect(
                grpc, model=model, worker="w0", timeout_s=20.0, retry_for_s=20.0, **options
            ) as session:
                tables = optim.Adagrad([module.table], lr=lr)
                rest = optim.Adadelta([module.layer, module.scale])
                remote = session.attach([tables, rest], module=module, **attached)
                for grads in steps[:3]:
                    _pushed(remote, module, grads)
                remote.synchronize()
                found = [dict(module.named_parameters()), remote.state_dict()]
                remote.load_state_dict(copy.deepcopy(found[1]), force=True)
                with torch.inference_mode(False), torch.no_grad():
                    module.layer.copy_(edited)
                remote.upload()
                _pushed(remote, module, steps[3])
                remote.synchronize()
                module.load_state_dict(copy.deepcopy(module.state_dict()))
                remote.upload()
                answer = _REST.post(f"http://{http}/v1/models/{model}/snapshots")
                found += [dict(module.named_parameters()), int(answer.status_code)]
                yield found
                _pushed(remote, module, steps[4])
                remote.synchronize()
                export = _REST.get(f"http://{http}/v1/models/{model}/export?format=torch")
                content = torch.load(io.BytesIO(export.content), weights_only=True, map_location="cpu")
                yield [dict(module.named_parameters()), content, remote.last_receipt.version]

        return run

    return prepare


def client_backward(**options):
    """Gradients as autograd makes them: lent by shared memory, or on their way while it runs."""
    attached = {name: options.pop(name) for name in ("overlap",) if name in options}

    def prepare():
        module = Module()
        inputs = [[drawn(p.shape, 100 + k, p.dtype) for p in module.parameters()] for k in range(3)]

        def run(grpc, http, model):
            with connect(grpc, model=model, worker="w0", **options) as session:
                found, remote = (
                    [],
                    session.attach(optim.Adagrad(module.parameters()), module=module, **attached),
                )
                for some in inputs:
                    # nothing that autocast changes
                    with torch.inference_mode(False), torch.enable_grad():
                        remote.zero_grad()
                        for parameter, values in zip(module.parameters(), some, strict=True):
                            (parameter * values).sum().backward()
                    remote.step()
                    found += [p.detach().clone() for p in module.parameters()]
                yield found

        return run

    return prepare


def client_scaled():
    module, own = Module(), nn.Parameter(drawn((30, 6), 4))
    steps = [[Module().grads(k) for k in range(3)] for _ in range(2)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for scaler in scalers:
        scaler.scale(torch.ones(1))  # makes its tensors now, as the first loss would

    def run(grpc, http, model):
        found = []
        with connect(grpc, model=model, worker="w0") as session:
            optimizers = [optim.Adagrad([module.table]), optim.Adadelta([module.layer, module.scale])]
            remote, local = session.attach(optimizers, module=module), optim.Adagrad([own])
            for mine, yours in zip(*steps, strict=True):
                for name, parameter in module.named_parameters():
                    parameter.grad = mine[name]
                own.grad = yours["table"]
                for scaler, optimizer in zip(scalers, (remote, local), strict=True):
                    scaler.step(optimizer)
                    scaler.update()
                found += [p.detach().clone() for p in (*module.parameters(), own)]
                found += [own.grad, module.table.grad]
            yield found

    return run


def client_arrays():
    start = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.arange(5, dtype=np.float64)}

    def run(grpc, http, model):
        with connect(grpc, model=model, worker="w0", shared_memory=False) as session:
            session.create(
                start, [{"rule": "adagrad", "params": ["a"]}, {"rule": "adadelta", "params": ["b"]}]
            )
            found = [session.pull()]
            session.push({"a": start["a"] / 7, "b": start["b"]})
            session.push({"a": (np.array([1, 3, 1]), np.full((3, 3), 0.5, np.float32))})
            found.append(session.exchange({"b": [0.5] * 5})[1])
            found += [session.pull_rows("a", [3, 0]), session.upload({"a": start["a"] + 1}), session.pull()]
            yield found
            session.push({"b": [1.0, 2.0, 3.0, 4.0, 5.0]})
            yield session.pull()

    return run


PARTS = {
    "optim": optim_kernels,
    "optim, by torch": optim_operations,
    "optim, Keras and MLX": optim_peers,
    "optim, accumulation by torch": optim_accumulation,
    "optim, state": optim_state,
    "optim, functions": optim_functions,
    "client": client(shared_memory=False),
    "client, bfloat16": client(shared_memory=False, wire="bfloat16"),
    "client, int8": client(shared_memory=False, wire="int8"),
    "client, top_k": client(shared_memory=False, top_k=0.1),
    "client, shared memory": client(shared_memory=True),
    "client, shared memory, float16": client(shared_memory=True, wire="float16"),
    "client, prefetch": client(prefetch=True),
    "client, lent gradients": client_backward(shared_memory=True),
    "client, overlap": client_backward(shared_memory=False, overlap=True),
    "client, scaled": client_scaled,
    "client, arrays": client_arrays,
}


def _stepped(optimizer, params, steps):
    for grads in steps:
        for param, grad in zip(params, grads, strict=False):
            param.grad = grad
        optimizer.step()
        for param in params:
            param.grad = None
    states = [
        # torch keeps counters in the default dtype
        {name: float(value) if name == "step" else value for name, value in optimizer.state[param].items()}
        for param in params
    ]
    return [list(params), states]


def _pushed(remote, module, grads):
    for name, parameter in module.named_parameters():
        parameter.grad = grads[name].detach().clone()
    remote.step()
    remote.zero_grad()


# ---- what comes out ----------------------------------------------------------------------------------------------


def digest(value):
    """A number for every bit of it, dtypes and shapes included."""
    found = hashlib.sha256()

    def add(one):
        if isinstance(one, torch.Tensor):
            dense = one.detach().cpu()
            if dense.is_sparse:
                add([dense._indices(), dense._values()])
                return
            flat = dense.resolve_neg().resolve_conj().contiguous().reshape(-1)
            found.update(f"{one.dtype} {tuple(one.shape)}".encode())
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(one, np.ndarray):
            found.update(f"{one.dtype} {one.shape}".encode() + one.tobytes())
        elif isinstance(one, dict):
            for key, entry in one.items():
                found.update(str(key).encode())
                add(entry)
        elif isinstance(one, list | tuple):
            for entry in one:
                add(entry)
        else:
            found.update(repr(one).encode())

    add(value)
    return found.hexdigest()[:16]


def main(grpc, http, prefix, only=""):
    """Run all of it, or under one setting."""
    for number, (setting, enter) in enumerate(SETTINGS.items()):
        if only not in ("", setting):
            continue
        for place, (part, prepare) in enumerate(PARTS.items()):
            run = prepare()
            arguments = (grpc, http, f"{prefix}-{number}-{place}") if part.startswith("client") else ()
            try:
                steps = run(*arguments)
                with enter():
                    came = digest(next(steps))
                came += digest(list(steps))  # what was made under the setting, used without it
            except Exception:  # noqa: BLE001 - whatever it is, it is the answer
                came = "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
            print(json.dumps([setting, part, came]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

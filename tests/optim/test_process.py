"""What a process sees: late imports, the kernel cache, forks, memory, and more elements than an int32 counts."""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pushstep.optim import Adagrad
from pushstep.optim.kernels import cache as kernel_cache
from tests.support.processes.nursery import Nursery, nursery


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("scripts")) as made:
        yield made


def _run(code, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def _run_forked(scripts, code, *arguments):
    """The same, in a process that finds torch imported, and no kernel compiled."""
    return _run_at_once(scripts, code, *arguments, times=1)[0]


def _run_at_once(scripts, code, *arguments, times):
    """The same, in some processes at the same time."""
    code = "import warnings; warnings.simplefilter('error')\n" + textwrap.dedent(code)
    started = [scripts.start(code, *arguments) for _ in range(times)]
    for script in started:
        assert script.wait() == 0, script.said()
    return [script.said().strip() for script in started]


def test_numba_and_triton_are_imported_at_the_first_fused_step():
    _run(
        """
        import sys, torch
        loaded = lambda: {"numba", "triton", "llvmlite"} & set(sys.modules)
        import pushstep.optim
        from pushstep.optim import Adadelta, Adagrad, RULES
        from pushstep.optim.ops import norms
        assert not loaded(), loaded()
        torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])
        by_torch = loaded()  # constructing any torch optimizer imports torch._dynamo, which imports triton
        assert by_torch <= {"triton"}
        for make in (Adadelta, Adagrad):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            make([p], fused=False).step()
            optimizer = make([p])
            optimizer.load_state_dict(optimizer.state_dict())
            make.rule.validate({"lr": 0.1})
        assert loaded() == by_torch, loaded()
        optimizer.step()
        assert loaded() == by_torch | {"numba", "llvmlite"}, loaded()
        """
    )


STEP = """
    import torch
    from pushstep.optim import RULES
    from pushstep.optim.kernels import cache as kernel_cache
    from pushstep.optim.ops import norms, samples
    rule = RULES["adagrad"]
    rule.step_dense(torch.ones(3), torch.ones(3), [torch.ones(3)], rule.defaults, step=1)
    norms.square_sum(torch.ones(3))
    samples.Samples([torch.ones(300)])  # its kernel calls another function of ours
    kernels = kernel_cache._compiled.values()
    hits = sum(sum(kernel.stats.cache_hits.values()) for kernel in kernels)
    print(hits, len(kernels) - hits)
"""


def test_a_second_process_compiles_nothing_and_a_damaged_cache_heals(scripts, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

    def run():
        return _run_forked(scripts, STEP).splitlines()[-1]

    counts = [line.splitlines()[-1].split() for line in _run_at_once(scripts, STEP, times=3)]
    assert sum(int(compiled) for _, compiled in counts) == 3, (
        "those that begin together compile each once, too"
    )
    assert run() == "3 0"
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc"))
    assert len(files) == 6
    # Two kernels in one index could take each other's place when two processes write at the same time.
    assert len({path.parent for path in files}) == 3
    for k, path in enumerate(files):
        path.write_bytes(path.read_bytes()[: 40 * (k % 3)])
    assert run() == "0 3"
    run()
    assert run() == "3 0"
    for k, path in enumerate(files):
        path.unlink()
        os.mkfifo(path) if k % 2 else path.mkdir()  # opening a FIFO would wait for who writes it
    assert run() == "0 3"
    assert run() == "3 0"


def unknown_user(uid):
    raise KeyError(uid)


def test_where_the_cache_lies(tmp_path, monkeypatch, caplog):
    real = kernel_cache._writable
    refused: set[Path] = set()
    monkeypatch.setattr(
        kernel_cache,
        "_writable",
        lambda path: not any(path.is_relative_to(r) for r in refused) and real(path),
    )
    monkeypatch.setattr(kernel_cache, "_kept_in", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))

    def folder():
        kernel_cache.folder.cache_clear()
        return kernel_cache.folder()

    try:
        assert folder() == tmp_path / "named/kernels"
        monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/no-folder")
        package = Path(kernel_cache.__file__).parents[1]
        assert folder() == package / "__pycache__/kernels"
        refused.add(package)
        assert folder() == tmp_path / "user/pushstep/kernels"
        kernel_cache.keep_in(tmp_path / "data")
        assert folder() == tmp_path / "data/kernels"
        kernel_cache.keep_in(tmp_path / "none")
        refused.add(tmp_path / "none")
        # a user of no name, without HOME: there is no folder of its own to look at
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown_user)
        assert folder() is None
        caplog.clear()
        refused.add(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert folder() is None
            assert kernel_cache.folder() is None
        assert [record.message for record in caplog.records] == [
            "no writable folder for compiled kernels: they are compiled again in every process"
        ]
        from pushstep.optim.kernels import norms as norm_kernels

        kernel = kernel_cache._compile(norm_kernels.block_sums, norm_kernels.SIGNATURE, 0)
        assert not kernel.stats.cache_path
    finally:
        kernel_cache.folder.cache_clear()


def test_a_processor_without_fma_or_wide_vectors_computes_the_same_bits(tmp_path):
    code = """
        import torch
        from pushstep.optim import Adadelta, Adagrad
        torch.manual_seed(0)
        for make in (Adadelta, Adagrad):
            for dtype in (torch.float32, torch.float16):
                p = torch.nn.Parameter(torch.randn(1003).to(dtype))
                optimizer = make([p], weight_decay=0.1)
                for _ in range(3):
                    p.grad = torch.randn(1003).to(dtype)
                    optimizer.step()
                print(p.double().sum().item().hex(), *(s.double().sum().item().hex() for s in optimizer.state[p].values()))
        """
    generic = _run(code, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert generic == _run(code)


def test_a_forked_child_steps_with_threads_of_its_own():
    _run(
        """
        import os, signal, torch
        import numpy as np
        from pushstep.optim import RULES
        rule = RULES["adadelta"]
        n = 1 << 20
        torch.set_num_threads(4)
        def run():
            # torch's own threads do not survive a fork, so numpy fills
            p, g, v, u = (torch.from_numpy(np.full(n, x, np.float32)) for x in (1, 1, 0, 0))
            rule.step_dense(p, g, [v, u], rule.defaults, step=1)
            return float(p[0]), float(p[-1])
        expected = run()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if run() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert run() == expected
        """
    )


def test_elements_beyond_two_to_the_31():
    from pushstep.optim.kernels import dense as kernels
    from pushstep.optim.kernels import intrinsics

    border, size = 1 << 31, 1 << 16
    # Pages nobody has written to cost nothing: only those around the border are touched.
    arrays = [np.zeros(border + size, np.float32) for _ in range(4)]
    param, grad, square_avg, acc_delta = arrays
    grad[border - size :] = 1.0
    addresses = np.zeros((1, kernels.COLUMNS), np.int64)
    for column, array in enumerate(arrays):
        addresses[0, column] = array.ctypes.data
    scalars = np.array([0.9, 1 - 0.9, 1e-6, 0, 1, 0, 0, 0])
    plan = np.zeros(2 * intrinsics.STRIDE, np.int64)
    plan[:3] = 1, size, border + size
    plan[intrinsics.STRIDE : intrinsics.STRIDE + 2] = border // size - 1, border // size + 1
    kernel = kernel_cache.compiled(kernels.dense, kernels.DENSE_SIGNATURE, kernels.Spec(True, False, 0, 0, 0))
    kernel(addresses, np.array([0, border + size]), np.array([[1.0, 1.0]]), scalars, plan, 0)
    assert (square_avg[border - size :] == np.float32(0.1)).all()
    assert (param[border - size :] == param[border]).all()
    assert param[border] < 0
    assert (acc_delta[border - size :] > 0).all()
    assert param[border - size - 1] == 0


def test_rows_beyond_two_to_the_31_elements():
    from pushstep.optim import RULES

    count = (1 << 26) + 10
    table, state = (torch.from_numpy(np.zeros((count, 32), np.float32)) for _ in range(2))
    ids = torch.tensor([0, count - 1])
    rule = RULES["adagrad"]
    rule.step_rows(table, ids, torch.ones(2, 32), [state], rule.defaults, step=1)
    assert (table[ids] < 0).all()
    assert (state[ids] == 1).all()
    assert not table[count - 2].any()


MEMORY = """
    import sys, torch
    from pushstep.optim import Adadelta, Adagrad
    kind, n = sys.argv[1], 4000
    torch.set_num_threads(2)
    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    def data(rows):
        p = torch.nn.Parameter(torch.ones(rows, n // 2 if kind == "gaps" else n))
        if kind != "gaps":
            p.grad = torch.ones(n, rows).t() if kind == "transposed" else torch.ones(rows, n)
        else:
            p = torch.nn.Parameter(torch.ones(rows, n)[:, ::2])
            p.grad = torch.ones(rows, n // 2)
        return p
    for make in (Adadelta, Adagrad):
        warm, p = data(50), data(n)
        make([warm]).step()
        optimizer = make([p])
        optimizer.step()  # makes the states
        grown = []
        for _ in range(3):  # a temporary would be there at every step; a thread's first touch of its stack is not
            with open("/proc/self/clear_refs", "w") as reset:
                reset.write("5")
            before = peak()
            optimizer.step()
            grown.append((peak() - before) * 1024)
        grown = min(grown)
        assert grown < 0.01 * 4 * p.numel(), (make, grown)
"""


@pytest.mark.parametrize("kind", ["plain", "transposed", "gaps"])
def test_a_step_needs_no_temporaries(scripts, kind):
    _run_forked(scripts, MEMORY, kind)


def test_without_further_threads_a_step_takes_longer_and_is_the_same(monkeypatch):
    """A process at its limit of threads steps alone, and keeps nothing for helpers that never come."""
    from pushstep.optim.cpu import pool

    def step():
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(1 << 20))
        param.grad = torch.randn(1 << 20)
        Adagrad([param], lr=0.1).step()
        return param.detach()

    expected = step()

    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "_helpers", pool.Helpers())
    monkeypatch.setattr(pool.threading.Thread, "start", refuse)
    assert torch.equal(step(), expected)
    assert pool._helpers.queue.empty()


def test_numbas_own_settings_are_left_alone(tmp_path, monkeypatch):
    """They are the whole process's: what a user's thread compiles meanwhile belongs into the user's cache."""
    import numba

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    kernel_cache.folder.cache_clear()
    before, seen = numba.config.CACHE_DIR, []

    def make(spec):
        seen.append(numba.config.CACHE_DIR)

        def twice(x):
            return 2 * x

        return twice

    try:
        assert kernel_cache.compiled(make, "int64(int64)", "a test's")(21) == 42
        assert seen == [before]
        assert list(tmp_path.rglob("*.nbi"))
    finally:
        kernel_cache._compiled.pop((make, "a test's"))
        kernel_cache.folder.cache_clear()

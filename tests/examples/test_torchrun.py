"""torchrun with two ranks: a round of both is what DistributedDataParallel does, to the last bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.processes.forked import workers
from tests.support.servers.harness import RunningServer
from tests.support.terminals.command_shim import CommandShim

# On gloo, whose sum of two is exact in either order.
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pushstep.client import connect
from pushstep.optim import Adadelta

address, model_name = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

def train(module, optimizer):
    losses = []
    for step in range(20):
        made = torch.Generator().manual_seed(10 * step + rank)
        optimizer.zero_grad()
        loss = module(torch.randn(4, 6, generator=made)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

wrapped = network()
expected = train(DistributedDataParallel(wrapped), Adadelta(wrapped.parameters(), lr=1.0))
module = network()
session = connect(address, model=model_name, worker=f"rank{rank}")
optimizer = session.attach(torch.optim.Adadelta(module.parameters(), lr=1.0), module=module, policy="sync", workers=ranks)
losses = train(module, optimizer)
session.close()
same = all(torch.equal(a, b) for a, b in zip(module.parameters(), wrapped.parameters()))
print(f"rank {rank} of {ranks}:", losses == expected, same, optimizer.last_receipt.version, flush=True)
dist.destroy_process_group()
"""


def test_its_losses_are_those_of_ddp(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    programs = CommandShim(tmp_path, workers())
    torchrun = [programs.torchrun, "--standalone", "--nproc-per-node", "2"]
    try:
        done = subprocess.run(
            [*torchrun, script, server.grpc, model_name],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        programs.close()
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2: True True 20" for rank in range(2)]

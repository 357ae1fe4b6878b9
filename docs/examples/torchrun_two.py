"""torchrun with two ranks, and no wrapper around the network. `local` uses DistributedDataParallel instead.

pushstep-server &
torchrun --standalone --nproc-per-node 2 torchrun_two.py [SERVER | local]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
inputs = torch.randn(256, 8)
targets = torch.sin(inputs.sum(dim=1, keepdim=True))
model: Any = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
if local:
    model = DistributedDataParallel(model)
optimizer: torch.optim.Optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
if not local:
    session = connect(server, model="torchrun-two", worker=f"rank{rank}")
    optimizer = session.attach(optimizer, module=model, policy="sync", workers=ranks)

for _ in range(4):
    for chosen in torch.arange(rank, 256, ranks).split(16):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()

if rank == 0:
    print("loss", nn.functional.mse_loss(model(inputs), targets).item())
if not local:
    session.close()
dist.destroy_process_group()

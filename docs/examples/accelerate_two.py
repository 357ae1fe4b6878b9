"""Accelerate with two processes: each pushes its own gradients, and the server takes one step of their mean for both.

    pushstep-server &
    torchrun --standalone --nproc-per-node 2 accelerate_two.py [SERVER | local]

With GPUs `accelerate launch` starts it as well; with `--cpu` that would start one process only. The data is sharded and the optimizer prepared by Accelerate. The network stays as it is: `prepare` would wrap it in
DistributedDataParallel, and no rank needs to wait for the other's gradients. `local` does use DistributedDataParallel.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"

torch.manual_seed(0)
inputs = torch.randn(256, 8)
targets = torch.sin(inputs.sum(dim=1, keepdim=True))
model: Any = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer: Any = torch.optim.Adadelta(model.parameters(), lr=1.0)
loader: Any = DataLoader(TensorDataset(inputs, targets), batch_size=16)

accelerator = Accelerator(cpu=True)
if local:
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
else:
    session = connect(server, model="accelerate-two", worker=f"rank{accelerator.process_index}")
    optimizer = session.attach(optimizer, module=model, policy="sync", workers=accelerator.num_processes)
    optimizer, loader = accelerator.prepare(optimizer, loader)

for _ in range(4):
    for batch, wanted in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.mse_loss(model(batch), wanted))
        optimizer.step()

if accelerator.is_main_process:
    print("loss", nn.functional.mse_loss(model(inputs), targets).item())
if not local:
    session.close()
accelerator.end_training()

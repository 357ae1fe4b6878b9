"""A plain torch loop. `local` takes torch's own steps instead.

pushstep-server &
python torch_loop.py [SERVER | local]
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"

torch.manual_seed(0)
inputs = torch.randn(256, 8)
targets = torch.sin(inputs.sum(dim=1, keepdim=True))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer: torch.optim.Optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)

if not local:
    session = connect(server, model="torch-loop", worker="w0")
    optimizer = session.attach(optimizer, module=model)

scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
for _ in range(20):
    for chosen in torch.arange(256).split(32):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs[chosen]), targets[chosen])
        loss.backward()
        optimizer.step()
    scheduler.step()

print("loss", nn.functional.mse_loss(model(inputs), targets).item())
if not local:
    session.close()

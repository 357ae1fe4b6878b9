"""A pushstep-server in a process in which somebody has changed torch's global settings before: its own options follow."""

from __future__ import annotations

import torch

from pushstep.server.__main__ import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")  # stands for any but the CPU
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(3)
    torch.set_flush_denormal(True)  # threads that are started from here on have it too
    torch.set_float32_matmul_precision("medium")
    main()

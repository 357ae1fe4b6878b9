"""Hugging Face's Trainer: the attached optimizer is given by `optimizers=`. `local` takes torch's own steps instead.

    pushstep-server &
    python hf_trainer.py [SERVER | local]

The network is made from a configuration, so nothing is fetched.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"

torch.manual_seed(0)
words = torch.randint(0, 20, (64, 6))
sentences: Any = [{"input_ids": each, "labels": (each.sum() % 2)} for each in words]
config = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
)
bert = BertForSequenceClassification(config)
optimizer: torch.optim.Optimizer = torch.optim.Adagrad(bert.parameters(), lr=0.05)
if not local:
    session = connect(server, model="hf-trainer", worker="w0")
    optimizer = session.attach(optimizer, module=bert)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        save_steps=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trained = Trainer(bert, arguments, train_dataset=sentences, optimizers=(optimizer, None)).train()
print("loss", trained.training_loss)
if not local:
    session.close()

"""Hugging Face's Trainer: the attached optimizer is given by `optimizers=`. `local` takes torch's own steps instead.

    pushstep-server &
    python hf_trainer.py [SERVER | local]
    torchrun --standalone --nproc-per-node 2 hf_trainer.py [SERVER | local]

The network is made from a configuration, so nothing is fetched.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class RanksTrainer(Trainer):
    """For torchrun: a Trainer that leaves DistributedDataParallel out, since the server averages. One process needs none."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        # Accelerate's word for all of its preparation but the wrapper
        self.accelerator.prepare_model = lambda model, **options: prepare(
            model, **options | {"evaluation_mode": True}
        )


torch.manual_seed(0)
words = torch.randint(0, 20, (64, 6))
sentences: Any = [{"input_ids": each, "labels": (each.sum() % 2)} for each in words]
config = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
bert = BertForSequenceClassification(config)
optimizer: torch.optim.Optimizer = torch.optim.Adagrad(bert.parameters(), lr=0.05)
if not local:
    session = connect(
        server, model="hf-trainer" if ranks == 1 else f"hf-trainer-{ranks}", worker=f"rank{rank}"
    )
    optimizer = session.attach(optimizer, module=bert, policy="sync", workers=ranks)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=8 // ranks,
        average_tokens_across_devices=False,  # or it would scale a loss that is a mean already
        save_steps=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    made = (Trainer if local else RanksTrainer)(
        bert, arguments, train_dataset=sentences, optimizers=(optimizer, None)
    )
    trained = made.train()
if rank == 0:
    print("loss", trained.training_loss)
if not local:
    session.close()

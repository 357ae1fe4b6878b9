"""Keras's `compile` and `fit` on its torch backend. `local` takes Keras's own steps instead.

pushstep-server &
python keras_fit.py [SERVER | local]
"""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import keras
import numpy as np

from pushstep.client import connect
from pushstep.client.keras import attach

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"

keras.utils.set_random_seed(0)
inputs = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
targets = np.sin(inputs.sum(axis=1, keepdims=True))
model = keras.Sequential(
    [keras.Input((8,)), keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(1)]
)
optimizer = keras.optimizers.Adagrad(0.1, clipnorm=1.0)
if not local:
    session = connect(server, model="keras-fit", worker="w0")
    optimizer = attach(session, optimizer)

model.compile(optimizer=optimizer, loss="mse")
halve = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * 0.5 if epoch == 2 else lr)
done = model.fit(inputs, targets, epochs=4, batch_size=32, shuffle=False, verbose=0, callbacks=[halve])
print("loss", done.history["loss"][-1])
if not local:
    session.close()

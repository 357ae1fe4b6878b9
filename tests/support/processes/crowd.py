"""A process of many workers of one model, each pushing as fast as it may: `crowd.py ADDRESS MODEL FIRST COUNT SECONDS GO`.

Begins once there is a file GO. Prints, as JSON, how many pushes of each worker were applied.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import torch

from pushstep.client import Outcome, connect


def main(address: str, model: str, first: int, count: int, seconds: float, go: str) -> None:
    """Join, wait for the file, push until the time is up."""
    torch.set_num_threads(1)
    names = [f"w{first + number}" for number in range(count)]
    sessions = {
        name: connect(address, model=model, worker=name, timeout_s=60, shared_memory=False) for name in names
    }
    gradients = {name: torch.ones(tuple(array.shape)) for name, array in sessions[names[0]].pull().items()}
    for session in sessions.values():
        session.member()
    applied = dict.fromkeys(names, 0)
    print("joined", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
    until_s = time.monotonic() + seconds

    def work(name: str) -> None:
        while time.monotonic() < until_s:
            applied[name] += sessions[name].push(gradients).outcome is Outcome.APPLIED

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions.values():
        session.close()
    print(json.dumps(applied))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), sys.argv[6])

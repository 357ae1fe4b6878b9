"""Workers that push in a thread, for as long as a test looks at them."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np

from pushstep.client import Receipt, Session
from pushstep.proto.errors import PushstepError
from tests.support.servers.harness import RunningServer

# A page shows what happens in a second: more pushes would only take the time of the other tests.
PAUSE_S = 0.02
STRANGE = "<img src=x onerror=alert(1)>/ß 漢字 &lt; שלום"


class Pushing:
    """Two workers of one model with two groups, one of whose parameters has a strange name."""

    def __init__(self, server: RunningServer, model: str, token: str | None = None) -> None:
        options = {} if token is None else {"token": token}
        self.model = model
        self.receipts: deque[Receipt] = deque(maxlen=10)
        # what the last push of each worker was refused with
        self.refused: dict[str, str] = {}
        self._over = threading.Event()
        self._random = np.random.default_rng(0)
        self._sessions = [
            server.connect(model, f"w{number}", retry_for_s=90.0, on_restore="raise", **options)
            for number in range(2)
        ]
        first, second = self._sessions
        values = {"encoder": np.ones(400, np.float32), STRANGE: np.ones(20, np.float32)}
        groups = [
            {"rule": "adagrad", "lr": 0.1, "params": ["encoder"]},
            {"rule": "adadelta", "params": [STRANGE]},
        ]
        for session in (first, second):
            session.create(values, groups)
        self._thread = threading.Thread(target=self._train)

    def __enter__(self) -> Pushing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for session in self._sessions:
            session.close()

    def _train(self) -> None:
        loss = 2.0
        while not self._over.is_set():
            for number, session in enumerate(self._sessions):
                loss = 0.2 + (loss - 0.2) * 0.995
                self._push(session, f"w{number}", loss)
            time.sleep(PAUSE_S)

    def _push(self, session: Session, worker: str, loss: float) -> None:
        gradients = {
            "encoder": self._random.standard_normal(400).astype(np.float32) * np.float32(loss),
            STRANGE: self._random.standard_normal(20).astype(np.float32),
        }
        try:
            receipt, _ = session.exchange(gradients, metrics={"loss": loss})
        except PushstepError as error:
            self.refused[worker] = error.code
        else:
            self.receipts.append(receipt)
            self.refused.pop(worker, None)

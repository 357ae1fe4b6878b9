"""`python -m tests.support.browser.pictures`: the pictures of the page in docs/images, of a training of three workers. It takes two minutes."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from pushstep.client import Session
from tests.support.browser.chromium import chromium, tab
from tests.support.servers.harness import running_server

IMAGES = Path(__file__).parents[3] / "docs" / "images"
NAMES = {"light": "page.png", "dark": "page-dark.png"}
MODEL = "flights"
TRAINED_S = 75.0
GROUPS = [
    {"rule": "adagrad", "lr": 0.02, "params": ["embedding"]},
    {"rule": "adadelta", "lr": 0.5, "params": ["head"]},
]


def _train(session: Session, seed: int, over: threading.Event) -> None:
    """Least squares on noisy gradients: a loss that falls."""
    random = np.random.default_rng(seed)
    targets = {
        name: np.random.default_rng(0).standard_normal(n).astype(np.float32)
        for name, n in (("embedding", 4000), ("head", 200))
    }
    values = session.pull()
    while not over.is_set():
        gradients = {
            name: values[name] - targets[name] + random.standard_normal(len(targets[name])).astype(np.float32)
            for name in targets
        }
        loss = float(np.mean([np.mean((values[name] - targets[name]) ** 2) for name in targets]))
        _, values = session.exchange(gradients, metrics={"loss": loss})
        time.sleep(0.02 + 0.02 * random.random())


def main() -> None:
    """Take them."""
    over = threading.Event()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data") as server:
        sessions = [server.connect(MODEL, f"w{number}") for number in range(3)]
        values = {"embedding": np.zeros(4000, np.float32), "head": np.zeros(200, np.float32)}
        for session in sessions:
            session.create(values, GROUPS)
        threads = [
            threading.Thread(target=_train, args=(each, seed, over)) for seed, each in enumerate(sessions)
        ]
        with chromium() as browser:
            for thread in threads:
                thread.start()
            try:
                with tab(browser, server.http, width=1280) as shown:
                    page = shown.show(f"models/{MODEL}/training")
                    time.sleep(TRAINED_S)
                    for theme, name in NAMES.items():
                        page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
                        time.sleep(2.0)
                        page.screenshot(path=IMAGES / name, full_page=True)
            finally:
                over.set()
                for thread in threads:
                    thread.join()


if __name__ == "__main__":
    main()

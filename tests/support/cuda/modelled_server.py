"""`pushstep-server` on the model of a CUDA device (see streams.py and modelled_driver.py): whatever it finds wrong, the server's end tells."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pushstep.server.__main__ import serve
from tests.support.cuda import modelled_driver, streams

if __name__ == "__main__":
    faults = streams.install()
    if modelled_driver.FOLDER in os.environ:
        modelled_driver.install(Path(os.environ[modelled_driver.FOLDER]))
    status = serve()
    sys.exit(f"the model of a device found: {faults}" if faults else status)

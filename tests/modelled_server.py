"""`pushstep-server` on the model of a CUDA device (see streams.py): whatever it finds wrong, the server's end tells."""

from __future__ import annotations

import sys

import streams

from pushstep.server.__main__ import main

if __name__ == "__main__":
    faults = streams.install()
    main()
    if faults:
        sys.exit(f"the model of a device found: {faults}")

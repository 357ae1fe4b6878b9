"""`python -m pushstep` is the `pushstep` command."""

from __future__ import annotations

import sys

from pushstep.client.commands import app

if __name__ == "__main__":
    sys.exit(app(prog_name="pushstep"))

"""`python -m pushstep` is the `pushstep` command."""

from __future__ import annotations

from pushstep.client.commands import main

if __name__ == "__main__":
    main()

"""The `pushstep` command in a process of its own, forked from one that has imported what it needs: a start takes 1.5 s otherwise."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.processes.forked import workers

# What the installed program does; then the process ends without taking each module apart, which takes four times as long.
COMMAND = """
import atexit, os, sys, threading
from pushstep.client.commands import main
sys.argv[0] = "pushstep"
status = 0
try:
    main()
except SystemExit as ended:
    status = ended.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status or 0)
"""


def pushstep(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it on a plain, wide terminal, to its end."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return workers().call(COMMAND, *map(str, arguments), environment=environment)

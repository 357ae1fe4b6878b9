"""pushstep.server: one engine with two doors (gRPC for workers, REST for operators).

A push passes the folders one way: `worker_door`, `requests`, `staging`, `coordinator`, `models`, `arenas`.
`requests/push.py` is one push's walk. docs/source.md names the files.
"""

import os

# gRPC writes to the standard error by itself, past our log: a line for each handshake that a stranger breaks off. It
# reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

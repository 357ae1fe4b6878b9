"""pushstep.server: one engine with two doors (gRPC for workers, REST for operators).

A push passes the folders one way: `worker_door`, `requests`, `staging`, `coordinator`, `models`, `arenas`.
`requests/push.py` is one push's walk. The README's "Tour of the source" names the files.
"""

"""The server as it is, under a fake clock, on a fake disk, and behind a fake network.

`simulation.py` puts the pieces together and names what can happen to them: `server.py` is one process of the real server,
whose code runs in the event loop of `loop.py`; `house.py` has one process follow another. `chaos.py` lets it happen at
random, a whole run from one seed (`python -m tests.simulation SEED` repeats one); `storyteller.py` has hypothesis pick each
event. `witness.py` knows what must never happen, `watch.py` what it sees, and `seeded_bugs.py` what it must find.
"""

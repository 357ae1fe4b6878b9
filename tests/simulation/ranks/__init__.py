"""Several servers as the ranks of one job, as they are, in one fake time, on links and a network that go wrong.

`world.py` is the time that all processes share: each has an event loop of its own, which a kill stops between any two
events. `links.py` carries what ranks and workers say. `process.py` is one rank: its real catalog, doors, leader or follower,
journal and snapshots, on a folder of its own; `group.py` starts them, and starts them all again when one has ended, as torchrun
does. `worker.py` pushes in parts, `model.py` is what it pushes to. `witness.py` knows what must never happen, `chaos.py` lets
everything happen at random from one seed (`python -m tests.simulation.ranks SEED` repeats one), and `seeded_bugs.py` has what
must be found.
"""

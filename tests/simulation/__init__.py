"""The judge, the policies and a real stepper under a fake clock and a fake network.

`simulation.py` puts the pieces together and names what can happen to them. `chaos.py` lets it happen at random, a whole
run from one seed (`python -m tests.simulation SEED` repeats one); `storyteller.py` has hypothesis pick each event.
`witness.py` knows what must never happen, and `seeded_bugs.py` what it must find.
"""

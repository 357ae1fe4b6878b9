"""The judge, the policies and a real stepper under a fake clock and a fake network, from one seed.

`simulation.py` puts the pieces together and names what can happen to them; `chaos.py` lets it happen at random;
`witness.py` knows what must never happen. A failure names its seed: `python -m tests.simulation SEED` repeats it.
"""

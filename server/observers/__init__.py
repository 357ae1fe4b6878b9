"""Observers: hooks that tell others what happens, by files and over the network, in threads of their own."""

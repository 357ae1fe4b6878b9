"""Decides who pushes, what is let in, and when it is applied. Pure: no clock, thread, log or I/O."""

"""Trainings through a service, and the same in local torch, which the service must equal."""

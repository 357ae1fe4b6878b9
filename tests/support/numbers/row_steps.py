"""Steps over rows, with the options that a rule's own interface leaves to the optimizers."""

from __future__ import annotations

from pushstep.optim.step.step import RowStep


def row_step(rule, param, ids, rows, states, **options):
    """The first step of a rule under its defaults, as a backend takes it."""
    return RowStep(
        rule=rule.kernel or rule.name,
        param=param,
        ids=ids,
        rows=rows,
        states=states,
        **{**rule.arguments(rule.defaults), **options},
    )

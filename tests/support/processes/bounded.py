"""What tests run to its end, within bounds: a coroutine for some seconds, a state machine for some examples."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

CASE_S = 20


def run(case: Callable[[], Awaitable[None]]) -> None:
    """A case on an event loop of its own. TimeoutError if it hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(CASE_S):
            await case()

    asyncio.run(bounded())


def run_machine(
    machine: type[RuleBasedStateMachine], examples: int, steps: int, phases: Sequence[Phase]
) -> None:
    """The same examples each time; a failure prints what was done."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=phases,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )

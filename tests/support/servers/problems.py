"""Errors of the catalogue as REST answers with them."""

from __future__ import annotations

from typing import cast

from pushstep.proto import errors


def from_problem(problem: dict[str, object]) -> errors.PushstepError:
    """The catalogue error that a problem+json body stands for."""
    kind = errors.CATALOGUE.get(str(problem.get("code")), errors.Broken)
    return kind(str(problem.get("detail", problem)), **cast("dict[str, object]", problem.get("fields", {})))

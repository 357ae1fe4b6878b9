"""The rules by name: the values that a param group's `rule` may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .adadelta import AdadeltaRule
from .adagrad import AdagradRule
from .keras import KerasAdadeltaRule, KerasAdagradRule
from .mlx import MlxAdaDeltaRule, MlxAdagradRule
from .rule import Rule

RULES: Final[Mapping[str, Rule]] = {
    rule.name: rule
    for rule in (
        AdadeltaRule(),
        AdagradRule(),
        KerasAdadeltaRule(),
        KerasAdagradRule(),
        MlxAdaDeltaRule(),
        MlxAdagradRule(),
    )
}

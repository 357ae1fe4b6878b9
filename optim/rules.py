"""The rules by name: what a param group's `rule` may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .adadelta import AdadeltaRule
from .adagrad import AdagradRule
from .keras_rules import KerasAdadeltaRule, KerasAdagradRule
from .rule import Rule

RULES: Final[Mapping[str, Rule]] = {
    rule.name: rule for rule in (AdadeltaRule(), AdagradRule(), KerasAdadeltaRule(), KerasAdagradRule())
}

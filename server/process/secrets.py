"""Texts that this process was given and that nobody may read in its log, its errors or its answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote, unquote

HIDDEN: Final = "***"
# Shorter texts are in ordinary words, too.
SHORTEST: Final = 4
_NAMES: Final = re.compile(
    r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|ACCOUNT_KEY|API_KEY|CONNECTION_STRING|SAS", re.IGNORECASE
)


class Secrets:
    """Knows the texts, and replaces them in others."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, texts: Iterable[str]) -> None:
        """Hide these texts from here on, also as they stand in a URL."""
        plain = {form for text in texts for form in (text, quote(text, safe=""), unquote(text))}
        # as they stand in a line of JSON, too
        found = {form for text in plain for form in (text, json.dumps(text)[1:-1], _in_json(text))}
        known = {text for text in (*found, *self._texts) if len(text) >= SHORTEST}
        # the longest first: one may be a part of another
        self._texts = sorted(known, key=len, reverse=True)

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Hide the values of variables whose names say that they are secrets."""
        self.add(value for name, value in environment.items() if _NAMES.search(name))

    def hide(self, text: str) -> str:
        """The text without the secrets that are in it."""
        for secret in self._texts:
            text = text.replace(secret, HIDDEN)
        return text


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


SECRETS: Final = Secrets()

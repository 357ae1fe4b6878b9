"""The page of the server's settings, from the model that reads them."""

from __future__ import annotations

import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from words import cell, table

from pushstep.server.__main__ import parser
from pushstep.server.config import Config

_HEAD = """# Settings

What `pushstep-server` can be told. Each setting is an option, a variable of the environment, or a key of the TOML file that `--config` names:
the first of these that is there counts, and then the default. `pushstep-server --help` lists the options, too.

"""


def page() -> str:
    """The page."""
    rows = [_row(name, field) for name, field in Config.model_fields.items()]
    others = [
        [f"`{action.option_strings[0]}`", cell(action.help or "")]
        for action in parser()._actions
        if action.dest not in Config.model_fields and action.option_strings and action.dest != "help"
    ]
    return (
        _HEAD
        + table(["option, variable, key", "takes", "default", "what it is"], rows)
        + "## Options that are no settings\n\n"
        + table(["option", "what it does"], others)
    )


def _row(name: str, field: FieldInfo) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    only_environment = name == "tokens"  # a secret among arguments is seen by everybody on the machine
    names = [*([] if only_environment else [f"`{option}`"]), f"`PUSHSTEP_{name.upper()}`", f"`{name}`"]
    return [
        f'<a id="{name}"></a>' + "<br>".join(names),
        " ".join([_type(field.annotation), *_bounds(field)]),
        _default(field),
        cell(field.description or ""),
    ]


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_type(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is tuple:
        return "texts"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    return {bool: "flag", int: "whole number", float: "number", Path: "path", str: "text", SecretStr: "text"}[
        kind
    ]


def _bounds(field: FieldInfo) -> list[str]:
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    return [
        f"{word} {getattr(bound, name):,}"
        for bound in field.metadata
        for name, word in words.items()
        if getattr(bound, name, None) is not None
    ]


def _default(field: FieldInfo) -> str:
    if field.default is None or field.default is PydanticUndefined:
        return ""
    if isinstance(field.default, bool):
        return "off" if not field.default else "on"
    return f"`{field.default:,}`" if isinstance(field.default, int) else f"`{field.default}`"

"""Names of parameters: which are taken is decided in one place."""

from __future__ import annotations

import pytest

from pushstep.proto.errors import InvalidManifest
from pushstep.proto.types_pb2 import Manifest, ParamGroup
from pushstep.proto.wire.layout import Layout, with_group
from pushstep.proto.wire.names import check_parameter_name


@pytest.mark.parametrize("name", ["w", "0.0", "a/b", "größe", "a b", "x" * 1000, "...", "__metadata"])
def test_names_that_are_taken(name: str) -> None:
    assert check_parameter_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 1001, "__metadata__", "a\n", "\t", "\x7f", "\u200b", "\ud800", "\u00a0", "..", "a/./b"]
)
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(InvalidManifest, match="give it another name") as caught:
        check_parameter_name(name)
    assert caught.value.message.isascii()


def _manifest(name: str) -> Manifest:
    manifest = Manifest(groups=[ParamGroup(rule="adagrad")])
    manifest.parameters.add(name=name, shape=[1], dtype="DTYPE_FLOAT32")
    return manifest


def test_what_a_model_has_is_not_judged_again() -> None:
    """A snapshot from before a rule was made is loaded; a group that is added is new."""
    layout = Layout(_manifest("a\n"))
    with pytest.raises(InvalidManifest, match="not printable"):
        with_group(layout, _manifest("b\n"))
    assert len(with_group(layout, _manifest("b")).slots) == 2

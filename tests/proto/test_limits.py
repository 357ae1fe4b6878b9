"""What a request may hold: every field of every request has its limit, and what is beyond it is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import InvalidText, PushstepError
from pushstep.proto.types_pb2 import Receipt
from pushstep.proto.wire import limits
from tests.support.workers.hostile_fields import Case, cases, request_kinds

KINDS = request_kinds()


def every_case() -> Iterator[Any]:
    for kind in KINDS:
        for case in cases(kind):
            yield pytest.param(case, id=f"{kind.DESCRIPTOR.name}: {case}")


def test_every_request_of_the_service_is_known() -> None:
    assert {kind.DESCRIPTOR.name for kind in KINDS} >= {"JoinRequest", "PushRequest", "UploadRequest"}
    for kind in KINDS:
        limits.check_of(kind.DESCRIPTOR)


def test_a_field_without_a_limit_cannot_be_served() -> None:
    """As those of answers have none: whoever adds a field to a request is told to state one."""
    for kind in (Receipt, pb.Membership):
        with pytest.raises(TypeError, match="limit"):
            limits.check_of(kind.DESCRIPTOR)


@pytest.mark.parametrize("case", list(every_case()))
def test_a_value_at_the_limit_passes_and_one_beyond_is_refused(case: Case) -> None:
    limits.check(case.kind())
    for message in case.allowed():
        limits.check(message)
    for message, expected in case.refused():
        with pytest.raises(PushstepError) as caught:
            limits.check(message)
        assert type(caught.value) is expected
        assert caught.value.fields["what"].startswith(case.named)
        assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "text", ["\x00", "a\nb", "\x7f", "\x85", "\ud800", "\udfff", "ok\x1b[31m", "\U0001f600\r"]
)
def test_what_cannot_be_shown_is_no_text(text: str) -> None:
    with pytest.raises(InvalidText) as caught:
        limits.check_text("a name", text)
    assert text not in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "layer.0.weight", "Gewicht_ä", "重み", "\U0001f600", "a b", "\u00a0\u2028"]
)
def test_what_can_be_shown_is_a_text(text: str) -> None:
    limits.check_text("a name", text)

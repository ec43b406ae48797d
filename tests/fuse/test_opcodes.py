"""The opcode table is whole, and agrees with the records and the encoders."""

import re
from typing import Any

import pytest

from overt.fuse import opcodes
from overt.fuse.opcodes import OPCODES, Opcode
from overt.fuse.session import Session
from overt.wire import fuse

LEFT_OUT = {"SETUPMAPPING", "REMOVEMAPPING", "NOTIFY_REPLY"}


def test_every_opcode_of_the_protocol_has_one_row_or_is_left_out_by_name() -> None:
    names = list(vars(fuse))
    numbers = {
        name.removeprefix("FUSE_"): getattr(fuse, name)
        for name in names[names.index("FUSE_LOOKUP") : names.index("FUSE_COPY_FILE_RANGE_64") + 1]
    }
    rows = {row.name: row.number for row in OPCODES}
    assert len(rows) == len({row.number for row in OPCODES}) == len(OPCODES)
    assert rows == {name: number for name, number in numbers.items() if name not in LEFT_OUT}


@pytest.mark.parametrize("row", OPCODES, ids=lambda row: row.name)
def test_a_row_names_a_field_of_its_record_and_an_encoder_of_the_session(row: Opcode) -> None:
    if row.payload:
        record: Any = row.record
        assert row.payload.field in record._fields
        assert row.payload.least <= row.payload.most or row.payload.most == opcodes.MAX_WRITE
    if row.reply != opcodes.NONE:
        assert callable(getattr(Session, row.reply))
    assert len(row.names) <= 2
    assert all(kind in (opcodes.COMPONENT, opcodes.STEP, opcodes.TEXT) for kind in row.names)
    assert not row.record or re.fullmatch(r"\w+In", row.record.__name__)


def test_what_is_never_answered_is_known() -> None:
    unanswered = {fuse.FUSE_FORGET, fuse.FUSE_BATCH_FORGET, fuse.FUSE_INTERRUPT, fuse.FUSE_NOTIFY_REPLY}
    assert unanswered == opcodes.UNANSWERED

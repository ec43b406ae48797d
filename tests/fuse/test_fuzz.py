"""Whatever is read from /dev/fuse: no exception but Refused, and each request gets one answer, none gets two.

The oracle knows the protocol's rule and nothing of the decoder: bytes that have a whole header, with a unique that is
neither 0 nor in use, and an opcode that is answered, want exactly one reply with that unique. Nothing else wants any.
"""

import os
import random
import time
from struct import pack_into, unpack_from
from typing import Any

import pytest

from overt.fuse.attr import attr_of, validity
from overt.fuse.directory import DirBuffer
from overt.fuse.opcodes import NONE, OPCODES, TEXT, Opcode
from overt.fuse.request import Refused, Request
from overt.fuse.session import Session
from overt.wire import fuse
from overt.wire.record import struct_of

INIT = next(row for row in OPCODES if row.name == "INIT")
ODD_NAMES = (b"", b".", b"..", b"/", b"a/b", b"\0", b"x" * 255, b"x" * 256, b"\xff\xfe", b"name\n")
UNANSWERED = {fuse.FUSE_FORGET, fuse.FUSE_BATCH_FORGET, fuse.FUSE_INTERRUPT, fuse.FUSE_NOTIFY_REPLY}
VALID, ATTR = validity(1, 1), attr_of(os.stat("/"), 1)


class Fuzz:
    """A kernel that has lost its mind, a server that answers at once or later, and the account of who was answered."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.kernel = kernel
        self.random = random.Random(seed)
        self.buffer = bytearray(1 << 17)
        self.connect()

    def connect(self) -> None:
        """Begin a new connection: with a sane INIT, or with one that is as likely to be nonsense as anything else."""
        self.refusals: list[str] = []
        self.session = Session(self.random.getrandbits(44), 1 << 14, self.refusals.append)
        self.wanting: set[int] = set()
        self.parked: list[Request] = []
        self.unique = 0
        if self.random.random() < 0.8:
            flags = self.random.getrandbits(44)
            arg = (7, self.random.randint(31, 47), 1 << 17, flags & 0xFFFFFFFF, flags >> 32)
            self.feed(self.kernel.request(INIT, self.next_unique(), arg))
            self.answer_parked()
            assert self.session.ready

    def next_unique(self) -> int:
        self.unique += 2
        return self.unique

    def feed(self, data: bytes | bytearray) -> None:
        """One read(2) of /dev/fuse."""
        size = len(data)
        self.buffer[:size] = data
        if size >= 40:
            _, opcode, unique = unpack_from("=IIQ", data)
            if opcode not in UNANSWERED and unique and unique not in self.wanting:
                self.wanting.add(unique)
        lines = len(self.refusals)
        try:
            request = self.session.decode(self.buffer, size)
        except Refused as refused:
            assert len(self.refusals) == lines + 1
            assert "\n" not in self.refusals[-1]
            self.account(refused.reply)
        else:
            assert len(self.refusals) == lines
            repr(request)
            if request.unique in self.session.inflight and self.random.random() < 0.1:
                request.keep()
                self.parked.append(request)
            else:
                self.serve(request)

    def serve(self, request: Request) -> None:
        session, unique = self.session, request.unique
        if request.opcode == fuse.FUSE_INIT:
            try:
                self.account(session.init(request))
            except Refused as refused:
                self.account(refused.reply)
            return
        reply = next(row.reply for row in OPCODES if row.number == request.opcode)
        if reply == NONE:
            return
        if request.interrupted or self.random.random() < 0.2:
            self.account(session.error(unique, 4))
        elif reply == "empty":
            self.account(session.empty(unique))
        elif reply == "entry":
            self.account(session.entry(unique, 2, 1, VALID, ATTR))
        elif reply == "attr":
            self.account(session.attr(unique, VALID, ATTR))
        elif reply == "opened":
            self.account(session.opened(unique, 1))
        elif reply == "created":
            self.account(session.created(unique, 2, 1, VALID, ATTR, 1))
        elif reply == "data" and request.opcode != fuse.FUSE_READ:
            entries = DirBuffer(min(request.arg[2], 4096) if request.arg else 0)
            entries.add(1, 1, 4, b".")
            self.account(session.directory(unique, entries))
        elif reply == "ioctl":
            self.account(session.ioctl(unique, 0, bytes(request.payload)))
        else:
            self.account(session.data(unique, bytes(request.payload)))

    def account(self, reply: bytes | memoryview) -> None:
        if reply:
            _, error, unique = self.kernel.header(reply)
            assert -4096 < error <= 0
            self.wanting.remove(unique)

    def answer_parked(self) -> None:
        self.random.shuffle(self.parked)
        for request in self.parked:
            self.serve(request)
        self.parked.clear()

    def settle(self) -> None:
        """The end of a connection: everybody has been answered."""
        self.answer_parked()
        assert self.wanting == set()
        assert self.session.inflight == {}

    def valid(self) -> bytearray:
        """A request as the kernel might send it, but for odd names and an INIT that comes late."""
        r = self.random
        row = r.choice(OPCODES)
        unique = self.next_unique()
        arg: tuple[int, ...] | None = None
        record = row.record
        if record is not None:
            if record is fuse.SetxattrIn and not self.session.flags & fuse.FUSE_SETXATTR_EXT:
                record = fuse.SetxattrInCompat
            layout = struct_of(record)
            arg = layout.unpack(r.randbytes(layout.size))
        if row.number == fuse.FUSE_INTERRUPT and self.parked:
            arg = (r.choice(self.parked).unique,)
        names = tuple(
            r.choice(ODD_NAMES)
            if r.random() < 0.1
            else (b"../target" if kind == TEXT else b"name%d" % r.getrandbits(16))
            for kind in row.names
        )
        payload = bytes(r.choice((0, 1, 2, 100)) * row.payload.unit) if row.payload else b""
        extensions = bytes(r.choice((0, 0, 0, 8, 64)))
        return bytearray(self.kernel.request(row, unique, arg, names, payload, extensions=extensions, record=record))

    def mutated(self) -> bytearray:
        """A valid request, changed in one to three ways."""
        r, data = self.random, self.valid()
        for _ in range(r.randint(1, 3)):
            how = r.randrange(7)
            if how == 0:
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
            elif how == 1:
                at = r.randrange(len(data))
                data[at : at + 8] = r.randbytes(min(8, len(data) - at))
            elif how == 2:
                del data[r.randint(1, len(data)) :]
            elif how == 3:
                data += r.randbytes(r.randrange(64))
            elif how == 4 and len(data) >= 4:
                pack_into("=I", data, 0, len(data))
            elif how == 5 and len(data) >= 16 and self.wanting:
                pack_into("=Q", data, 8, r.choice(sorted(self.wanting)))
            elif how == 6 and len(data) >= 8:
                pack_into("=I", data, 4, r.choice((r.getrandbits(6), r.getrandbits(32))))
            if not data:
                break
        return data

    def noise(self) -> bytearray:
        """Random bytes, with a length and an opcode that may be right."""
        r = self.random
        data = bytearray(r.randbytes(r.choice((0, 1, 39, 40, 48, 56, 100, 200, 1000))))
        if len(data) >= 40 and r.random() < 0.9:
            pack_into("=II", data, 0, len(data), r.getrandbits(6))
            pack_into("=H", data, 36, r.choice((0, 0, 1, r.getrandbits(16))))
        return data

    def run(self, count: int) -> None:
        makers = (self.valid, self.mutated, self.mutated, self.noise)
        for number in range(count):
            self.feed(self.random.choice(makers)())
            if len(self.parked) > 20:
                self.answer_parked()
            if number % 1000 == 999:
                self.settle()
                self.connect()
        self.settle()


def test_fifty_thousand_requests_of_all_kinds(kernel: Any) -> None:
    Fuzz(kernel, seed=1).run(50_000)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_million_requests_of_all_kinds(kernel: Any) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    Fuzz(kernel, seed).run(1_000_000)


def test_the_fuzz_would_notice_a_request_that_is_answered_twice_or_never(kernel: Any) -> None:
    fuzz = Fuzz(kernel, seed=2)
    fuzz.parked.clear()
    fuzz.settle()
    request: bytearray = kernel.request(Opcode(fuse.FUSE_DESTROY, "DESTROY"), 1_000_000)
    fuzz.feed(request)
    fuzz.settle()
    with pytest.raises(KeyError):
        fuzz.account(Refused(1_000_000, 5, "").reply)
    fuzz.wanting.add(1_000_002)
    with pytest.raises(AssertionError):
        fuzz.settle()

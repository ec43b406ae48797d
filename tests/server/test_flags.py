"""Which IOCTL requests are served, without a mount."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from overt.fuse.request import Request
from overt.host.files import FICLONE, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
from overt.server import flags, reopening
from overt.server.handlers import TABLE
from overt.wire import fuse

GET, SET = (FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR), (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR)


def request(command: int, *, argument: int = 0) -> Request:
    made = Request()
    made.opcode = fuse.FUSE_IOCTL
    made.arg = fuse.IoctlIn(fh=1, flags=0, cmd=command, arg=argument, in_size=0, out_size=4)
    return made


def refused(handler: Any, command: int, *, argument: int = 0) -> int | None:
    """The errno for a request to a mount that has nothing, not even a tree."""
    mount: Any = SimpleNamespace(served=TABLE)
    try:
        handler(mount, request(command, argument=argument))
    except OSError as error:
        return error.errno
    except AttributeError:  # it has come to the tree
        return None
    raise AssertionError("it was answered")


@pytest.mark.parametrize("command", [*GET, *SET])
def test_what_no_kernel_has_looked_at_is_not_served(command: int) -> None:
    """Before Linux 5.13 a program's own request comes through, with its pointer, whoever it is."""
    assert refused(flags.ioctl, command) is None
    assert refused(flags.ioctl, command, argument=0x7FFFFFFFE000) == errno.ENOTTY


def test_nor_is_anything_else() -> None:
    assert refused(flags.ioctl, FICLONE) == errno.ENOTTY


def test_while_changes_are_refused_flags_can_be_got_and_not_set() -> None:
    mount: Any = SimpleNamespace(served=TABLE)
    handler = reopening._refusing(mount)[fuse.FUSE_IOCTL]
    assert [refused(handler, command) for command in GET] == [None, None]
    assert [refused(handler, command) for command in SET] == [errno.EROFS, errno.EROFS]

"""The process that sets a disk up and takes it away again, whatever happens to the other two.

Three processes make a disk. The *user* is the test. The *server* answers for the image (overt.lab.server). The
*keeper*, the server's parent, stands between: it lives in the user's mount namespace, holds every piece (the FUSE
mount, which has no name anywhere, the loop device, the mounted filesystem), and gives them back in reverse order when
the user asks, or is gone. Anything that may wait for the disk is done in a child with a deadline (overt.lab.bounded);
past it, the FUSE connection is aborted, and then nothing waits any more.

    who dies        what follows
    user            its pidfd says so: the connection is aborted, everything is taken away
    server          the kernel aborts the connection: I/O errors, until the user closes the disk
    keeper          the server dies with it (PR_SET_PDEATHSIG); the user's close() unmounts; AUTOCLEAR does the rest

The connection is aborted in the end even when all is well: a mount that somebody still holds (a container, an open
file) gets I/O errors from then on, and lets go of the loop device when its last user has gone.
"""

import errno
import fcntl
import os
import select
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from overt.host import files, loop, mounts, process
from overt.lab import bounded, server
from overt.lab.channel import Channel, Question
from overt.lab.image import Image
from overt.lab.place import Place

NAME = "overt-lab"  # of these two processes, for whoever tidies up: they end by themselves, in good order
MKFS = 60.0  # seconds
MOUNT = 20.0
UNMOUNT = 5.0  # then the disk is cut off, and it gets as long again


class Order(NamedTuple):
    """What the user wants: see overt.lab.disk."""

    kind: str
    size: int
    make: list[str]
    options: list[tuple[str, str | None]]
    attributes: int  # MOUNT_ATTR_*
    mount_at: str  # or "": a new directory in `scratch`
    scratch: str
    image: int | None  # a file with the contents to begin with, in place of a mkfs


class Server(NamedTuple):
    pid: int
    mount: int  # a descriptor (O_PATH) of the FUSE mount, which is the image


def main(control_fd: int, server_fd: int, owner_pidfd: int, owner: int) -> None:
    """Set up as the first question says, answer, attend to the user, take everything away, answer."""
    process.set_name(NAME)
    control = Channel(socket.socket(fileno=control_fd))
    question = control.hear()
    if question is None:
        return
    order = Order(**question.values, image=question.fds[0] if question.fds else None)
    try:
        with ExitStack() as held:
            keeper = Keeper(held, order, server_fd, owner)
            control.answer(question, keeper.describe())
            question = keeper.attend(control, owner_pidfd)
        if question:
            control.answer(question)
    except OSError as error:
        if question:
            control.refuse(question, error)
        else:
            print(f"overt.lab: a disk could not be taken away: {error}", file=sys.stderr)


class Keeper:
    def __init__(self, held: ExitStack, order: Order, server_fd: int, owner: int) -> None:
        with _contents(order) as contents:
            self._server = held.enter_context(_serving(order.size, contents, server_fd, owner))
        self._loop = held.enter_context(_looped(self._server.mount))
        self._abort = held.enter_context(_abortable(self._server.mount))
        held.enter_context(_queue(self._loop.path))
        self._path = held.enter_context(_directory(order))
        held.enter_context(self._mounted(order))

    def describe(self) -> dict[str, object]:
        return {"path": self._path, "device": self._loop.path, "server": self._server.pid}

    def attend(self, control: Channel, owner_pidfd: int) -> Question | None:
        """Push when asked to; return the question to close, to be answered afterwards, or None: the user is gone."""
        poller = select.poll()
        poller.register(control, select.POLLIN)
        poller.register(owner_pidfd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            question = None if owner_pidfd in ready else control.hear()
            if question is None:
                self.abort()
                return None
            if question.verb == "close":
                if question.values["cut"]:
                    self.abort()
                return question
            try:
                bounded.in_child(self._push, question.values["seconds"])
                control.answer(question)
            except OSError as error:
                control.refuse(question, error)

    def abort(self) -> None:
        """Cut the disk off: who waits for it gets an error, now and from here on (fs/fuse/control.c)."""
        os.write(self._abort, b"1")

    def _push(self) -> None:
        fcntl.ioctl(self._loop.fd, files.BLKFLSBUF)

    @contextmanager
    def _mounted(self, order: Order) -> Iterator[None]:
        def mount() -> None:
            fd = mounts.new_mount(order.kind, [("source", self._loop.path), *order.options], order.attributes)
            mounts.attach(fd, self._path)

        bounded.in_child(mount, MOUNT)
        place = Place.of(self._path)
        try:
            yield
        finally:
            bounded.in_child(place.unmount, UNMOUNT, rescue=self.abort)


@contextmanager
def _contents(order: Order) -> Iterator[int]:
    """A file to fill the image from: the user's, or a new filesystem in memory.

    Not made on the loop device: that would be slower, and mkfs.btrfs takes two loop devices for one when the paths of
    their images are alike, as they are here ("/").
    """
    image = os.memfd_create("overt-lab", 0) if order.image is None else order.image  # inherited by mkfs
    try:
        if order.image is None:
            os.ftruncate(image, order.size)
            bounded.run([*order.make, f"/proc/self/fd/{image}"], MKFS)
        yield image
    finally:
        os.close(image)


@contextmanager
def _serving(size: int, contents: int, server_fd: int, owner: int) -> Iterator[Server]:
    """A running server, and its filesystem: a detached mount that nobody comes across."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    options = {
        "source": "overt-lab",
        "fd": str(device),
        "rootmode": f"{stat.S_IFREG:o}",
        "user_id": "0",
        "group_id": "0",
    }
    mount = mounts.new_mount("fuse", options.items())
    pid = os.fork()
    if pid == 0:
        try:
            process.die_with_parent(signal.SIGKILL)
            keep = {0, 1, 2, device, server_fd, contents}
            for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
                if fd not in keep:
                    _close_if_open(fd)
            image = Image(size)
            image.load(contents)
            os.close(contents)
            server.main(device, Channel(socket.socket(fileno=server_fd)), image, owner)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(device)  # the server's is the only one: the connection ends with it
    os.close(server_fd)
    try:
        yield Server(pid, mount)
    finally:
        os.close(mount)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def _looped(mount: int) -> Iterator[loop.Loop]:
    image = os.open(f"/proc/self/fd/{mount}", os.O_RDWR | os.O_CLOEXEC)
    try:
        device = loop.attach(image, flags=loop.LO_FLAGS_AUTOCLEAR | loop.LO_FLAGS_DIRECT_IO, name="overt-lab")
    finally:
        os.close(image)
    try:
        yield device
    finally:
        os.close(device.fd)


@contextmanager
def _abortable(mount: int) -> Iterator[int]:
    """The file that aborts the connection, opened while all is well; a byte is written to it in any case."""
    control = mounts.new_mount("fusectl", [])
    try:
        number = os.minor(os.fstat(mount).st_dev)
        abort = os.open(f"/proc/self/fd/{control}/{number}/abort", os.O_WRONLY | os.O_CLOEXEC)
    finally:
        os.close(control)
    try:
        yield abort
    finally:
        os.write(abort, b"1")
        os.close(abort)


@contextmanager
def _queue(device: str) -> Iterator[None]:
    """The loop device's queue as this disk needs it, and afterwards as others like it: settings outlive the attachment.

    No request larger than the server takes, since the kernel would send such a one in pieces, of which one may fail.
    And no request made of several: a failed one would take its neighbours along.
    """
    sysfs = mounts.new_mount("sysfs", [])  # a container's /sys is often read-only
    try:
        queue = os.open(f"/proc/self/fd/{sysfs}/block/{os.path.basename(device)}/queue", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(sysfs)
    try:
        largest = int(_setting(queue, "max_sectors_kb"))
        _set(queue, {"max_sectors_kb": str(min(largest, server.MAX_WRITE >> 10)), "nomerges": "2"})
        try:
            yield
        finally:
            _set(queue, {"max_sectors_kb": str(largest), "nomerges": "0"})
    finally:
        os.close(queue)


def _setting(queue: int, name: str) -> str:
    with open(name, opener=lambda path, flags: os.open(path, flags, dir_fd=queue)) as file:
        return file.read().strip()


def _set(queue: int, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        with open(name, "w", opener=lambda path, flags: os.open(path, os.O_WRONLY, dir_fd=queue)) as file:
            file.write(value)


@contextmanager
def _directory(order: Order) -> Iterator[str]:
    if order.mount_at:
        yield order.mount_at
        return
    path = os.path.join(order.scratch, f"overt-lab-{os.urandom(6).hex()}")
    os.mkdir(path)
    try:
        yield path
    finally:
        os.rmdir(path)


def _close_if_open(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EBADF:  # the directory's own descriptor, gone since it was listed
            raise

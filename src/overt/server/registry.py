"""Where commands find the servers, and which server a mount belongs to: files in /run/overt.

`PID.sock` is a server's control socket, `MAJOR:MINOR.PID.NUMBER` names the place of a mount. A server that was killed
leaves both, and its mounts answer ENOTCONN: `clear_dead` takes them away.

A mount's device number alone would not do: the loop device behind it is free, and another mount's, before its server
can note that it is gone.
"""

import contextlib
import errno
import itertools
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from overt.host import mounts

_RUN = Path("/run")
_PATIENCE = 2.0
"""seconds; a mount that is gone answers at once"""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def directory() -> Path:
    """The directory of this user's servers, made if it is not there; PermissionError if it is somebody else's."""
    path = _RUN / "overt"
    # Who is root in a user namespace only (podman's, say) has no say in the machine's /run.
    if os.geteuid() or not (_is_ours(path) or (not path.exists() and _is_ours(_RUN))):
        own = os.environ.get("XDG_RUNTIME_DIR", "")
        # Empty or relative it is to be ignored (XDG Base Directory Specification).
        path = Path(own if os.path.isabs(own) else f"/tmp/overt-{_outer_uid()}") / "overt"
        _make(path.parent, owners={0, os.geteuid()}, shared=True)
    _make(path, owners={os.geteuid()})
    return path


def _is_ours(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK)


def _outer_uid() -> int:
    """Who we are outside of our user namespace: in all of them root is 0, and /tmp is theirs together."""
    for row in Path("/proc/self/uid_map").read_text().splitlines():
        inside, outside, count = map(int, row.split())
        if inside <= os.geteuid() < inside + count:
            return outside + os.geteuid() - inside
    return os.geteuid()


def _make(path: Path, owners: set[int], *, shared: bool = False) -> None:
    """Make a directory if it is not there; PermissionError if another user can have put there what is in it.

    What is in it is believed: a mount is taken down because a name says so. `shared`: others may have their own in it,
    and leave ours alone, as in /tmp.
    """
    try:
        st = path.lstat()
    except FileNotFoundError:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        st = path.lstat()
    if st.st_uid not in owners:
        raise PermissionError(errno.EPERM, "belongs to another user", os.fspath(path))
    if not stat.S_ISDIR(st.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is not a directory (no link is followed): remove it", os.fspath(path))
    if st.st_mode & _OTHERS_WRITE and not (shared and st.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, "others can write to it", os.fspath(path))


def well_known() -> Path:
    """The socket of the server that whoever can share one shares (overt.service)."""
    return directory() / "serve.sock"


class Entry(NamedTuple):
    """One registered mount: its file here, its st_dev, its server, its place."""

    file: str
    device: int
    pid: int
    target: str

    @property
    def alive(self) -> bool:
        """Whether its server still runs: whether its socket answers, for a killed process may stay as a zombie."""
        return answers(directory() / f"{self.pid}.sock")

    @property
    def dead(self) -> bool:
        """Whether its server has ended; not if that cannot be known."""
        return has_ended(directory() / f"{self.pid}.sock")


def has_ended(path: Path) -> bool:
    """Whether the server of a control socket here has ended; not if that cannot be known.

    A socket that was put elsewhere (``overt serve --socket``) is a link here, and may lead to a place that is in the
    server's mount namespace and not in ours.
    """
    if answers(path):
        return False
    return path.exists() or not Path("/proc", path.stem).exists()


def answers(path: Path) -> bool:
    """Whether somebody listens on a control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # it has more callers than it has answered: stopped perhaps, and not dead
            return True
        except OSError:
            return False
        return True


_numbers = itertools.count(1)


def enter(device: int, target: str) -> str:
    """Note that this process serves the mount at `target`; return the file that says so, for `remove`."""
    name = f"{os.major(device)}:{os.minor(device)}.{os.getpid()}.{next(_numbers)}"
    place = os.fspath(directory())
    file, unready = f"{place}/{name}", f"{place}/{name.replace(':', '-')}.unready"
    try:
        with open(unready, "wb") as written:
            written.write(os.fsencode(target))
        os.rename(unready, file)
    except OSError as error:  # no room, say, which is not that of the mount
        Path(unready).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, file) from None
    return file


def remove(file: str) -> None:
    """Note that a mount is gone."""
    Path(file).unlink(missing_ok=True)


def entries() -> list[Entry]:
    """All registered mounts, the latest last."""
    found = []
    for file in directory().glob("*:*"):
        with contextlib.suppress(OSError, ValueError):  # it went away while we looked
            device, pid, number = file.name.split(".")
            major, minor = map(int, device.split(":"))
            entry = Entry(str(file), os.makedev(major, minor), int(pid), os.fsdecode(file.read_bytes()))
            found.append((file.stat().st_mtime_ns, int(number), entry))
    return [entry for _, _, entry in sorted(found)]


def owner(place: str) -> Entry | None:
    """The entry of the mount at `place`; with that place, if it or a directory above it was moved there."""
    known = entries()
    real = os.path.realpath(place)
    for path in (place, real):
        if found := [entry for entry in known if entry.target == path]:
            return found[-1]
    here = devices_at(real)
    moved = [entry._replace(target=real) for entry in known if entry.device in here and not mounted(entry)]
    return moved[-1] if moved else None


def sockets() -> list[Path]:
    """The control sockets of all servers, dead ones too."""
    return sorted(directory().glob("[0-9]*.sock"))


def clear_dead() -> list[str]:
    """Unmount what killed servers left in this namespace; return the places."""
    cleared = []
    for entry in entries():
        if not entry.dead:
            continue
        if mounted(entry):
            if not is_dead_mount(entry.target):
                continue  # whoever serves it, it is in use
            mounts.umount(entry.target, mounts.MNT_DETACH)
            cleared.append(entry.target)
        remove(entry.file)
    for place in unknown_dead():
        try:
            mounts.umount(place, mounts.MNT_DETACH)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):  # another user's, locked in our user namespace
                raise
        else:
            cleared.append(place)
    for socket_path in sockets():
        if has_ended(socket_path):
            socket_path.unlink(missing_ok=True)
    return cleared


def unknown_dead() -> Iterator[str]:
    """Where in this namespace dead mounts are of which no entry is left.

    A server in another mount namespace may have taken the entries, which this one shares with it, and not the mounts.
    """
    known = {entry.device for entry in entries()}
    for device, path in _table():
        place = os.fsdecode(path)
        if device not in known and is_dead_mount(place):
            yield place


def mounted(entry: Entry) -> bool:
    """Whether the entry's mount is at its place in this namespace; asks the mount table, not the (dead) mount."""
    return entry.device in devices_at(entry.target)


def is_mount(place: str) -> bool:
    """Whether a mount of overt's is at `place`, whoever serves it."""
    return bool(devices_at(place))


def is_dead_mount(place: str) -> bool:
    """Whether a mount of overt's is at `place` whose connection is gone; not if it takes long to say so."""
    if not devices_at(place):
        return False
    problems: list[int | None] = []

    def ask() -> None:
        try:
            os.statvfs(place)
        except OSError as error:
            problems.append(error.errno)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return problems == [errno.ENOTCONN]


def devices_at(place: str) -> list[int]:
    """The devices of overt's mounts at a place, as the mount table has them."""
    return [device for device, path in _table() if path == os.fsencode(place)]


def places_of(device: int) -> list[str]:
    """Where in this namespace a mount of overt's is."""
    return [os.fsdecode(path) for number, path in _table() if number == device]


def _table() -> list[tuple[int, bytes]]:
    """The devices and places of overt's mounts in this namespace."""
    with open("/proc/self/mountinfo", "rb") as table:
        rows = [line.split(b" ") for line in table if b".overt " in line]
    return [(os.makedev(*map(int, fields[2].split(b":"))), mounts.unescape(fields[4])) for fields in rows]

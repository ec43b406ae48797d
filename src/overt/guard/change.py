"""Changes to files, worked out before they are made, so that they can be shown without being made."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from overt.printable import printable


class Change(NamedTuple):
    """A file to be written, or, without a content, removed; so is an empty directory."""

    path: Path
    content: str | None
    mode: int = 0o644
    """of a new file; one that is there keeps its own"""
    like: Path | None = None
    """a file whose owner, mode and xattrs it gets, because its content is of it"""

    def __str__(self) -> str:
        if self.content is None:
            return f"remove {printable(str(self.path))}"
        return f"write {printable(str(self.path))} ({len(self.content.encode())} bytes)"

    def diff(self) -> str:
        """What would be different, as diff -u shows it. OSError."""
        import difflib  # slow to import, and the wrapper starts for every command of a runtime

        before = read(self.path) if self.path.is_file() else ""
        name = printable(str(self.path))
        sides = ("/dev/null" if not self.path.exists() else name, name)
        after = self.content or ""
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *sides, lineterm="")
        return "\n".join(lines)

    def make(self, *, durable: bool = False) -> None:
        """Write in one piece: nobody reads half a file. `durable`: nor does anybody after a power cut. OSError."""
        path = self.path.resolve()  # a link to a file elsewhere stays one
        if self.content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(path, self.content, durable)
            except OSError as error:  # it would name a file that is gone
                raise OSError(error.errno, error.strerror, str(self.path)) from None
        elif path.is_dir():
            path.rmdir()
        else:
            self.path.unlink()
        if durable:
            _fsync_directory(path.parent)

    def _write(self, path: Path, content: str, durable: bool) -> None:
        unready = path.with_name(f"{path.name}.{os.urandom(6).hex()}.unready")
        fd = os.open(unready, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8", newline="") as file:
                file.write(content)
                file.flush()
                model = self.like or path
                if model.exists():
                    _make_like(fd, model)
                else:
                    os.fchmod(fd, self.mode)
                if durable:
                    os.fsync(fd)
            os.replace(unready, path)
        except BaseException:
            unready.unlink(missing_ok=True)
            raise


def read(path: Path) -> str:
    """A file's text with its line ends as they are. OSError: EINVAL for a pipe and its like, EILSEQ if not UTF-8."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "not UTF-8", str(path)) from None


def needed(changes: list[Change]) -> list[Change]:
    """Those that change something. OSError."""
    return [
        change for change in changes
        if change.content is None or not change.path.exists() or read(change.path) != change.content
    ]  # fmt: skip


_OF_THE_CONTENT = {"security.ima", "security.evm"}
"""xattrs that are hashes or signatures"""


def _make_like(fd: int, model: Path) -> None:
    st = model.stat()
    os.fchown(fd, st.st_uid, st.st_gid)
    for name in set(os.listxattr(model)) - _OF_THE_CONTENT:
        with suppress(OSError):  # a name that only the kernel or a security module may set
            os.setxattr(fd, name, os.getxattr(model, name))
    os.fchmod(fd, stat.S_IMODE(st.st_mode))


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

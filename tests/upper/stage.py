"""An upper on a disk that fails on demand, overlays' accounts on it, and the host beside them."""

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from overt.host import files
from overt.lab import Disk
from overt.ledger import Account, UpperError
from overt.upper import Upper, Uppers

BLOCK = 4096
SECONDS = 30.0


def told(call: Callable[[], object]) -> int:
    """The errno that the call raises, or 0."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


class Stage:
    """One disk, and one process's uppers (`uppers` may be replaced before the first overlay)."""

    def __init__(self, filesystem: str, stack: ExitStack) -> None:
        self.disk = stack.enter_context(Disk(filesystem))
        self.root = Path(self.disk.path)
        self.heard: list[UpperError] = []
        self.uppers = Uppers(self.hear)
        self.count = 0
        stack.callback(lambda: self.uppers.close())

    def hear(self, error: UpperError, upper: Upper) -> None:
        self.heard.append(error)

    def attach(self, name: str = "", *, volatile: bool = False, under: Path | None = None) -> tuple[Upper, Account]:
        """Mount an overlay, as far as its upper is concerned; with the directories that it would have."""
        self.count += 1
        base = (under or self.root) / (name or f"overlay-{self.count}")
        (base / "upper").mkdir(parents=True)
        (base / "work").mkdir()
        fds = [os.open(base / part, os.O_RDONLY | os.O_DIRECTORY) for part in ("upper", "work")]
        try:
            upper = self.uppers.get(*fds)
            return upper, upper.attach(name, volatile=volatile)
        finally:
            for fd in fds:
                os.close(fd)

    def write(self, name: str, pages: int = 1, stride: int = BLOCK) -> int:
        """Dirty a file's pages with the disk's marker; return its inode number."""
        fd = os.open(self.root / name, os.O_WRONLY | os.O_CREAT)
        try:
            page = self.disk.marker * (BLOCK // len(self.disk.marker))
            for number in range(pages):
                os.pwrite(fd, page, number * stride)
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    def lose(self, name: str, pages: int = 1, stride: int = BLOCK) -> int:
        """Have a file's pages fail to be written back; nobody has looked yet. Return the inode number."""
        ino = self.write(name, pages, stride)
        self.disk.fail("data")
        self.disk.push()
        self.disk.heal()
        return ino

    def host(self) -> int:
        """What a program on the host is told that opens the upper now and calls syncfs."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            return told(lambda: files.syncfs(fd))
        finally:
            os.close(fd)


def flush(upper: Upper) -> OSError | None:
    """Flush and wait."""
    answers: list[OSError | None] = []
    answered = threading.Event()

    def done(failure: OSError | None) -> None:
        answers.append(failure)
        answered.set()

    upper.flush(done)
    assert answered.wait(SECONDS), "no answer"
    return answers[0]


def errnos(upper: Upper) -> list[int]:
    return [error.errno for error in upper.ledger.errors]

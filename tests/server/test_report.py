"""Which lost files are named, and whether those are all."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overt.server import report
from overt.upper.upper import Failed


def said(top: Path, *lost: int) -> tuple[list[str], bool]:
    """What is said of a mount with the upper `top` where writing these inodes back has failed."""
    fd = os.open(top, os.O_PATH)
    last = 1e12  # however late they were made
    upper = SimpleNamespace(
        s_dev=os.stat(top).st_dev, failed=lambda *_, **__: {number: Failed(1, 0, last) for number in lost}
    )
    mount: Any = SimpleNamespace(
        target="/mnt", volatile=False, upper=upper, lost={}, account=SimpleNamespace(count=1, mounted_at=0),
        tree=SimpleNamespace(layers=[SimpleNamespace(root=fd)]),
    )  # fmt: skip
    try:
        record = report.verdict(mount, None)
    finally:
        os.close(fd)
    assert not [place for each in Path("/proc/self/fd").iterdir() if top in (place := each.resolve(), *place.parents)]
    return record["files"], record["perhaps_more"]


def test_a_lost_file_is_named_however_long_its_path(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=directory)
        above, directory = directory, os.open("d" * 250, os.O_RDONLY, dir_fd=directory)
        os.close(above)
    file = os.open("lost", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
    number = os.stat(file).st_ino
    os.close(file)
    os.close(directory)
    near = tmp_path / "near"
    near.touch()
    assert said(tmp_path, number, near.stat().st_ino) == ([f"/{'d' * 250}" * 20 + "/lost", "/near"], False)


@pytest.mark.parametrize(("why", "perhaps_more"), [(errno.EIO, True), (errno.ENOENT, False)])
@pytest.mark.parametrize("call", ["scandir", "lstat"])
def test_there_may_be_more_lost_files_where_the_upper_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, why: int, perhaps_more: bool
) -> None:
    """Not where what cannot be read was removed meanwhile."""
    (tmp_path / "lost").touch()
    below = tmp_path / "below"
    below.mkdir()
    (below / "bad").touch()
    real = getattr(os, call)

    def fails(path: Any, **options: Any) -> Any:
        if path == "bad" or (isinstance(path, int) and os.path.samestat(os.fstat(path), below.stat())):
            raise OSError(why, os.strerror(why))
        return real(path, **options)

    monkeypatch.setattr(os, call, fails)
    assert said(tmp_path, (tmp_path / "lost").stat().st_ino) == (["/lost"], perhaps_more)

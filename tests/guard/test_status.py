"""Asking a guard that does not answer as it should; and names that containers have chosen, on a terminal."""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.guard import supervisor
from overt.printable import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"/u\x1b[31m\nguard 1: all is well", "/u\\x1b[31m\\nguard 1: all is well"), (b"/\xff", "/\\xff"),
        ("/h\u00fc \u202e\u2028".encode(), "/h\u00fc \\u202e\\u2028"),
    ],
)  # fmt: skip
def test_a_name_that_a_container_has_chosen_is_shown_in_one_line(name: bytes, shown: str) -> None:
    assert printable(os.fsdecode(name)) == shown


@given(st.text() | st.binary().map(os.fsdecode))
def test_whatever_a_name_is_it_can_be_printed(name: str) -> None:
    assert printable(name).isprintable()
    assert printable(name).encode().decode() == printable(name)


def asked(path: Path, patience: float = 0.3) -> str:
    """What is said by a guard that cannot be asked."""
    with pytest.raises(OSError) as raised:
        supervisor.ask(path, patience)
    assert raised.value.filename == str(path)
    return str(raised.value.strerror)


def test_a_path_that_is_too_long_is_called_so(tmp_path: Path) -> None:
    assert asked(tmp_path / ("x" * 120)) == "AF_UNIX path too long"


@pytest.mark.timeout(30)
def test_why_a_guard_cannot_be_asked_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "guard"
    assert "is `overt guard run` running?" in asked(path)
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert "To ask root's guard, be root" in asked(path)
    with supervisor.listen(supervisor.status_path(path)) as listening:
        assert "no answer within 0.3 s" in asked(path)
        listening.accept()[0].close()
        trickle = threading.Thread(target=tell, args=(listening, b"{"), daemon=True)
        trickle.start()
        assert "no answer within 0.3 s" in asked(path)
        trickle.join(10)
        broken = threading.Thread(target=tell, args=(listening, b'{"worker"', 1), daemon=True)
        broken.start()
        assert "the guard's worker ended while it was asked" in asked(path, 5)
        broken.join(10)


def tell(listening: socket.socket, data: bytes, pieces: int = 9) -> None:
    """Answer one that asks, slowly."""
    connection, _ = listening.accept()
    with connection, suppress(OSError):
        for _ in range(pieces):
            connection.sendall(data)
            time.sleep(0.1)

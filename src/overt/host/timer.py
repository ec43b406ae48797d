"""A timer that a thread can wait for, timerfd_create(2). (Python has it since 3.13.)"""

import os
import struct

from overt.host.libc import check, libc

_CLOCK_MONOTONIC = 1
_ITIMERSPEC = struct.Struct("=qqqq")


class Timer:
    """One thread waits; any other sets when it goes off, as often as it likes, before or after."""

    __slots__ = ("_fd", "_settings")

    def __init__(self) -> None:
        self._fd = check(libc.timerfd_create(_CLOCK_MONOTONIC, os.O_CLOEXEC))
        self._settings: dict[float, bytes] = {}

    def arm(self, seconds: float) -> None:
        """Go off once, so many seconds from now and not when it was to before; 0: not at all."""
        setting = self._settings.get(seconds)
        if setting is None:
            setting = self._settings[seconds] = _ITIMERSPEC.pack(0, 0, int(seconds), int(seconds % 1 * 1e9))
        libc.timerfd_settime(self._fd, 0, setting, None)

    def wait(self) -> None:
        """Return when it has gone off."""
        os.read(self._fd, 8)

    def close(self) -> None:
        """Let go of it; nobody may be waiting."""
        os.close(self._fd)

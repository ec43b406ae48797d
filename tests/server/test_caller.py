"""What is to be seen of whoever asks."""

import os
import signal
import subprocess

import pytest

from overt.server import caller

pytestmark = pytest.mark.timeout(30)


def test_a_caller_outside_our_pid_namespace_is_not_taken_for_dead() -> None:
    """Its number is 0, and nothing is to be seen of it: a timer of its must not make an open fail."""
    assert not caller.is_dying(0)


def test_who_is_gone_or_has_been_killed_is_dying() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert not caller.is_dying(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert caller.is_dying(child.pid)

"""What is to be seen of whoever asks."""

import os
import platform
import runpy
import signal
import subprocess

import pytest

from overt.server import caller

pytestmark = pytest.mark.timeout(30)


def test_a_caller_outside_our_pid_namespace_is_not_taken_for_dead() -> None:
    """Its number is 0, and nothing is to be seen of it: a timer of its must not make an open fail."""
    assert not caller.is_dying(0)


@pytest.mark.parametrize(
    ("machine", "numbers"), [("x86_64", [306, 0x40000000 | 306, 344]), ("aarch64", [267, 373]), ("riscv64", [])]
)
def test_syncfs_is_known_by_each_number_that_the_kernel_serves(
    machine: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    call = runpy.run_path(caller.__file__)["Call"]
    known = {306, 0x40000000 | 306, 344, 267, 373, 388}
    assert {number for number in known if call(1, number, 3).is_syncfs} == set(numbers)


def test_who_is_gone_or_has_been_killed_is_dying() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert not caller.is_dying(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert caller.is_dying(child.pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("unseen", [False, True])
def test_what_root_may_do_is_what_the_kernel_lets_it(unseen: bool) -> None:
    """And where that is not to be seen, what whoever asks takes for right."""
    caps = "sys_admin", "fsetid"

    def has(*words: str) -> list[bool]:
        child = subprocess.Popen([*words, "sh", "-c", "echo; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None and child.stdout.readline()
            return [caller.has_capability(child.pid, name, unseen=unseen) for name in caps]
        finally:
            child.communicate()

    assert has("env") == [True, True]
    assert has("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin") == [False, True]
    assert has("unshare", "--user", "--map-root-user") == [False, False], "it is root there, and not here"
    assert caller.has_capability(0, "fsetid", unseen=unseen) == unseen

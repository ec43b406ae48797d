"""Where a process is."""

import subprocess
import sys

import pytest

from overt.host.process import in_user_namespace

_SAY = "from overt.host.process import in_user_namespace; print(in_user_namespace())"


def test_the_first_user_namespace_is_no_other() -> None:
    assert not in_user_namespace()


@pytest.mark.parametrize("ids", ["0 0 1", "0 0 4294967295"], ids=["one id", "all ids"])
def test_another_one_is_known_whatever_it_maps(ids: str) -> None:
    """Trusted xattrs are for the first one alone, even where every id is what it is outside."""
    process = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", 'read -r _; exec "$@"', "sh", sys.executable, "-c", _SAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while _name(process.pid) != "sh":  # it has entered the namespace by then
        assert process.poll() is None
    for kind in ("uid_map", "gid_map"):
        with open(f"/proc/{process.pid}/{kind}", "w") as file:
            file.write(ids)
    said, _ = process.communicate("go\n", timeout=30)
    assert said == "True\n"


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()

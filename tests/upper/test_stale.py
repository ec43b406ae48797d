"""Servers that start at the same moment, after others were killed: each gets the tracepoint."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

# Each leaves an instance behind, which whoever comes next removes: the kernel says ENODEV to all of them but one.
LEAVER = """
import os
from overt.upper.trace import Trace
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Trace()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(1)
"""


def test_what_another_server_removes_at_the_same_time_keeps_nobody_from_the_tracepoint() -> None:
    starting = [subprocess.Popen([sys.executable, "-c", LEAVER], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        said = [one.communicate(timeout=50)[1] for one in starting]
    finally:
        for one in starting:
            if one.poll() is None:
                one.kill()
                one.wait()
    assert [one.returncode for one in starting] == [0] * 4, said
    # What the last ones left goes with the next server.
    subprocess.run(
        [sys.executable, "-c", "from overt.upper.trace import Trace; Trace().close()"], check=True, timeout=30
    )

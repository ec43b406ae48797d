"""Servers are started once for each set of switches, and shared by the tests; disks are each test's own."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from overt.host import mounts

from .guard import Guard
from .scene import Scene, Server, open_scene

UPPERS = ("ext4", "xfs", "btrfs")


class Servers:
    """The servers of this session, by what is switched off in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[str, Server] = {}
        self._started: list[Server] = []
        self._guard = Guard()
        self._deadline: float | None = None

    def get(self, off: str = "") -> Server:
        server = self.running.get(off)
        if server is None or not server.alive:
            server = self.running[off] = self.start(off)
        return server

    def start(self, off: str = "") -> Server:
        """A server that nobody else uses."""
        server = Server(self.directory / f"server-{len(self._started)}", off)
        self._started.append(server)
        self._arm()
        return server

    def limit(self, seconds: float) -> None:
        """Nobody waits for a server of ours any longer."""
        self._deadline = time.monotonic() + seconds
        self._arm()

    def no_limit(self) -> None:
        self._deadline = None
        self._guard.disarm()

    def _arm(self) -> None:
        if self._deadline is not None:
            pids = [server.pid for server in self._started if server.alive]
            self._guard.arm(pids, max(1.0, self._deadline - time.monotonic()))

    def close(self) -> None:
        """End those that are shared; the others are to be ended by who started them."""
        statuses = {server.off: server.stop() for server in self.running.values()}
        assert not any(statuses.values()), statuses

    def kill(self) -> None:
        for server in self._started:
            server.kill()
        self._guard.close()


@pytest.fixture(scope="session")
def registry() -> Iterator[None]:
    """A registry of the session's own: commands in these tests see no other server, and nobody sees ours."""
    place = Path("/run/overt")
    place.mkdir(exist_ok=True, mode=0o700)
    fd = mounts.new_mount("tmpfs", [("mode", "700")])
    mounts.attach(fd, str(place))
    try:
        yield
    finally:
        mounts.umount(str(place), mounts.MNT_DETACH)


@pytest.fixture(scope="session")
def servers(registry: None) -> Iterator[Servers]:
    directory = Path(tempfile.mkdtemp(prefix="overt-contract-"))
    servers = Servers(directory)
    try:
        yield servers
        servers.close()
    finally:
        servers.kill()
        shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def nothing_hangs(request: pytest.FixtureRequest, servers: Servers) -> Iterator[None]:
    marker = request.node.get_closest_marker("timeout")
    servers.limit(float(marker.args[0]) + 10 if marker else 120.0)
    yield
    servers.no_limit()


@pytest.fixture(params=UPPERS)
def filesystem(request: pytest.FixtureRequest) -> str:
    """The kinds of upper."""
    return str(request.param)


@pytest.fixture
def stage(servers: Servers) -> Iterator[Callable[..., Scene]]:
    """Make a scene: `stage("ext4", off="telling")`. No server may have met an exception that is not an OSError."""
    used: list[Server] = []
    with ExitStack() as stack:

        def make(filesystem: str, off: str = "", **disk: object) -> Scene:
            server = servers.get(off)
            used.append(server)
            return stack.enter_context(open_scene(filesystem, server, **disk))

        yield make
    for server in used:
        if server.alive:
            assert not server.client.status()["events"].get("internal error"), server.log.read_text()[-4000:]


@pytest.fixture
def scene(stage: Callable[..., Scene], filesystem: str) -> Scene:
    """A scene on each kind of upper."""
    return stage(filesystem)


@pytest.fixture
def ext4(stage: Callable[..., Scene]) -> Scene:
    return stage("ext4")

"""Real containers on kernel overlayfs over a disk that fails on demand, and a guard beside them.

A container is an OCI bundle that runc or crun runs. Its root is an overlay that the kernel mounts; its only program
(asker.c) does what the test says and answers. Namespaces are those of a container, except that of the host name, by
which the session finds processes that a test has left.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import overt
from overt.guard import profile, supervisor
from overt.host import files, mounts
from overt.lab import Disk

HERE = Path(__file__).parent
SOURCE = Path(overt.__file__).parent.parent
EINTR, EIO, EBADF, ENOSYS = 4, 5, 9, 38
SECONDS = 30.0
RUNTIMES = ("runc", "crun")

# crun wants to see one kind of cgroups; the machine's may be of both.
_APART = ["unshare", "-m", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh"]


def why_not(*runtimes: str) -> str | None:
    """Why there can be no containers, if so."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in (*runtimes, "gcc") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (make test installs it)" if missing else None


def build_asker(directory: Path) -> Path:
    """Compile the container's program."""
    program = directory / "asker"
    words = ["gcc", "-O1", "-Wall", "-Werror", "-static", "-pthread", "-o", str(program), str(HERE / "asker.c")]
    subprocess.run(words, check=True, timeout=60)
    return program


class Guard:
    """`overt guard run`, with a log that a test can read."""

    def __init__(self, socket: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        self.socket = socket
        self.log = socket.with_suffix(".log")
        ready, tell = os.pipe()
        words = [*prefix, sys.executable, "-m", "overt", "guard", "run", "-f", "--socket", str(socket)]
        words += ["--ready-fd", str(tell), *options]
        try:
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    words, pass_fds=[tell], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env={**os.environ, "PYTHONPATH": str(SOURCE)},
                )  # fmt: skip
        finally:
            os.close(tell)
        try:
            came = select.select([ready], [], [], 60.0)[0] and os.read(ready, 1)
        finally:
            os.close(ready)
        if not came:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no guard: {self.log.read_text()}")

    def status(self) -> dict[str, Any]:
        """What `overt guard status --json` says; asked again if the worker died meanwhile."""
        for _ in range(50):
            with suppress(OSError):
                return supervisor.ask(self.socket)
            time.sleep(0.05)
        return supervisor.ask(self.socket)

    @property
    def worker(self) -> int:
        return int(self.status()["worker"])

    def kill_worker(self) -> None:
        """Kill the worker that runs now; another will come."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of this kind so far."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event for event in lines if event["event"] == kind]

    def stop(self) -> int:
        """End it as SIGTERM does."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the guard did not end: {self.log.read_text()[-2000:]}") from None


class Container:
    """One running container, and the conversation with the program in it."""

    def __init__(self, ground: "Ground", number: int, runtime: str, guarded: bool, changes: dict[str, Any]) -> None:
        self.id = f"overt-guard-{os.getpid()}-{ground.name}-{number}"
        self.runtime = runtime
        self.program: list[str] = changes.pop("program", [runtime])
        guarded = changes.pop("guarded", guarded)
        self.ground = ground
        self.bundle = ground.base / f"bundle-{number}"
        self.root = self.bundle / "rootfs"
        self.root.mkdir(parents=True)
        self.disk: Disk = changes.pop("disk", ground.disk)
        self.number = changes.pop("again", number)
        self.upper, work = (Path(self.disk.path, f"{kind}-{self.number}") for kind in ("upper", "work"))
        if self.number == number:
            self.upper.mkdir()
            work.mkdir()
        options: list[tuple[str, str | int | None]] = [
            ("lowerdir", str(ground.lower)), ("upperdir", str(self.upper)), ("workdir", str(work)),
            *((name, value or None) for name, _, value in (flag.partition("=") for flag in changes.pop("flags", ()))),
        ]  # fmt: skip
        fd = mounts.new_mount("overlay", options)
        try:
            mounts.attach(fd, str(self.root))
        finally:
            os.close(fd)
        (self.bundle / "config.json").write_text(json.dumps(ground.config(self.root, guarded, changes)))
        given, self._in = os.pipe()
        self._out, said = os.pipe()
        self._heard = b""
        try:
            with open(self.bundle / "log", "wb") as log:
                self._start(stdin=given, stdout=said, stderr=log)
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"{error}: {(self.bundle / 'log').read_text()}") from None
        finally:
            os.close(given)
            os.close(said)
        self.pid = int(json.loads(self._do("state", self.id, stdout=subprocess.PIPE).stdout)["pid"])

    def _start(self, **streams: Any) -> None:
        """As containerd's shim does it."""
        log = ("--log", str(self.bundle / "log.json"), "--log-format", "json")
        pid = str(self.bundle / "pid")
        self._do(*log, "create", "--bundle", str(self.bundle), "--pid-file", pid, self.id, **streams)
        self._do("start", self.id)

    def _do(self, *words: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        command = [*_APART, *self.program, "--root", str(self.ground.base / self.runtime), *words]
        options = {"stdin": subprocess.DEVNULL, "check": True, "timeout": SECONDS, **options}
        return subprocess.run(command, **options)

    def say(self, *words: object) -> None:
        """Tell the program to do something; it answers when that is done."""
        os.write(self._in, " ".join(map(str, words)).encode() + b"\n")

    def hear(self, seconds: float = SECONDS) -> list[int]:
        """The next answer."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._heard:
            poll = select.poll()
            poll.register(self._out, select.POLLIN)
            assert poll.poll(max(0.0, deadline - time.monotonic()) * 1000), f"{self.id}: no answer in {seconds:g} s"
            data = os.read(self._out, 4096)
            assert data, f"{self.id} has ended: {(self.bundle / 'log').read_text()}"
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return [int(word) for word in line.split()]

    def ask(self, *words: object, seconds: float = SECONDS) -> int:
        """The (one) number that the program answers."""
        self.say(*words)
        return self.hear(seconds)[0]

    def open(self, path: str = "/") -> int:
        fd = self.ask("open", path)
        assert fd >= 0, os.strerror(-fd)
        return fd

    def syncfs(self, fd: int) -> int:
        """The errno that syncfs(2) returns, or 0."""
        return self.ask("syncfs", fd)

    def new_syncfs(self, path: str = "/") -> int:
        """The same, on a descriptor opened just now."""
        fd = self.open(path)
        try:
            return self.syncfs(fd)
        finally:
            self.ask("close", fd)

    def lose(self, name: str = "/victim") -> int:
        """Write a page whose write-back fails; nobody has been told yet. The descriptor that wrote."""
        self.disk.fail("data")  # before the page is dirty: somebody else may be flushing all the time
        fd = self.ask("write", name, self.disk.marker.hex(), 1)
        assert fd >= 0, os.strerror(-fd)
        fail(self.disk)
        return fd

    def execute(self, *words: str) -> int:
        """Run a command in it as `podman exec` does; its exit status."""
        return self._do("exec", self.id, *words, check=False).returncode

    def kill(self) -> None:
        """End it at once."""
        self._do("kill", self.id, "KILL", check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End it and take it away."""
        for fd in (self._in, self._out):
            os.close(fd)
        self.kill()
        self._do("delete", "-f", self.id)
        wait_until(self._unmount, f"{self.id} lets go of its root")

    def _unmount(self) -> bool:
        try:
            mounts.umount(str(self.root))
        except OSError as error:
            if error.errno != 16:
                raise
            return False
        return True


class Ground:
    """A disk, containers on it, and a guard if the test starts one."""

    def __init__(self, base: Path, disk: Disk, asker: Path, name: str) -> None:
        self.base = base
        self.disk = disk
        self.name = name
        self.lower = base / "lower"
        for part in ("proc", "dev", "sys", "tmp"):
            (self.lower / part).mkdir(parents=True)
        shutil.copy(asker, self.lower / "asker")
        (self.lower / "file").write_text("lower")
        self.containers: list[Container] = []
        self.guard: Guard | None = None
        self._number = 0

    def start_guard(self, *options: str) -> Guard:
        self.guard = Guard(self.base / "guard", *options)
        return self.guard

    def container(self, runtime: str = "crun", *, wait: bool = True, **changes: Any) -> Container:
        """Start one; guarded if a guard runs."""
        self._number += 1
        ordinary = "flags" not in changes
        made = Container(self, self._number, runtime, self.guard is not None, changes)
        self.containers.append(made)
        if self.guard is not None and ordinary and wait:
            guard = self.guard
            wait_until(
                lambda: any(each["upperdir"] == str(made.upper) and each["guarded"]
                            for each in guard.status()["overlays"]),
                "the guard has taken the container",
            )  # fmt: skip
        return made

    def end(self, container: Container) -> None:
        self.containers.remove(container)
        container.close()

    def config(self, root: Path, guarded: bool, changes: dict[str, Any]) -> dict[str, Any]:
        """A bundle's config.json."""
        names = ["pid", "ipc", "mount"]
        capabilities = changes.pop("capabilities", [])
        whole = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": changes.pop("args", ["/asker"]), "cwd": "/",
                "env": ["PATH=/"], "noNewPrivileges": True,
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            },
            "root": {"path": str(root), "readonly": False},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, *changes.pop("mounts", [])],
            "linux": {"namespaces": [{"type": name} for name in names]},
        }  # fmt: skip
        filtered = dict(profile.MINIMAL)  # a profile costs something by itself
        whole["linux"]["seccomp"] = (  # type: ignore[index]
            profile.make(filtered, str(self.base / "guard")) if guarded else filtered
        )
        return whole

    def host_syncfs(self) -> int:
        """What a program on the host is told that opens the upper now."""
        fd = os.open(self.disk.path, os.O_RDONLY)
        try:
            files.syncfs(fd)
        except OSError as error:
            return error.errno or -1
        finally:
            os.close(fd)
        return 0

    @contextmanager
    def nothing_kept(self) -> Iterator[None]:
        """At the end the guard's processes are the same, have no more descriptors open, and nothing went wrong.

        What comes inside has to go inside.
        """
        assert self.guard is not None
        guard = self.guard
        pids = (guard.process.pid, guard.worker)
        before = [descriptors(pid) for pid in pids]
        yield
        assert guard.worker == pids[1], guard.log.read_text()[-4000:]

        def after() -> list[int]:
            return [descriptors(pid) for pid in pids]

        with suppress(AssertionError):
            wait_until(lambda: all(now <= then for now, then in zip(after(), before, strict=True)), "", 15)
        assert all(now <= then for now, then in zip(after(), before, strict=True)), (before, after())
        status = guard.status()
        assert (status["crashes"], guard.events("internal error")) == (0, [])

    def close(self) -> None:
        with ExitStack() as stack:
            if self.guard is not None and self.guard.process.poll() is None:
                stack.callback(self.guard.stop)
            for container in self.containers:
                stack.callback(container.close)


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def fail(disk: Disk) -> None:
    """Let what is dirty meet a failing disk, which is then well again."""
    disk.fail("data")
    disk.push()
    disk.heal()


@contextmanager
def ground(base: Path, asker: Path, name: str, filesystem: str = "ext4") -> Iterator[Ground]:
    with Disk(filesystem, size=64 << 20) as disk:
        made = Ground(base, disk, asker, name)
        try:
            yield made
        finally:
            made.close()


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.01)

"""A private PostgreSQL: a cluster of its own, reached by a socket in its directory, run as nobody."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .ground import NOBODY, Failed, kill_group, prefix, run

SETTINGS = """
listen_addresses = ''
port = 5432
shared_buffers = 16MB
max_connections = 20
fsync = on
data_sync_retry = off
dynamic_shared_memory_type = mmap
restart_after_crash = off
checkpoint_timeout = 1h
max_wal_size = 2GB
log_min_messages = log
log_checkpoints = on
"""


def binaries() -> Path:
    """Where the newest installed PostgreSQL has its programs; skips the test if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    return found[-1]


class Cluster:
    """A cluster in `home`, which is made for it; `settings` are further lines of postgresql.conf."""

    def __init__(self, home: Path, settings: str = "") -> None:
        self.home = home
        self.bin = binaries()
        self.data = home / "data"
        home.mkdir(mode=0o700)
        os.chown(home, NOBODY, NOBODY)
        words = ["--no-sync", "--data-checksums", "--auth=trust", "--username=test", "--no-locale", "--encoding=UTF8"]
        self.call("initdb", *words, "-D", str(self.data))
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(f"{SETTINGS}unix_socket_directories = '{home}'\n{settings}")
        self.log = home / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, program: str, *words: str, timeout: float = 120.0) -> str:
        """Run one of PostgreSQL's programs."""
        env = {"PGHOST": str(self.home), "PGUSER": "test", "PGDATABASE": "postgres", "HOME": str(self.home)}
        return run(self.bin / program, *words, cwd=self.home, user=NOBODY, env=env, timeout=timeout)

    def sql(self, text: str) -> str:
        """What psql prints for `text`; Failed if the server does not take it."""
        return self.call("psql", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-c", text).strip()

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*prefix(NOBODY), self.bin / "postgres", "-D", self.data],
                cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                self.call("pg_isready", "-q", timeout=10)
                return
            except Failed:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise Failed(f"the server did not start:\n{self.said()[-4000:]}") from None
                time.sleep(0.1)

    def stop(self, number: int = signal.SIGINT) -> None:
        """Stop the server: SIGINT fast, SIGQUIT at once, without a checkpoint (pg_ctl(1))."""
        assert self.process is not None
        self.process.send_signal(number)
        self.ended()

    def ended(self, seconds: float = 60.0) -> int:
        """Wait for the server to end; return its exit status."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"the server did not end:\n{self.said()[-4000:]}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Whatever it takes. Each backend leads a process group of its own; they end when the postmaster has."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGQUIT)  # lets it remove its shared memory
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        children = _children(self.process.pid)
        kill_group(self.process)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process = None

    def said(self) -> str:
        """The server's log."""
        return self.log.read_text(errors="replace")


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@contextmanager
def cluster(home: Path, settings: str = "") -> Iterator[Cluster]:
    """A Cluster that is started, and stopped in any case."""
    made = Cluster(home, settings)
    try:
        made.start()
        yield made
        if made.process is not None:
            made.stop()
    finally:
        made.kill()

"""Programs that the bench runs, with an environment that holds nothing of the user's."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENVIRONMENT = {
    "PATH": PATH,
    "LC_ALL": "C",
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
}


def installed(name: str) -> bool:
    """Whether the command `name` can be run."""
    return shutil.which(name, path=PATH) is not None


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command to its end, its output thrown away. Raises OSError with its last complaint if it fails."""
    finish(command, subprocess.run(command, cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))  # fmt: skip


def output(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it printed. Raises OSError with its last complaint if it fails."""
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True)
    finish(command, done)
    return done.stdout.decode(errors="replace")


def finish(command: Sequence[str | Path], done: subprocess.CompletedProcess[bytes]) -> None:
    """Raise OSError unless the command ended well."""
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{command[0]}: {lines[-1] if lines else f'exit status {done.returncode}'}")

"""One container, by each engine: started, made to call syncfs(2), and taken away. For guard/check.py."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from overt.guard import engines, install, profile

_SECONDS = 60.0
_HOST = ("/usr", "/bin", "/lib", "/lib64")
"""what the host's programs need"""
_SLEEP = ("sleep", "600")


class RunnerError(Exception):
    """Why there is no container, in the engine's words."""


class Runner:
    """See above. `root` is a mounted overlay; `scratch` a directory for the runner's own files."""

    program = ""
    place = "/"
    """where the overlay is in the container"""

    def __init__(self, scratch: Path, root: Path, socket: str, runtime: str | None) -> None:
        self.scratch = scratch
        self.root = root
        self.socket = socket
        self.runtime = runtime
        self.id = f"overt-check-{os.getpid()}"

    @property
    def what(self) -> str:
        """The container, in words."""
        return f"by {self.program}{f' with the runtime {self.runtime}' if self.runtime else ''}"

    def start(self) -> None:
        """Start it. RunnerError."""
        raise NotImplementedError

    def sync(self) -> tuple[int, str]:
        """syncfs(2) in it, on a new descriptor: the exit status of sync(1), and what it said."""
        done = self.run(*self.enter(), "sync", "-f", self.place, check=False)
        return done.returncode, done.stderr.decode(errors="replace").strip().rpartition("\n")[2]

    def enter(self) -> Sequence[str]:
        """The command line that runs a command in it."""
        return (self.program, "exec", self.id)

    def stop(self) -> None:
        """Take it away, if it is there."""
        raise NotImplementedError

    def advice(self) -> str:
        """What to do when its profile is not ours."""
        return f" (`overt guard install {self.program}`, and start containers anew)"

    def run(self, *words: str, check: bool = True, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        """Run a command. RunnerError if `check` and it fails."""
        # A file, as a container that goes on keeps a pipe open.
        with open(self.scratch / "out", "w+b") as out, open(self.scratch / "err", "w+b") as err:
            try:
                done = subprocess.run(words, input=given, stdout=out, stderr=err, timeout=_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise RunnerError(f"{words[0]} took more than {_SECONDS:g} s") from None
            for file in (out, err):
                file.seek(0)
            result = subprocess.CompletedProcess(words, done.returncode, out.read(), err.read())
        if check and result.returncode:
            said = result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise RunnerError(said or f"{words[0]}: exit status {result.returncode}")
        return result


class Bundle(Runner):
    """A bundle of runc's or crun's, with a profile that filters nothing else."""

    def start(self) -> None:
        config: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": list(_SLEEP), "cwd": "/", "noNewPrivileges": True,
                "env": [f"PATH={os.defpath}"],
            },
            "root": {"path": str(self.root)},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                *(
                    {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
                    for path in _host()
                ),
            ],
            "linux": {
                "namespaces": [{"type": name} for name in ("pid", "ipc", "mount")],
                "seccomp": profile.make(profile.MINIMAL, self.socket),
            },
        }  # fmt: skip
        (self.scratch / "config.json").write_text(json.dumps(config))
        self.run(*self._words("run", "-d", "-b", str(self.scratch), self.id))

    def _words(self, *words: str) -> Sequence[str]:
        return (self.program, "--root", str(self.scratch / "state"), *words)

    def enter(self) -> Sequence[str]:
        return self._words("exec", self.id)

    def stop(self) -> None:
        self.run(*self._words("delete", "-f", self.id), check=False)

    def advice(self) -> str:
        return " though it names it"


class Runc(Bundle):
    """runc."""

    program = "runc"


class Crun(Bundle):
    """crun."""

    program = "crun"


class Podman(Runner):
    """podman, with the profile that its configuration names."""

    program = "podman"

    def start(self) -> None:
        volumes = [word for path in _host() for word in ("-v", f"{path}:{path}:ro")]
        global_words = ("--runtime", self.runtime) if self.runtime else ()
        self.run(
            "podman", *global_words, "run", "-d", "--name", self.id, "--network", "none", *volumes,
            "--rootfs", str(self.root), *_SLEEP,
        )  # fmt: skip

    def stop(self) -> None:
        self.run("podman", "rm", "--force", "--time", "0", self.id, check=False)


class Docker(Runner):
    """docker, with the runtime of the name given, else the daemon's default; the overlay is a volume."""

    program = "docker"
    place = "/overt-check"
    _image = "overt-guard-check:empty"

    def start(self) -> None:
        empty = io.BytesIO()
        tarfile.open(fileobj=empty, mode="w").close()
        self.run("docker", "import", "-", self._image, given=empty.getvalue())
        volumes = [word for path in _host() for word in ("-v", f"{path}:{path}:ro")]
        runtime = ("--runtime", self.runtime) if self.runtime else ()
        self.run(
            "docker", "run", "-d", "--name", self.id, "--network", "none", *runtime, *volumes,
            "-v", f"{self.root}:{self.place}", self._image, *_SLEEP,
        )  # fmt: skip

    def stop(self) -> None:
        self.run("docker", "rm", "-f", self.id, check=False)
        self.run("docker", "rmi", self._image, check=False)

    def advice(self) -> str:
        if self.runtime:
            return f": is `{self.runtime}` what `overt guard install docker` has made?"
        return " (it does with `--runtime overt`; for all containers: `overt guard install docker --default`)"


class Containerd(Runner):
    """containerd by ctr(8), with the program that its configuration's `overt` names."""

    program = "containerd"

    def start(self) -> None:
        binary = Path(self.runtime) if self.runtime else engines.CONTAINERD / engines.PROGRAM
        if not binary.exists():
            raise RunnerError(f"{binary} is not there (`overt guard install containerd` makes it)")
        volumes = [
            word for path in _host()
            for word in ("--mount", f"type=bind,src={os.path.realpath(path)},dst={path},options=rbind:ro")
        ]  # fmt: skip
        self.run(
            "ctr", "run", "-d", "--runc-binary", str(binary), "--env", f"PATH={os.defpath}", *volumes,
            "--rootfs", str(self.root), self.id, *_SLEEP,
        )  # fmt: skip

    def enter(self) -> Sequence[str]:
        return ("ctr", "task", "exec", "--exec-id", f"sync-{os.urandom(4).hex()}", self.id)

    def stop(self) -> None:
        self.run("ctr", "task", "rm", "-f", self.id, check=False)
        self.run("ctr", "container", "rm", self.id, check=False)


ENGINES: dict[str, type[Runner]] = {
    "podman": Podman, "docker": Docker, "containerd": Containerd, "runc": Runc, "crun": Crun,
}  # fmt: skip
_PROGRAMS = {"containerd": "ctr"}


def installed() -> str | None:
    """The engine to check where none is named: one that has the guard in its configuration, else one that is here.

    Raises InstallError if docker's cannot be read, and OSError.
    """
    here = [engine for engine in ENGINES if shutil.which(_PROGRAMS.get(engine, engine))]
    ours: dict[str, Callable[[], bool]] = {
        "podman": (install.PODMAN / install.PROFILE).exists,
        "docker": lambda: engines.is_in_docker(engines.DOCKER),
        "containerd": (engines.CONTAINERD / engines.PROGRAM).exists,
    }
    return next((engine for engine in here if engine in ours and ours[engine]()), here[0] if here else None)


def make(engine: str, scratch: Path, root: Path, socket: str, runtime: str | None) -> Runner:
    """A runner of this engine's."""
    return ENGINES[engine](scratch, root, socket, runtime)


def _host() -> list[str]:
    return [path for path in _HOST if os.path.isdir(path)]

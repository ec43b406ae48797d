"""What users can get wrong: one line that says what and where, and the exit status for it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from overt.cli import helper, status, umount_helper
from overt.cli import main as cli
from overt.host import mounts, process
from overt.server import registry

SOURCE = Path(__file__).resolve().parents[2] / "src"
HELPER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from overt.cli.{} import main; main()"


def run(words: Sequence[str | Path], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run it in a directory in which nothing can be made, should an empty name be taken for that."""
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
        cwd="/proc", env={**os.environ, "PYTHONPATH": str(SOURCE), "OVERT_SERVER": "", **environment},
    )  # fmt: skip


def overt(*words: str | Path, prefix: Sequence[str] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    return run([*prefix, sys.executable, "-m", "overt", *words], **environment)


@pytest.mark.parametrize("words", [["--version"], ["judge", "--list", "--systems", "plain"], ["prove", "--help"]])
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_standard_output_that_is_closed_is_no_failure(words: list[str], closed: str) -> None:
    done = run(["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "overt", *words])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["mount", "-o", "lowerdir=x", ""], "overt mount: MNT is empty"),
        (["umount", ""], "overt umount: MNT is empty"),
        (["lab", "up", "-o", "bogus", ""], "overt lab up: DIR is empty"),
        (["lab", "status", ""], "overt lab status: DIR is empty"),
        (["mount", "-f", "--server", "x", "-o", "lowerdir=x", "y"], "overt mount: --foreground is for a server of its"),
        (["mount", "-o", "bogus", "y"], "overt mount: unknown option 'bogus' (see 'overt mount --help')"),
        (["mount", "-o", "lowerdir=x,metacopy=", "y"], "overt mount: metacopy= needs a value: on or off"),
        (["mount", "-o", "lowerdir=x,noxattrs=", "y"], "overt mount: noxattrs= needs a value: 0 or 1"),
        (["prove", "overt", "U" + "9" * 5000], "overt prove: Invalid value for 'USE-CASE'"),
        (
            ["judge", "--list", "--system", "{mount.bar} {mount}"],
            "overt judge: --system '{mount.bar} {mount}': '{mount.bar}' cannot be filled in",
        ),
        (["judge", "--list", "--volatile-system", "x"], "overt judge: --volatile-system 'x': it does not say {mount}"),
        (["judge", "--list", "--fs", ""], "overt judge: Invalid value for '--fs': it names nothing"),
        (["judge", "--list", "--systems", ","], "overt judge: Invalid value for '--systems': it names nothing"),
        (
            ["judge", "--list", "--html", "/nosuch/x.html"],
            "overt judge: Invalid value for '--html': '/nosuch/x.html' cannot",
        ),
        (["lab", "run", "--after", "inf", "--", "true"], "overt lab run: Invalid value for '--after'"),
        (["lab", "run", "--after", "nan", "--", "true"], "overt lab run: Invalid value for '--after'"),
        (["lab", "run", "--heal-after", "inf", "--", "true"], "overt lab run: Invalid value for '--heal-after'"),
        (["lab", "hang", "--seconds", "nan", "x"], "overt lab hang: Invalid value for '--seconds'"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(words: list[str], complaint: str) -> None:
    done = overt(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[-300:]
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("--help") == 1


@pytest.mark.parametrize(
    ("module", "words", "status"),
    [("helper", ["overt", "", "-o", "lowerdir=/no/such"], 32), ("umount_helper", [""], 32),
     ("fuse_overlayfs", ["-o", "lowerdir=/no/such", ""], 1)],
)  # fmt: skip
def test_an_empty_mount_point_is_not_the_current_directory(module: str, words: list[str], status: int) -> None:
    done = run([sys.executable, "-c", HELPER.format(module), SOURCE, *words])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert "usage: " in done.stderr or "no mountpoint specified" in done.stderr


@pytest.mark.root
def test_the_lab_does_not_hide_what_it_needs() -> None:
    done = overt("lab", "up", "/sys")
    needed = "overt: the lab itself needs what is there: name another directory: /sys\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", needed)


@pytest.mark.parametrize("program", [helper, umount_helper])
def test_a_helper_that_is_asked_how_it_is_used_says_so(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(["--help"]) == 0
    said = capsys.readouterr()
    assert (said.out.startswith("usage: "), said.err) == (True, "")


def test_who_may_not_open_dev_fuse_is_not_told_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for there, why in ((True, "may not open /dev/fuse"), (False, "not without /dev/fuse")):
        monkeypatch.setattr(os.path, "exists", lambda path, there=there: there)
        assert process.no_fuse() == why


def test_the_foreground_has_a_server_of_its_own_whatever_the_environment_says(tmp_path: Path) -> None:
    done = overt("mount", "-f", "-o", "lowerdir=/no/such", tmp_path, OVERT_SERVER="/no/server")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "/no/server" not in done.stderr


@contextmanager
def answering(path: Path, answer: bytes | None) -> Iterator[None]:
    """A socket on which something that is no server of overt's answers every line; None: with nothing at all."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        done = threading.Event()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    if answer is None:
                        done.wait(30)
                    elif connection.recv(1 << 16):
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.parametrize("answer", [b"220 ready\n", b"[]\n", b'"error"\n', b'{"supervisor": 5}\n', b"\xff\n"])
def test_a_socket_that_is_not_overts_is_named(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "socket"
    words = ["overt", tmp_path, "-o", f"lowerdir=/,server={path}"]
    said = f"{path}: what listens here is not an overt server\n"
    with answering(path, answer):
        done = overt("mount", "--server", path, "-o", "lowerdir=/", tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"overt: {said}")
        done = run([sys.executable, "-c", HELPER.format("helper"), SOURCE, *words])
        assert (done.returncode, done.stdout, done.stderr) == (32, "", f"overt: {said}")


def test_a_server_that_does_not_answer_is_named_and_the_others_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_RUN", tmp_path)
    monkeypatch.setattr(status, "_PATIENCE", 0.3)
    place = registry.directory()
    well = b'{"status": {"pid": %d, "mounts": [], "uppers": []}}\n' % os.getpid()
    with answering(place / "10.sock", None), answering(place / "20.sock", well):
        assert cli.run(["status"]) == 1
    assert capsys.readouterr() == (f"server {os.getpid()}: 0 mounts\n", "overt: server 10: no answer within 0.3 s\n")


def test_a_server_in_another_mount_namespace_is_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_RUN", tmp_path)
    with subprocess.Popen(["unshare", "-Um", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin and other.stdout
        other.stdin.write(b"x\n")
        other.stdin.flush()
        other.stdout.readline()
        well = b'{"status": {"pid": %d, "mounts": [], "uppers": []}}\n' % other.pid
        with answering(registry.directory() / "20.sock", well):
            assert cli.run(["status"]) == 0
        other.stdin.close()
    elsewhere = f"in another mount namespace (kill {other.pid} unmounts)"
    assert capsys.readouterr() == (f"server {other.pid}: 0 mounts, {elsewhere}\n", "")


@pytest.mark.parametrize("words", [["mount", "-o", "lowerdir=/", "--server"], ["serve", "--socket"]])
@pytest.mark.parametrize(
    ("name", "why"), [("x" * 120, "AF_UNIX path too long"), ("no-such/socket", "No such file or directory")]
)
@pytest.mark.root
def test_a_place_where_no_socket_can_be_is_named(tmp_path: Path, words: list[str], name: str, why: str) -> None:
    path = tmp_path / name
    done = overt(*words, path, *([tmp_path] if words[0] == "mount" else []))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"overt: {why}") and done.stderr.endswith(f": {path}\n")


@pytest.mark.root
def test_a_check_without_a_guard_says_how_to_start_one(tmp_path: Path) -> None:
    done = overt("guard", "check", "runc", "--socket", tmp_path / "none")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("runc: NOT PROTECTED\nstart a guard: overt guard run, or systemctl start overt-guard\n")


@pytest.mark.root
def test_a_file_in_the_place_of_a_socket_is_named(tmp_path: Path) -> None:
    done = overt("serve", "--socket", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"overt: there is a file that is not a socket: {tmp_path}\n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--ready-fd", "99"], {}, "--ready-fd 99: Bad file descriptor"),
        ([], {"NOTIFY_SOCKET": "/no/such"}, "NOTIFY_SOCKET=/no/such: No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", [["serve"], ["guard", "run"]])
def test_who_cannot_say_that_it_is_ready_says_so_and_does_not_serve(
    tmp_path: Path, command: list[str], words: list[str], environment: dict[str, str], said: str
) -> None:
    done = overt(*command, "--socket", tmp_path / "socket", *words, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"overt: {said}\n")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that other users can get to."""
    place = Path("/tmp") / f"overt-bad-input-{os.getpid()}"
    place.mkdir()
    for name in ("lower", "merged", "run"):
        (place / name).mkdir()
    fd = mounts.new_mount("tmpfs", [("mode", "755"), ("uid", "65534")])
    mounts.attach(fd, place / "run")
    os.close(fd)
    try:
        yield place
    finally:
        mounts.umount(place / "run", mounts.MNT_DETACH)
        shutil.rmtree(place)


NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.mark.root
def test_who_may_not_mount_is_told_what_it_takes(open_place: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    if run([*NOBODY, sys.executable, "-c", "import overt"]).returncode:
        pytest.skip(f"only its owner may run {sys.executable}, or read {SOURCE}")
    mine = {"XDG_RUNTIME_DIR": str(open_place / "run")}
    options = f"lowerdir={open_place}/lower"
    needed = "mounting is not permitted: it needs root (CAP_SYS_ADMIN), or a user namespace (unshare -Urm)\n"
    done = overt("mount", "-o", options, open_place / "merged", prefix=NOBODY, **mine)
    assert (done.returncode, done.stderr) == (1, f"overt: {needed}")
    program = [sys.executable, "-c", HELPER.format("fuse_overlayfs"), SOURCE]
    done = run([*NOBODY, *program, "-o", options, open_place / "merged"], **mine)
    assert (done.returncode, done.stderr) == (1, f"overt: {needed}")
    for words in (["up", open_place], ["status", open_place], ["run", "--", "true"]):
        done = overt("lab", *words, prefix=NOBODY)
        assert (done.returncode, done.stderr) == (1, "overt: lab needs root, to attach loop devices and to mount\n")
    done = overt("guard", "run", "--ready-fd", "99", prefix=NOBODY, **mine)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("overt guard: not root: containers' descriptors or uppers are out of")

"""The stage of one cell: a fresh disk with a filesystem, a system at work, and the parties of a scenario.

    base/            a tmpfs of this cell's own
      disk/          the failing disk
      lower/         the layer below all overlays (or disk/lower): file, other, dir/inner; precious, which is doomed
        A/upper, A/work
      mnt/A          A's overlay
      root           where a party attaches its root, in a namespace without all this

The *witness* is a descriptor of the plain filesystem, opened when nothing has happened. No system owns it or can move
its cursor: if syncfs on it does not tell of an error, there was none.
"""

import errno
import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from overt.host import files, mounts, process
from overt.judge.party import Party, contents
from overt.judge.replay import Promise, replay
from overt.judge.scenario import Nonsense, Scenario
from overt.judge.systems import Layers, Refused, System
from overt.judge.uppers import UPPERS
from overt.lab import Disk
from overt.lab.image import MEANING, Counters
from overt.lab.recording import Recording

LOWER = ("file", "other", "dir/inner")
_DROP_INODES = "2"


class Premise(Exception):
    """Something had to be so before anything could be asked, and it was not."""


class Stage:
    """What steps act upon. Its `do` answers with one word, as parties do."""

    def __init__(self, held: ExitStack, scenario: Scenario, system: System, upper: str, base: str) -> None:
        self._held = held
        self._system = system
        self._base = base
        self._upper = upper
        self._clean = _namespaces(held, base)
        row = UPPERS[upper]
        os.mkdir(f"{base}/disk")
        self.disk = held.enter_context(
            Disk(row.filesystem, scenario.size, f"{base}/disk", mount_options=row.mount_options)
        )
        self._lay_out(scenario)
        self._host = self._party("host", f"{base}/disk")
        self.witness = os.open(f"{base}/disk", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(self._close_witness)
        held.enter_context(system.serve(f"{base}/system"))
        held.callback(self._end)
        self._parties: dict[str, Party] = {}
        self._mounted: set[str] = set()
        self.armed = False
        self._armed_at = -1
        self._marked = Counters()
        self._recording: Recording | None = None
        self._promises: list[Promise] = []
        self._counters: Counters | None = None
        self.why = ""
        """what was said with the latest answer"""

    def do(self, who: str, name: str, verb: str, words: tuple[str, ...]) -> str:
        """Do a step. Raises Premise, NotApplicable, OSError; Nonsense."""
        self.why = ""
        if who == "disk":
            method = getattr(self, f"disk_{verb}", None)
            if method is None:
                raise Nonsense(f"a disk has no verb {verb!r}")
            return _call(method, words)
        if who == "host":
            return self._host.do(verb, name, words)
        if verb == "mount" and who in self._mounted:
            raise Nonsense(f"{who} is mounted already")
        if verb != "mount" and who not in (self._mounted if verb == "umount" else self._parties):
            raise Nonsense(f"{who} is not mounted")
        if verb in OF_SYSTEMS:
            return _call(OF_SYSTEMS[verb], (self, who, *words))
        return self._parties[who].do(verb, name, words)

    def counters(self) -> Counters:
        """What the disk has done so far; at the end, when it is gone: what it did."""
        return self._counters or self.disk.counters()

    def tells(self) -> bool:
        """What the witness says."""
        try:
            files.syncfs(self.witness)
        except OSError:
            return True
        return False

    def refused(self) -> int:
        """How many requests the disk has refused."""
        count = self.counters()
        return count.failed_reads + count.failed_writes + count.failed_flushes + count.failed_discards

    # Of a container: what its system does

    def _mount(self, who: str, *words: str) -> str:
        """mount [over=B]: with B's overlay as the lower layer."""
        lower = str(self._lower)
        for word in words:
            key, _, other = word.partition("=")
            if key != "over" or other not in self._mounted:
                raise Nonsense(f"mount {word}")
            lower = f"{self._base}/mnt/{other}"
        target = f"{self._base}/mnt/{who}"
        layers = Layers(lower, f"{self._base}/disk/{who}/upper", f"{self._base}/disk/{who}/work", bool(words))
        try:
            self._system.mount(layers, target)
        except Refused as why:
            self.why = str(why)
            return "refused"
        self._mounted.add(who)
        self._parties[who] = self._party(who, target, self._system.door())
        try:
            self._system.admit(layers)
        except Refused as why:
            raise Premise(f"{who}: {why}") from None
        return "0"

    def _umount(self, who: str) -> str:
        self._parties.pop(who).end()
        self._mounted.remove(who)
        return self._system.umount(f"{self._base}/mnt/{who}")

    def _kill(self, who: str) -> str:
        """kill: whatever serves the mounts is killed, and the dead mounts are taken away; parties stay."""
        self._system.kill()
        for who in () if self._system.outlives else list(self._mounted):
            mounts.umount(f"{self._base}/mnt/{who}", mounts.MNT_DETACH)
            self._mounted.remove(who)
        return "0"

    def _restart(self, who: str) -> str:
        """restart: what was killed is there again, and the mount, where it went with it."""
        return "0" if who in self._mounted else self._mount(who)

    def _commit(self, who: str, rounds: str, call: str) -> str:
        """commit ROUNDS CALL: write, ask, and note what was promised when the answer is 0; again and again.

        A round makes a new file, another that is renamed into place, and in the first rounds copies one up. Then CALL
        (syncfs, or fsync of the new file) promises that; after it the kernel writes back in its own time.
        """
        party = self._parties[who]
        party.do("mkdir", "", ["committed"])
        party.do("open", "_root", ["."])
        for number in range(_number(rounds)):
            made = {f"committed/{number}": f"new {number} ", f"committed/r{number}": f"renamed {number} "}
            if number < len(LOWER):
                made[LOWER[number]] = f"copied up {number} "
            party.do("put", "", [f"committed/{number}", f"new {number} "])
            if call == "syncfs":
                party.do("put", "", ["committed/temporary", f"renamed {number} "])
                party.do("rename", "", ["committed/temporary", f"committed/r{number}"])
                for path in LOWER[number : number + 1]:
                    party.do("put", "", [path, made[path]])
                answer = party.do("syncfs", "", ["_root"])
            else:
                made = {f"committed/{number}": f"new {number} "}
                answer = party.do("newly", "", [call, f"committed/{number}"])
            if answer != "0":
                return answer
            self._promises.append(Promise(self.disk.recorded(), f"{who}/upper", made))
            self.disk.push()
        return "0"

    # Of the disk

    def disk_record(self) -> str:
        """record: from here on, for `replay`."""
        self._recording = self.disk.record()
        self._held.callback(self._recording.close)
        return "0"

    def disk_replay(self, points: str) -> str:
        """replay POINTS: the power goes away at so many moments; kept, if what was promised is there, or lost."""
        if self._recording is None:
            raise Nonsense("replay without record")
        if not self._promises:
            raise Nonsense("replay, and nothing was promised")
        # The disk goes first: a btrfs and its copy cannot be mounted at the same time.
        self._counters = self.disk.counters()
        self._end()
        self._host.end()
        os.close(self.witness)
        self.witness = -1
        self.disk.close()
        count, lost = replay(self._recording, self._promises, _number(points), self._upper)
        self.why = f"at {len(lost)} of {count} moments; {lost[0]}" if lost else f"at each of {count} moments"
        return "lost" if lost else "kept"

    def disk_fail(self, what: str, code: str = "EIO") -> str:
        """fail data|metadata|all|write|flush|read [ERRNO]"""
        number = {name: number for number, name in errno.errorcode.items()}.get(code)
        if number is None or what not in MEANING:
            raise Nonsense(f"fail {what} {code}")
        self._armed_at = self.refused()
        self.disk.fail(what, errno=number)
        self.armed = True
        return "0"

    def disk_heal(self) -> str:
        """heal: Premise if it has refused nothing in the meantime."""
        self.disk.heal()
        self.armed = False
        if self.refused() == self._armed_at:
            raise Premise("the disk was not asked for anything that it should refuse")
        return "0"

    def disk_push(self) -> str:
        """push: the kernel writes the filesystem's dirty pages back; nobody is told how that went."""
        self.disk.push()
        return "0"

    def disk_evict(self) -> str:
        """evict: inodes that nobody has open leave memory, on the whole machine."""
        for _ in range(4):  # what a first pass lets go of holds on to others, and FUSE servers close files later
            Path("/proc/sys/vm/drop_caches").write_text(_DROP_INODES)
            time.sleep(0.1)
        return "0"

    def disk_mark(self) -> str:
        """mark: `flushed` counts from here."""
        self._marked = self.disk.counters()
        return "0"

    def disk_flushed(self) -> str:
        """flushed: yes or no"""
        return "yes" if self.disk.counters().flushes > self._marked.flushes else "no"

    def disk_holds(self, what: str) -> str:
        """holds CONTENT: whether it would be there after a power cut; yes or no"""
        with self.disk.snapshot(durable=True) as snapshot:
            return "yes" if contents(self.disk.marker)[what] in snapshot else "no"

    # Making and ending

    def _lay_out(self, scenario: Scenario) -> None:
        disk = Path(self._base, "disk")
        block = contents(self.disk.marker)["lower"]
        self._lower = disk / "lower" if scenario.lower == "disk" else Path(self._base, "lower")
        (self._lower / "dir").mkdir(parents=True)
        for name in LOWER:
            (self._lower / name).write_bytes(block)
        (self._lower / "precious").write_bytes(contents(self.disk.marker)["doomed"])
        for letter in scenario.letters:
            for path in (disk / letter / "upper", disk / letter / "work", Path(self._base, "mnt", letter)):
                path.mkdir(parents=True)
            if not self._system.layered:
                shutil.copytree(self._lower, disk / letter / "upper", dirs_exist_ok=True)
        Path(self._base, "system").mkdir()
        fd = os.open(disk, os.O_RDONLY)
        try:
            files.syncfs(fd)
        finally:
            os.close(fd)

    def _close_witness(self) -> None:
        if self.witness >= 0:
            os.close(self.witness)

    def _party(self, name: str, path: str, door: int = -1) -> Party:
        try:
            clone = mounts.clone(path)
            try:
                party = Party(name, clone, f"{self._base}/root", self._clean, self.disk.marker, door)
            finally:
                os.close(clone)
        finally:
            if door >= 0:
                os.close(door)
        self._held.callback(party.end)
        party.ready()
        return party

    def _end(self) -> None:
        """Unmount. Whatever is wrong now was asked about before; the disk's end is what cannot wait."""
        for party in self._parties.values():
            party.end()
        for who in self._mounted:
            with suppress(OSError):
                mounts.umount(f"{self._base}/mnt/{who}", mounts.MNT_DETACH)
        self._mounted.clear()


OF_SYSTEMS: Mapping[str, Callable[..., str]] = {
    "mount": Stage._mount, "umount": Stage._umount, "kill": Stage._kill, "restart": Stage._restart,
    "commit": Stage._commit,
}  # fmt: skip
"""what is done to a container by others, and not by its own process"""


def _call(method: Callable[..., str], words: tuple[Any, ...]) -> str:
    """Call a verb, if it takes so many words."""
    try:
        inspect.signature(method).bind(*words)
    except TypeError as error:
        raise Nonsense(f"{method.__name__}: {error}") from None
    return method(*words)


def _number(word: str) -> int:
    if not word.isdecimal():
        raise Nonsense(f"{word} is not a number")
    return int(word)


def _namespaces(held: ExitStack, base: str) -> int:
    """Leave for a mount namespace of our own, `base` a tmpfs there; the descriptor of one that stays empty."""
    process.adopt_orphans()
    process.unshare(process.CLONE_NEWNS)
    mounts.make_private()
    tmpfs = mounts.new_mount("tmpfs", [])
    mounts.attach(tmpfs, base)
    os.close(tmpfs)
    os.mkdir(f"{base}/root")
    clean = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    held.callback(os.close, clean)
    process.unshare(process.CLONE_NEWNS)
    return clean


@contextmanager
def staged(scenario: Scenario, system: System, upper: str, base: str) -> Iterator[Stage]:
    """The stage of a cell, for a process of its own; `base` an empty directory. Raises OSError, Refused."""
    with ExitStack() as held:
        yield Stage(held, scenario, system, upper, base)

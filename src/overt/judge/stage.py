"""The stage of one cell: a fresh disk with a filesystem, a system at work, and the parties of a scenario.

    base/            a tmpfs of this cell's own
      disk/          the failing disk
        lower/       the layer below all overlays: file, other, dir/inner
        A/upper, A/work
      mnt/A          A's overlay
      root           where a party attaches its root, in a namespace without all this

The *witness* is a descriptor of the plain filesystem, opened when nothing has happened. No system owns it or can move
its cursor: if syncfs on it does not tell of an error, there was none.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from overt.host import files, mounts, process
from overt.judge.party import Party, contents
from overt.judge.scenario import Scenario
from overt.judge.systems import Layers, NotApplicable, Refused, System
from overt.judge.uppers import UPPERS
from overt.lab import Disk
from overt.lab.image import Counters

_DROP_INODES = "2"


class Premise(Exception):
    """Something had to be so before anything could be asked, and it was not."""


class Stage:
    """What steps act upon. Its `do` answers with one word, as parties do."""

    def __init__(self, held: ExitStack, scenario: Scenario, system: System, upper: str, base: str) -> None:
        self._held = held
        self._system = system
        self._base = base
        self._clean = _namespaces(held, base)
        row = UPPERS[upper]
        os.mkdir(f"{base}/disk")
        self.disk = held.enter_context(
            Disk(row.filesystem, scenario.size, f"{base}/disk", mount_options=row.mount_options)
        )
        self._lay_out(scenario)
        self._host = self._party("host", f"{base}/disk")
        self.witness = os.open(f"{base}/disk", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, self.witness)
        held.enter_context(system.serve(f"{base}/system"))
        held.callback(self._end)
        self._parties: dict[str, Party] = {}
        self._mounted: set[str] = set()
        self.armed = False
        self._marked = Counters()
        self._verbs: dict[str, Callable[..., str]] = {"mount": self._mount, "umount": self._umount, "kill": self._kill}
        self.why = ""
        """what was said with the latest answer"""

    def do(self, who: str, name: str, verb: str, words: tuple[str, ...]) -> str:
        """Do a step. Raises Premise, NotApplicable, OSError; ValueError if it makes no sense."""
        self.why = ""
        if who == "disk":
            method = getattr(self, f"disk_{verb}", None)
            if method is None:
                raise ValueError(f"a disk has no verb {verb!r}")
            return str(method(*words))
        if who == "host":
            return self._host.do(verb, name, words)
        if verb in self._verbs:
            return self._verbs[verb](who, *words)
        if who not in self._parties:
            raise ValueError(f"{who} is not mounted")
        return self._parties[who].do(verb, name, words)

    def tells(self) -> bool:
        """What the witness says."""
        try:
            files.syncfs(self.witness)
        except OSError:
            return True
        return False

    def refused(self) -> int:
        """How many requests the disk has refused."""
        count = self.disk.counters()
        return count.failed_reads + count.failed_writes + count.failed_flushes + count.failed_discards

    # Of a container: what its system does

    def _mount(self, who: str, *words: str) -> str:
        """mount [over=B]: with B's overlay as the lower layer."""
        lower = f"{self._base}/disk/lower"
        for word in words:
            key, _, other = word.partition("=")
            if key != "over" or other not in self._mounted:
                raise ValueError(f"mount {word}")
            if not self._system_stacks():
                raise NotApplicable("it has no lower layers")
            lower = f"{self._base}/mnt/{other}"
        target = f"{self._base}/mnt/{who}"
        layers = Layers(lower, f"{self._base}/disk/{who}/upper", f"{self._base}/disk/{who}/work")
        try:
            self._system.mount(layers, target)
        except Refused as why:
            self.why = str(why)
            return "refused"
        self._mounted.add(who)
        self._parties[who] = self._party(who, target)
        return "0"

    def _system_stacks(self) -> bool:
        return self._system.name != "plain"

    def _umount(self, who: str) -> str:
        self._parties.pop(who).end()
        self._mounted.remove(who)
        return self._system.umount(f"{self._base}/mnt/{who}")

    def _kill(self, who: str) -> str:
        """kill: whatever serves the mounts is killed, and the dead mounts are taken away; parties stay."""
        self._system.kill()
        for who in list(self._mounted):
            mounts.umount(f"{self._base}/mnt/{who}", mounts.MNT_DETACH)
            self._mounted.remove(who)
        return "0"

    # Of the disk

    def disk_fail(self, what: str, *more: str) -> str:
        """fail data|metadata|all|write|flush|read [ERRNO]"""
        self._armed_at = self.refused()
        self.disk.fail(what, errno=getattr(errno, more[0]) if more else errno.EIO)
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
        with suppress(TimeoutError):
            self.disk.push()
        return "0"

    def disk_evict(self) -> str:
        """evict: inodes that nobody has open leave memory, on the whole machine."""
        for _ in range(2):  # what a first pass lets go of holds on to others
            Path("/proc/sys/vm/drop_caches").write_text(_DROP_INODES)
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
        (disk / "lower/dir").mkdir(parents=True)
        for name in ("file", "other", "dir/inner"):
            (disk / "lower" / name).write_bytes(block)
        for letter in scenario.letters:
            for path in (disk / letter / "upper", disk / letter / "work", Path(self._base, "mnt", letter)):
                path.mkdir(parents=True)
        Path(self._base, "system").mkdir()
        fd = os.open(disk, os.O_RDONLY)
        try:
            files.syncfs(fd)
        finally:
            os.close(fd)

    def _party(self, name: str, path: str) -> Party:
        clone = mounts.clone(path)
        try:
            party = Party(name, clone, f"{self._base}/root", self._clean, self.disk.marker)
        finally:
            os.close(clone)
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

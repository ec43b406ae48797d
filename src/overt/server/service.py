"""Mounts made, listed and ended in one process: what the command line and the control socket ask for."""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from overt.events import Events
from overt.host import mounts, process
from overt.host.files import syncfs
from overt.ledger import UpperError
from overt.overlay.options import OptionError, Options
from overt.server import data, registry, report
from overt.server.connect import connect
from overt.server.ending import LAST_SERVED, conclude, follow, is_covered, is_over, last_flush, take_down
from overt.server.engine import Engine
from overt.server.handlers import TABLE
from overt.server.indexing import open_index
from overt.server.layers import (
    Refusal,
    open_layers,
    prove,
    refuse_own,
    refuse_unseen,
    remove_unclaimed_work,
    remove_work,
    volatile_mark,
)
from overt.server.mount import Mount
from overt.server.poison import new_number, serve_hidden
from overt.server.pool import Pool
from overt.server.syncing import carry_over
from overt.server.trees import make_tree
from overt.server.viewed import ViewedMount
from overt.server.watchdog import Watchdog, abort, is_stuck
from overt.upper import Upper, Uppers

_START = 10.0
"""seconds for the kernel to begin to talk"""
_CLOSING = 60.0
"""seconds in which everything is unmounted, when the server ends"""
_WORKERS = 16
"""threads for the blocking work of one upper, made as needed"""


class Service:
    """All mounts of one process. Methods are for any thread but the engine's, unless they say otherwise."""

    def __init__(self, events: Events, watchdog: Watchdog, descriptors: int) -> None:
        self.events = events
        self.engine = Engine(events, descriptors)
        self.engine.gone = self._gone
        self.uppers = Uppers(self._upper_error)
        self.watchdog = watchdog
        self._in_user_namespace = process.in_user_namespace()
        self.mounts: list[Mount] = []
        self._devices: set[int] = set()
        """their st_dev; replaced by a new set, or added to"""
        # By the object, not by its device number: that is another filesystem's tomorrow.
        self._pools: dict[Upper | None, Pool] = {}
        self._proven: WeakSet[Upper] = WeakSet()
        self._delivers: dict[str, bool] = {}
        self._grants: WeakKeyDictionary[Upper, bool] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.empty = threading.Event()
        """set while there is no mount"""
        self.empty.set()
        self._until = math.inf
        """when everything has to be unmounted; finite once the server is to end"""
        self._deaf = False
        """whether nobody reads requests any more"""

    # Mounting

    def mount(self, options: Options, target: str) -> list[str]:
        """Mount at `target`; return what cannot be promised, a line each. Raises `Refusal`."""
        try:
            if not os.path.isdir(target):
                raise Refusal(
                    f"mount point {target}: {'not a directory' if os.path.exists(target) else 'no such directory'}"
                )
        except OSError as error:
            raise Refusal(f"mount point {target}: {error.strerror}") from None
        target = os.path.realpath(target)
        with self._made(options, target) as (mount, fd):
            mount.registered = registry.enter(mount.device, target)
            self._refuse_at_the_end()
            try:
                mounts.attach(fd, target)
            except OSError as error:
                raise Refusal(f"mount point {target}: {error.strerror}") from None
            mount.placed = True
        os.close(fd)
        return self._limits(mount)

    def mount_detached(self, options: Options, label: str) -> int:
        """The same, but the mount is given out as a descriptor (move_mount(2)); `label` stands for its place."""
        with self._made(options, label) as (_, fd):
            return fd

    @contextlib.contextmanager
    def _made(self, options: Options, target: str) -> Iterator[tuple[Mount, int]]:
        """A mount that lacks its place only, and its descriptor: the body's to give. If it cannot, the mount goes."""
        mount, fd = self._make(options, target)
        try:
            if not mount.begin():
                raise Refusal("mount: its connection was aborted")
            try:
                with volatile_mark(mount.tree.work) if mount.volatile else contextlib.nullcontext():
                    yield mount, fd
            finally:
                mount.end()
        except BaseException:
            self._abandon(mount, fd)
            raise

    def _abandon(self, mount: Mount, fd: int) -> None:
        """Let go of a mount that comes to nothing, and do not return before whoever tries again finds nothing of it."""
        base = -1
        if mount.upper is not None and mount.begin():
            with contextlib.suppress(OSError):  # no descriptor for it: what is left is an empty directory
                base = os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount.tree.work)
            mount.end()
        mount.record = {"mount": mount.target, "verdict": "never mounted"}  # nobody can have written anything
        if self._deaf:
            self._abort(mount)
        os.close(fd)  # the kernel then ends the connection, and the engine closes the mount
        self._wait_until_gone(mount, LAST_SERVED)
        if base >= 0:
            try:
                if mount not in self.mounts:
                    remove_unclaimed_work(base)
            finally:
                os.close(base)

    def _wait_until_gone(self, mount: Mount, patience: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: mount not in self.mounts, patience)

    def _refuse_at_the_end(self) -> None:
        if self._until < math.inf:
            raise Refusal("mount: the server is ending")

    def _make(self, options: Options, target: str) -> tuple[Mount, int]:
        self._refuse_at_the_end()
        if not options.user_xattr and self._in_user_namespace:
            # As for kernel overlayfs: trusted xattrs are not to be had there.
            try:
                options = options.with_user_xattrs()
            except OptionError as error:
                raise Refusal(str(error)) from None
        layers = open_layers(options)
        upper: Upper | None = None
        account = None
        inner, base = -1, layers.work
        index, without = -1, ""
        try:
            refuse_own([*layers.layers, *layers.data], options, self._devices)
            if options.upper is not None:
                inner = os.open(b"work", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layers.work)
                layers.held.append(layers.work)
                layers = layers._replace(work=inner)
                upper = self.uppers.get(layers.layers[0].root, inner)
                if upper not in self._proven:
                    prove(inner, options.upper, layers.layers[0].prefix)
                    self._proven.add(upper)
                if options.unseen == "refuse":
                    refuse_unseen(inner, options.upper)
                if options.indexed and options.work is not None:
                    index, without = open_index(base, layers.layers, options.work, user_xattr=options.user_xattr)
                account = upper.attach(target, volatile=options.volatile)
            tree = make_tree(options, layers, self.engine.cache, index)
            connection = connect(options)
        except BaseException:
            if account is not None and upper is not None:
                upper.detach(account)
            elif upper is not None:
                upper.forgo()
            if base >= 0:
                remove_work(base)
            layers.close()
            if index >= 0:
                os.close(index)
            raise
        kind = ViewedMount if options.view.changes else Mount
        with self._lock:
            pool = self._pool(upper)
            mount = kind(connection.fuse, target, options, tree, upper, account, self.engine, pool, self.events)
            self.mounts.append(mount)
            self.empty.clear()
        mount.held = layers.held
        mount.without = without
        mount.hidden = new_number()
        mount.kind, mount.device = connection.kind, connection.device
        mount.handlers = mount.served = TABLE
        mount.last_flush = last_flush
        mount.serve_hidden = serve_hidden
        problem = None
        try:
            mount.negotiate(_START)
        except OSError as error:
            problem = error
        finally:
            self.engine.add(mount)
        try:
            if problem is not None:
                raise Refusal(f"mount: {problem.strerror}")
            if not mount.device:
                mount.device = os.fstat(connection.mount).st_dev
            with self._lock:
                self._devices.add(mount.device)
            self._find_out_about_syncfs(mount, connection.mount)
            if mount.passthrough and upper is not None:
                mount.passthrough = self._grants_passthrough(mount, upper)
        except BaseException:
            self._abandon(mount, connection.mount)
            raise
        self._tell_watchdog(self.watchdog.guard, mount)
        self.events.say(
            "mounted", mount=target, kind=mount.kind, passthrough=mount.passthrough, volatile=mount.volatile
        )
        return mount, connection.mount

    def _find_out_about_syncfs(self, mount: Mount, fd: int) -> None:
        """Whether this kernel sends SYNCFS to a mount of this kind: asked once, by calling it.

        Not of a mount without an upper, whose superblock is read-only: no kernel sends it there.
        """
        if mount.upper is None:
            return
        if mount.kind not in self._delivers:
            mount.probing = True
            directory = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                syncfs(directory)
            finally:
                os.close(directory)
                mount.probing = False
            self._delivers[mount.kind] = mount.tells_syncfs
        mount.tells_syncfs = self._delivers[mount.kind]

    def _grants_passthrough(self, mount: Mount, upper: Upper) -> bool:
        """Whether the kernel takes a file of this upper as a backing (it may be stacked, or we not root): asked
        once.
        """
        granted = self._grants.get(upper)
        if granted is None:
            fd = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount.tree.work)
            try:
                data.unregister(mount.fd, data.register(mount.fd, fd))
                granted = True
            except OSError as error:
                self.events.say("no passthrough", mount=mount.target, why=str(error))
                granted = False
            finally:
                os.close(fd)
            self._grants[upper] = granted
        return granted

    def _pool(self, upper: Upper | None) -> Pool:
        """The workers of an upper, for a mount that is entered under the same hold of `_lock`."""
        pool = self._pools.get(upper)
        if pool is None:
            pool = self._pools[upper] = Pool(_WORKERS, f"upper-{upper.s_dev if upper is not None else 0:x}")
        return pool

    def _limits(self, mount: Mount) -> list[str]:
        """What this kernel does not let this mount promise, and what happened to the upper before it."""
        lines = []
        if not mount.tells_syncfs and mount.upper is not None:
            lines.append("syncfs(2) does not reach this mount: it tells only of errors that are already known")
        if mount.options.passthrough and not mount.passthrough:
            lines.append("no passthrough: data is copied through the server")
        if mount.without:
            lines.append(mount.without)
        if mount.upper is not None and mount.upper.refused:
            lines.append(mount.upper.refused)
        if mount.tells_syncfs and not mount.volatile and self.uppers.untraced is not None:
            why = self.uppers.untraced.strerror
            lines.append(f"no tracepoint ({why}): an error that the host has not been told of may be taken from it")
        if mount.volatile and mount.upper is not None and mount.upper.eyes == "cursor":
            lines.append("this upper's errors can only be seen by flushing it: a volatile mount does not see them")
        before = mount.account.before if mount.account is not None else None
        if before is not None:
            lines.append(
                f"the upper had recorded {before.number} error(s) before this mount, the last of them "
                f"{os.strerror(before.errno)}: on record (overt status), and not told to it"
            )
        return lines

    # Ending

    def umount(self, target: str) -> dict[str, Any]:
        """Flush (ordinary), unmount, and say what is known of errors. Raises `Refusal`, or OSError (EBUSY)."""
        target = os.path.realpath(target)
        placed = [mount for mount in self.mounts if mount.placed]
        found = [mount for mount in placed if mount.target == target]
        if not found:
            here = registry.devices_at(target)
            found = [mount for mount in placed if mount.device in here and follow(mount)]
        if not found:
            raise Refusal(f"{target}: no overt mount of this server")
        return self._unmount(found[-1])

    def _unmount(self, mount: Mount) -> dict[str, Any]:
        if mount.begin():
            try:
                if not mount.destroyed:
                    report.flush(mount)  # so that little is left for the one that counts, for which others have to wait
                take_down(mount)
                over = is_over(mount)
                if over:
                    record = conclude(mount)  # nobody can write any more
            finally:
                mount.end()
        else:  # the kernel is done with it, or its connection was aborted
            take_down(mount)
            over, record = True, conclude(mount)
        registry.remove(mount.registered)
        if not over:
            return self._left(mount)
        self._wait_until_gone(mount, LAST_SERVED)  # who mounts the same directories again should not find them in use
        return record

    def _left(self, mount: Mount) -> dict[str, Any]:
        """Flush a mount that is in use where this server cannot reach it, and say what is known of its data so far."""
        if not mount.begin():
            return conclude(mount)
        try:
            record = report.verdict(mount, report.flush(mount)) | {"elsewhere": True}
            if record["verdict"] == report.WELL:
                record["verdict"] = "still mounted elsewhere"
            self.events.say("left", **record)
            return record
        finally:
            mount.end()

    def close(self) -> list[str]:
        """Unmount everything, lazily what is busy; return what could not be unmounted, a line each.

        A disk that does not answer keeps nobody from unmounting what is on another one, and us for a while only.
        """
        self._until = time.monotonic() + _CLOSING
        live = list(self.mounts)
        problems: list[str] = []
        if not self._for_each_upper(live, lambda own: self._close(own, problems)):
            problems += [f"{mount.target}: no answer from its disk: may be lost" for mount in live if mount.placed]
        return problems

    def let_go(self) -> None:
        """Make the last flush of what is still in use, and answer whoever unmounts: the server is about to end."""
        left = list(self.mounts)

        def flush(own: list[Mount]) -> None:
            for mount in own:
                last_flush(mount)

        self._for_each_upper(left, flush)
        for mount in left:
            mount.hurry()

    def _for_each_upper(self, live: list[Mount], act: Callable[[list[Mount]], None]) -> bool:
        """Have `act` called with the mounts on each upper, a thread each; whether that was done in time."""
        threads = [
            threading.Thread(target=act, args=([mount for mount in live if mount.upper is upper],), daemon=True)
            for upper in {mount.upper for mount in live}
        ]
        started = []
        for thread in threads:
            try:
                process.start(thread)
                started.append(thread)
            except OSError:  # no more of them
                thread.run()
        for thread in started:
            thread.join(max(0.0, self._until - time.monotonic()))
        return not any(thread.is_alive() for thread in started)

    def abort(self) -> None:
        """End the connections that are left: nobody reads any more, and a thread of ours may wait for an answer."""
        self._deaf = True
        for mount in list(self.mounts):
            self._abort(mount)

    def _abort(self, mount: Mount) -> None:
        if mount.kind == "fuseblk" and not mount.destroyed and not mount.gone:  # its number is not another's yet
            try:
                abort(mount.device)
            except OSError as error:
                self.events.say("not aborted", mount=mount.target, why=str(error))

    def _close(self, own: list[Mount], problems: list[str]) -> None:
        """Unmount all that is on one upper."""
        for mount in own:
            try:
                if mount.destroyed:
                    conclude(mount)
                elif mount.placed and (
                    mount.gone or not is_covered(mount) or follow(mount) or os.path.ismount(mount.target)
                ):
                    self._unmount(mount)
                else:  # somebody moved it into another namespace: its users will find the server gone
                    self._left(mount)
            except OSError as error:
                problems.append(f"{mount.target}: {error}: detached while in use")
                if not is_covered(mount):
                    with contextlib.suppress(OSError):  # said above
                        mounts.umount(mount.target, mounts.MNT_DETACH)
                self._left(mount)

    # What happens

    def _tell_watchdog(self, call: Callable[[int], None], mount: Mount) -> None:
        try:
            call(mount.device)
        except OSError as error:
            self.events.say("the watchdog is gone", mount=mount.target, why=str(error))

    def give_up(self, seconds: float) -> None:
        """Abort mounts that a request has kept for so long, unless it waits for a disk: their users go free."""
        for mount, thread in self.engine.kept(seconds):
            if not mount.given_up and is_stuck(thread):
                mount.given_up = True
                try:
                    abort(mount.device)
                    self.events.say("given up", mount=mount.target, why=f"a request has not got on for {seconds:g} s")
                except OSError as error:
                    self.events.say("cannot be given up", mount=mount.target, why=str(error))

    def _gone(self, mount: Mount) -> None:
        if mount.registered:
            registry.remove(mount.registered)
        self._tell_watchdog(self.watchdog.release, mount)
        self.events.say("gone", mount=mount.target)
        with self._lock:
            self.mounts.remove(mount)
            self._devices = {other.device for other in self.mounts}  # its number may be another one's already
            if all(other.upper is not mount.upper for other in self.mounts):
                self._pools.pop(mount.upper).close()
            self._changed.notify_all()
            if not self.mounts:
                self.empty.set()

    def _upper_error(self, error: UpperError, upper: Upper) -> None:
        self.events.say(
            "upper error",
            upper=report.device(upper),
            error=error.errno,
            number=error.number,
            source=error.source,
            taken_from_host=error.taken,
        )
        if not any(self._has_to_be_told_now(mount, upper) for mount in list(self.mounts)):
            return
        if upper.spent:  # no syncfs reaches us, which would flush first: so that the next error is seen, too
            try:
                upper.flush(lambda _: self._carry_over(upper))
                return
            except RuntimeError as problem:  # no thread for it
                self.events.say("not flushed", upper=report.device(upper), why=str(problem))
        self._carry_over(upper)

    def _carry_over(self, upper: Upper) -> None:
        for mount in list(self.mounts):
            if self._has_to_be_told_now(mount, upper) and mount.begin():
                mount.pool.see_to(carry_over, mount)

    def _has_to_be_told_now(self, mount: Mount, upper: Upper) -> bool:
        return mount.upper is upper and not mount.tells_syncfs and not mount.volatile

    def status(self) -> dict[str, Any]:
        """What `overt status` shows."""
        with self._lock:
            live = list(self.mounts)
        uppers = {mount.upper.s_dev: mount.upper for mount in live if mount.upper is not None}
        for mount in live:  # an error that nobody has asked about is known from here on
            if mount.upper is not None and mount.begin():
                try:
                    mount.upper.check()
                finally:
                    mount.end()
        return {
            "pid": os.getpid(),
            "leaders_replaced": self.engine.replaced,
            "mounts": [report.mount_status(mount) for mount in live],
            "uppers": [report.upper_status(upper) for upper in uppers.values()],
            "events": self.events.counts,
        }

    def history(self) -> str:
        """The events kept, one JSON object a line."""
        return "\n".join(json.dumps(entry) for entry in list(self.events.record))

"""A worker takes over from one that has died, or was replaced.

Nothing is lost in between. The eyes on each upper are descriptors, and go on by themselves: a probe that fires while
nobody looks has fired. The tracepoint's buffer is the supervisor's. The listeners are open all the time, so that calls
wait in the kernel; those that the dead worker had taken are in the slots, and are answered from the beginning. Whether
somebody was told is on record before the slot is free: an error can be told twice only if the worker died between the
answer and the record, and each such slot is counted.

Nothing here asks a disk anything: one that hangs or is dead, or whatever a container has done to our directory on its
volume, must keep nobody else.
"""

import errno
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from overt.guard import listener, opening
from overt.guard.container import Container
from overt.guard.overlay import Overlay
from overt.guard.store import Entry
from overt.guard.table import Mounted
from overt.ledger import UpperError
from overt.upper.eyes import Carried

if TYPE_CHECKING:
    from overt.guard.agent import Agent

_ATTEMPTS = 20
"""workers that may die with a call before it is answered with EIO"""


def restore(agent: "Agent", entries: Mapping[str, Entry]) -> None:
    """Go on where the last worker ended. The descriptors are this process's own: it is a fork of the supervisor."""
    used = {entry.value["upper"] for entry in _named(entries, "overlay").values()}
    for s_dev, entry in _of_kind(entries, "upper"):
        if s_dev not in used:  # the worker died when its last overlay had gone, and before it could say so
            agent.keeper.drop(f"upper/{s_dev}")
            for fd in entry.fds:
                agent.shared.loans.drop(f"upper/{s_dev}", fd)
            continue
        given = iter(entry.fds)
        cursor, plain, probe = (next(given) if there else -1 for there in entry.value["fds"])
        state = (entry.value[name] for name in ("accepted", "known", "born_read_only"))
        agent.uppers.carried[s_dev] = Carried(cursor, plain, probe, *state)
    errors = known_errors(entries)
    if agent.trace:
        agent.trace.expect(agent.uppers.carried)
    for name, entry in sorted(_named(entries, "overlay").items(), key=_age):
        _take_over(agent, name, entry, errors)
    for name, entry in _named(entries, "owed").items():
        _hold_again(agent, name, entry)
    for number, entry in _of_kind(entries, "listener"):
        try:
            agent.add(number, entry.value.encode(), list(entry.fds))
        except Exception:  # the others are to be guarded all the same
            agent.events.crash(f"taking over listener {number}")
    for slot, number, telling, attempts in agent.slots.left():
        _take_up(agent, slot, agent.containers.get(number), telling, attempts)


def known_errors(entries: Mapping[str, Entry]) -> dict[int, list[UpperError]]:
    """The errors of each upper, by superblock: none of them older than what its overlays' accounts say.

    Numbers must not be given away twice: an account that has reached the number would not be owed the new error.
    """
    errors = {
        s_dev: [UpperError(*error) for error in entry.value["errors"]] for s_dev, entry in _of_kind(entries, "upper")
    }
    for entry in _named(entries, "overlay").values():
        account = entry.value["account"]
        number = max(account["mounted_at"], account["reached"])
        known = errors.setdefault(entry.value["upper"], [])
        if number > (known[-1].number if known else 0):
            known.append(UpperError(number, errno.EIO, time.time(), "account", False))
    return errors


def _take_over(agent: "Agent", name: str, entry: Entry, errors: Mapping[int, list[UpperError]]) -> None:
    """An overlay, if it can be: one that cannot keeps nobody but who calls on it, and is tried by the next worker."""
    number, *paths, volatile = entry.value["mounted"]
    point, upperdir, workdir = map(os.fsencode, paths)
    mounted = Mounted(number, point, upperdir, workdir, volatile)
    overlay = Overlay(mounted, agent.shared, entry.value["party"], name.partition("/")[2])
    earlier = agent.overlays.get(number)
    if earlier is not None:  # it was about to be let go
        opening.replace(agent, earlier)
    agent.overlays[number] = overlay
    try:
        overlay.restore(entry, errors)
    except OSError as error:
        agent.events.say("not guarded", overlay=overlay.name, why=f"not taken over from the last worker: {error}")
    except Exception:
        agent.events.crash("taking over an overlay")


def _hold_again(agent: "Agent", name: str, entry: Entry) -> None:
    """A description, of an overlay that there still is."""
    device, record = name.split("/")[1:3]
    overlay = agent.overlays.get(int(device))
    if overlay is not None and overlay.record == f"{device}/{record}":
        overlay.hold_again(entry.fds[0], entry.value, name)
    else:
        agent.shared.loans.drop(device, entry.fds[0])
        agent.keeper.drop(name)


def _age(named: tuple[str, Entry]) -> int:
    return int(named[0].split("/")[2])


def _named(entries: Mapping[str, Entry], kind: str) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if name.startswith(f"{kind}/")}


def _of_kind(entries: Mapping[str, Entry], kind: str) -> list[tuple[int, Entry]]:
    return [(int(name.split("/")[1]), entry) for name, entry in _named(entries, kind).items()]


def _take_up(agent: "Agent", slot: int, guarded: Container | None, telling: int, attempts: int) -> None:
    """A call that the last worker had taken. `telling`: the error that it was about to tell, or 0."""
    call = agent.slots.read(slot)
    if guarded is None or not call.id or not listener.is_valid(guarded.fd, call.id):
        if telling:
            agent.doubtful += 1
            agent.events.say("told or not", error=telling, why="the worker died between the answer and its record")
        agent.slots.free(slot)
        return
    guarded.waiting += 1
    if attempts <= _ATTEMPTS:
        agent.begin(guarded, slot, call)
        return
    agent.events.say("given up", container=guarded.state.id, why=f"{attempts} workers have died with this call")
    agent.reply(guarded, slot, call, errno.EIO)
    agent.done(guarded, slot)

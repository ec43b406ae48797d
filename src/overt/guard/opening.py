"""Overlays come and go: whose a mount is, when its account is opened, and when it has ended.

    a container comes       an account for each overlay that it sees (`look_around`)
    a call on a mount       of an overlay that is known for this container: nothing of this is needed
    that is new to us       else it is opened, or recognised, on a thread of its own, for all who call meanwhile
    the superblock ends     its number may be the next one's: whoever comes with a new mount asks the marks, and the
                            agent looks every few seconds (`bury`)
    the last container      that has it ends (`leave`)

An overlay answers nobody any more before another one may be made with its number, and what is kept of it for the next
worker is dropped before the other is marked: else that worker would take the other's mark for this one's.
"""

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from overt.guard import anchor, container, listener, places, table
from overt.guard.container import Container
from overt.guard.overlay import Caller, Ended, Overlay
from overt.guard.slots import Notification
from overt.guard.table import Mounted
from overt.host import files

if TYPE_CHECKING:
    from overt.guard.agent import Agent

_MOST_OPENING = 64
"""overlays of one container that are being opened, a thread each: its upper may be a server that never answers"""
_MOST_MOUNTS = 1 << 12
"""mounts of one overlay that are remembered as such; a container can make any number"""
_ATTEMPTS = 8
"""overlays that may end while a container's is opened"""


class _Gone(Exception):
    """A caller has ended, or closed its descriptor: what it would have shown, the next one may."""


def look_around(agent: "Agent", guarded: Container) -> None:
    """Open accounts for the overlays that a new container sees: errors count from its start."""
    pid = guarded.state.pid
    try:
        agent.table.mount_of(b"/proc/%d/root" % pid, (pid,))  # while it is seen: it may chroot
        mounts = [each for each in table.read(pid).values() if each.lies]
    except OSError as error:
        if error.errno in table.FULL:
            agent.events.say("not guarded", container=guarded.state.id, why=str(error))
        return  # else it has ended already
    for device in {each.device for each in mounts}:
        same = [each for each in mounts if each.device == device]
        try:
            _open(agent, guarded, same)
        except ProcessLookupError:  # it has ended meanwhile
            return
        except OSError as error:
            name = os.fsdecode(same[0].upperdir)
            agent.events.say("not guarded", container=guarded.state.id, overlay=name, why=str(error))
    guarded.image = container.image(guarded.state)


def _open(agent: "Agent", guarded: Container, mounts: Iterable[Mounted]) -> None:
    """Open an overlay by the first of its mounts that can be come to. OSError."""
    pid = guarded.state.pid
    why: OSError | None = None
    for mounted in mounts:
        try:
            held = anchor.of_mount(pid, mounted, agent.table)
        except OSError as error:
            why = error
            continue
        try:
            for _ in range(_ATTEMPTS):
                each = use(agent, guarded, held.mounted)
                try:
                    each.open(held, [pid])
                    return
                except Ended:
                    replace(agent, each)
                except OSError:
                    abandon(agent, each)
                    raise
        finally:
            held.close()
    raise why or OSError(errno.EAGAIN, "overlays come and go too fast")


def use(agent: "Agent", guarded: Container, mounted: Mounted) -> Overlay:
    """The overlay with this mount's number, noted as used by a container. OSError if that has ended, or has too many.

    Whether it is this mount's is for `Overlay.open` to say.
    """
    most = agent.shared.room.overlays
    if mounted.device not in guarded.devices and len(guarded.devices) >= most:
        bury(agent)  # it may have unmounted some just now
    with agent.lock:
        if guarded.closed:
            raise ProcessLookupError(errno.ESRCH, "the container has ended")
        each = agent.overlays.get(mounted.device)
        if mounted.device not in guarded.devices and len(guarded.devices) >= most:
            raise OSError(errno.EMFILE, "the container has too many overlays")
        if each is None:
            each = agent.overlays[mounted.device] = Overlay(mounted, agent.shared, guarded.state.id)
        each.users.add(guarded.number)
        guarded.devices.add(mounted.device)
        return each


def open_first(agent: "Agent", guarded: Container, slot: int, call: Notification, mounted: Mounted) -> None:
    """The call is the first that we hear of this mount: its overlay was mounted later, or is not opened yet. OSError"""
    each = use(agent, guarded, mounted)
    if each.callers and each.marked and each.mounted.id != mounted.id and each.has_ended():
        replace(agent, each)  # and whoever opens it may wait for its disk
        each = use(agent, guarded, mounted)
    if len(each.mounts) >= _MOST_MOUNTS:
        each.mounts.clear()  # those that are still used are asked about again
    ours = (guarded, slot, call, mounted)
    with agent.lock:
        opening = bool(each.callers)
        refused = not opening and guarded.opening >= _MOST_OPENING
        if not refused:
            each.callers.append(ours)
            guarded.opening += not opening
    if refused:
        abandon(agent, each)
        raise OSError(errno.EAGAIN, f"{_MOST_OPENING} others are being opened")
    if opening:
        return
    try:
        agent.apart(_open_for_all, agent, each, guarded)
    except RuntimeError as error:  # no thread is to be had; others may have come meanwhile
        with agent.lock:
            callers, each.callers = each.callers, []
            guarded.opening -= 1
        for caller in callers:
            if caller is not ours:
                agent.not_guarded(*caller[:3], each.name, str(error))
        abandon(agent, each)
        raise OSError(errno.EAGAIN, str(error)) from error


def _open_for_all(agent: "Agent", each: Overlay, first: Container) -> None:
    """Open an overlay, which may take any time, for all who call meanwhile."""
    came_to: dict[int, Exception | None] = {}  # by mount
    gone: dict[int, Exception] = {}  # by slot: of those whose descriptor, or who themselves, are there no more
    callers: list[Caller] = []
    while not callers:
        with agent.lock:
            left = next((one for one in each.callers if one[3].id not in came_to and one[1] not in gone), None)
            if left is None:
                callers, each.callers = each.callers, []
                first.opening -= 1
        if left is not None:
            try:
                came_to[left[3].id] = _open_for(agent, each, left)
            except _Gone as error:
                gone[left[1]] = error
    if any(isinstance(why, Ended) for why in came_to.values()):
        replace(agent, each)
    abandon(agent, each)
    for guarded, slot, call, mounted in callers:
        why = gone[slot] if mounted.id not in came_to else came_to[mounted.id]
        if why is None:
            agent.flush(each, guarded, slot, call)
        elif isinstance(why, Ended):
            agent.begin_again(guarded, slot, call)
        else:
            agent.not_guarded(guarded, slot, call, each.name, str(why))


def _open_for(agent: "Agent", each: Overlay, caller: Caller) -> Exception | None:
    """Open an overlay by one caller's descriptor: None, or why it cannot be. _Gone if that says nothing of others."""
    guarded, _, call, mounted = caller
    try:
        held = anchor.of_descriptor(call.tid, call.argument, mounted)
    except OSError as error:
        raise _Gone(str(error)) from None
    try:
        each.open(held, [call.tid, guarded.state.pid], _uuid_by(agent, caller))
    except Ended as error:
        return error
    except OSError as error:
        if not listener.is_valid(guarded.fd, call.id):
            raise _Gone(str(error)) from None
        return error
    except _Gone:
        raise
    except Exception as error:
        agent.events.crash("opening an overlay")
        return error
    finally:
        held.close()
    return None


def _uuid_by(agent: "Agent", caller: Caller) -> bytes:
    """The UUID of the overlay that a caller's descriptor is of; empty if it has none, or there is no room to ask."""
    guarded, _, call, mounted = caller
    loans, party = agent.shared.loans, guarded.state.id
    try:
        ours = loans.borrow(party, call.tid, call.argument, lambda at: files.whereabouts(at).mount == mounted.id)
    except OSError as error:
        raise _Gone(str(error)) from None
    try:
        return places.uuid_of(ours) if ours >= 0 else b""
    finally:
        if ours >= 0:
            loans.give_back(party, ours)


def of_number(agent: "Agent", device: int) -> Overlay | None:
    """The overlay of a file on a mount that nobody sees, by its st_dev, or None. OSError if it is not open yet."""
    each = agent.overlays.get(device)
    if each is None:
        return None
    if each.account is None:
        raise OSError(errno.EAGAIN, "its upper is not found yet")
    return None if each.has_ended() else each


def replace(agent: "Agent", each: Overlay) -> None:
    """Let go of an overlay that has ended; another one may be made with its number when this returns."""
    each.retire()
    with agent.lock:
        if agent.overlays.get(each.device) is each:
            del agent.overlays[each.device]
            for number in each.users & agent.containers.keys():
                agent.containers[number].devices.discard(each.device)
    agent.apart(_let_go, agent, each)


def abandon(agent: "Agent", each: Overlay) -> None:
    """Let go of an overlay that could not be marked: the next with its number is another one, and perhaps another's.

    Whoever comes to it in the meantime has another one made (Ended).
    """
    if each.marked or not each.door.acquire(blocking=False):  # who is opening it does this afterwards
        return
    try:
        each.deserted = each.deserted or not each.marked
    finally:
        each.door.release()
    if each.deserted and not each.marked:
        replace(agent, each)


def leave(agent: "Agent", guarded: Container) -> None:
    """A container has ended: let go of the overlays that no other has."""
    with agent.lock:
        found = [agent.overlays[device] for device in guarded.devices if device in agent.overlays]
        for each in found:
            each.users.discard(guarded.number)
        unused = [each for each in found if not each.users]
        for each in unused:
            each.deserted = True
    for each in unused:
        agent.apart(replace, agent, each)


def bury(agent: "Agent") -> None:
    """Let go of the overlays whose superblocks have ended."""
    with agent.lock:
        marked = [each for each in agent.overlays.values() if each.marked]
    if marked and agent.shared.marks is not None:
        left = agent.shared.marks.left()  # those that are marked by now, and may have ended since
        for each in marked:
            if each.device not in left:
                replace(agent, each)


def _let_go(agent: "Agent", each: Overlay) -> None:
    upper = each.upper
    why = None
    try:
        why = each.close()
    finally:
        if upper is not None and not upper.ledger.accounts:
            agent.shared.records.drop(upper)
            with agent.lock:
                agent.crowds.pop(upper.s_dev, None)
    if why is not None:
        agent.events.say("left behind", overlay=each.name, why=str(why))

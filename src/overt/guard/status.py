"""What `overt guard status` shows."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overt.guard.agent import Agent
    from overt.guard.overlay import Overlay


def describe(agent: "Agent") -> dict[str, Any]:
    """The agent's state, as JSON can hold it."""
    overlays = list(agent.overlays.values())
    longest = agent.meter.longest()
    uppers = {each.upper.s_dev: each.upper for each in overlays if each.upper is not None}
    return {
        "worker": os.getpid(),
        "supervisor": os.getppid(),
        "generation": agent.generation,
        "blame": agent.blame,
        "answered": agent.answered,
        "doubtful": agent.doubtful,
        "crashes": agent.events.crashes,
        **agent.meter.describe(),
        "containers": [
            {
                "id": each.state.id, "pid": each.state.pid, "bundle": each.state.bundle, "calls": each.calls,
                "waiting": each.waiting, "longest": longest.get(each.number, 0.0), "overlays": len(each.devices),
            }
            for each in list(agent.containers.values())
        ],
        "overlays": [
            {
                "upperdir": each.name, "containers": len(each.users), "ids": _ids(agent, each),
                "owed": len(each.held.entries),
                "errors": account.count if account else 0, "told": account.told if account else 0,
                "untold": account is not None and account.untold,
                "guarded": account is not None,
            }
            for each, account in [(each, each.account) for each in overlays]  # `retire` takes it away meanwhile
        ],
        "uppers": [
            {
                "device": f"{os.major(number)}:{os.minor(number)}", "eyes": upper.eyes, "refused": upper.refused,
                "flushes": upper.flushes, "flushed_at": upper.flushed_at,
                "taken": upper.taken, "recorded": upper.ledger.count,
                "errors": [
                    error._asdict()
                    | {"told": len(upper.ledger.told(error)), "lost": _lost(agent, number, error.number)}
                    for error in upper.ledger.errors
                ],
            }
            for number, upper in uppers.items()
        ],
    }  # fmt: skip


def _ids(agent: "Agent", overlay: "Overlay") -> list[str]:
    """The containers that use an overlay."""
    using = (agent.containers.get(number) for number in list(overlay.users))
    return sorted({each.state.id for each in using if each is not None})


def _lost(agent: "Agent", upper: int, number: int) -> list[dict[str, Any]]:
    """The files that were lost in an error, as far as they are known."""
    return [
        {key: each[key] for key in ("container", "image", "path", "certain")}
        for each in list(agent.losses)
        if (each["upper"], each["number"]) == (upper, number)
    ]

"""A history for people: lines of text as in the mail that asked for it, or a picture."""

import errno
from html import escape

from overt.prove.history import Event, History
from overt.prove.verbs import VERBS

_STYLE = """
text{fill:#1f2328}.lane{stroke:#8c959f}.box{fill:#eaeef2;stroke:#8c959f}.error{fill:#fff1c2;stroke:#9a6700}
.wrong{fill:#ffd8d3;stroke:#cf222e}.bad{fill:#cf222e}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.box{fill:#21262d;stroke:#6e7681}
.error{fill:#3b2e00;stroke:#d29922}.wrong{fill:#4c1513;stroke:#f85149}.bad{fill:#ff7b72}}
"""
_ROW, _LANE, _TOP, _PAD = 34, 300, 44, 12


def line(event: Event) -> str:
    """What happened, and what was answered where something was asked."""
    words = VERBS[event.verb].words.format(fd=f"fd {event.fd}")
    if event.verb in ("open", "open_write"):
        return words
    if event.verb in ("syncfs", "fsync", "msync", "fsync_dir", "copy_fails"):
        return f"{words} = {_answer(event.errno)}"
    if event.verb == "umount" and event.errno:
        return f"{words}: an error was recorded"
    return f"{words}: {_answer(event.errno)}" if event.errno else words


def _answer(code: int) -> str:
    return errno.errorcode[code] if code else "0"


def lines(history: History) -> list[str]:
    """The history as text: a line for each event, with whose it was before it."""
    width = max(map(len, history.parties))
    found = []
    before = -1
    for event in history.events:
        name = history.parties[event.party] if event.party != before else ""
        found.append(f"{name:<{width}}  - {line(event)}")
        before = event.party
    if history.due:
        found[-1] += f"    <-- {history.due}"
    return found


def picture(history: History, title: str) -> str:
    """The history as SVG: a lane for each party, time downwards, the answer that is wrong marked."""
    width = _PAD * 2 + _LANE * len(history.parties)
    height = _TOP + _ROW * len(history.events) + (26 if history.due else 8)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
    ]
    for number, name in enumerate(history.parties):
        x = _PAD + _LANE * number + _LANE // 2
        out.append(f'<text x="{x}" y="20" text-anchor="middle" font-weight="bold">{escape(name)}</text>')
        out.append(f'<line class="lane" x1="{x}" y1="28" x2="{x}" y2="{_TOP + _ROW * len(history.events) - 6}"/>')
    for row, event in enumerate(history.events):
        last = bool(history.due) and row == len(history.events) - 1
        bad = VERBS[event.verb].error or event.verb in ("abort", "die")
        kind = "wrong" if last else "error" if bad else "box"
        x, y = _PAD + _LANE * event.party, _TOP - 8 + _ROW * row
        words = "a write is lost" if event.verb == "lose" else line(event)
        out.append(f'<rect class="{kind}" x="{x + 8}" y="{y}" width="{_LANE - 16}" height="24" rx="4"/>')
        out.append(f'<text x="{x + _LANE // 2}" y="{y + 16}" text-anchor="middle">{escape(words)}</text>')
        if last:
            out.append(
                f'<text class="bad" x="{x + _LANE // 2}" y="{y + 40}" text-anchor="middle">{escape(history.due)}</text>'
            )
    return "\n".join([*out, "</svg>", ""])

"""A history as a picture (SVG): a lane for each party and one for the disk, time going down."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from overt.judge.play import Call

_ROW, _TOP, _LEFT, _LANE, _LAST = 24, 34, 60, 220, 400
_WIDEST = 5  # lanes; more containers share the last


class Line(NamedTuple):
    """Calls that follow each other and are alike, of one or more parties."""

    call: Call
    parties: tuple[str, ...]

    @property
    def who(self) -> str:
        return self.parties[0] if len(self.parties) == 1 else f"{self.parties[0]}-{self.parties[-1]}"


def lines(history: Sequence[Call]) -> list[Line]:
    """Calls of several parties that are alike become one line."""
    found: list[Line] = []
    for call in history:
        last = found[-1] if found else None
        alike = last and (last.call.call, last.call.answer, last.call.due) == (call.call, call.answer, call.due)
        if last and alike and len(history) > 60 and call.who not in last.parties:
            found[-1] = Line(last.call, (*last.parties, call.who))
        else:
            found.append(Line(call, (call.who,)))
    return found


def draw(history: Sequence[Call]) -> str:
    """The picture; nothing of an empty history."""
    if not history:
        return ""
    rows = lines(history)
    names = list(dict.fromkeys(line.who for line in rows if line.who != "disk"))
    lanes = {name: min(number, _WIDEST) for number, name in enumerate(names)}
    disk = max(lanes.values(), default=-1) + 1
    width = _LEFT + disk * _LANE + _LAST
    height = _TOP + _ROW * len(rows) + 10
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="min-width:{width * 3 // 4}px" role="img" aria-label="timeline">'
    ]
    for name, lane in (*lanes.items(), ("disk", disk)):
        x = _LEFT + lane * _LANE
        parts.append(f'<text x="{x + 8}" y="18" class="lane">{escape(name)}</text>')
        parts.append(f'<line x1="{x}" y1="24" x2="{x}" y2="{height}" class="rail"/>')
    for number, line in enumerate(rows):
        parts += _row(line, _TOP + _ROW * number + 12, lanes, disk)
    parts.append("</svg>")
    return f'<div class="scroll">{"".join(parts)}</div>'


def _row(line: Line, y: int, lanes: dict[str, int], disk: int) -> list[str]:
    call = line.call
    x = _LEFT + _LANE * (disk if line.who == "disk" else lanes[line.who])
    kind = "told" if call.answer[:1] == "E" else "fine"
    kind = kind if call.fits else "broken"
    parts = [
        f'<text x="0" y="{y}" class="time">{call.at:.3f}</text>',
        f'<circle cx="{x}" cy="{y - 4}" r="5" class="{kind}"/>',
        f'<text x="{x + 10}" y="{y}">{escape(_short(call.call, 26))}',
    ]
    answer = call.answer.partition(":")[0]
    if call.due or answer != "0":
        parts.append(f' <tspan class="{kind}">&#8594; {escape(answer)}</tspan>')
    if not call.fits and call.due:
        parts.append(f' <tspan class="time">(due {escape(call.due)})</tspan>')
    full = f"{line.who}: {call.call} -> {call.answer}{f', due {call.due}' if call.due else ''}"
    parts.append(f"<title>{escape(full)}</title></text>")
    if call.disk:
        refused = " broken" if "refused" in call.disk else ""
        shift = 160 if line.who == "disk" else 10
        at = _LEFT + disk * _LANE
        parts.append(f'<text x="{at + shift}" y="{y}" class="did{refused}">{escape(_short(call.disk, 34))}</text>')
    return parts


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"

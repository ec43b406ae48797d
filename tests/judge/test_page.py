"""The report: one page that needs nothing else, by mouse and by keyboard, light, dark and on a phone."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from overt.judge import page, timeline
from overt.judge.choice import choose
from overt.judge.play import HOLDS, NOT_APPLICABLE, UNKNOWN, VIOLATED, Call, Outcome
from overt.judge.systems import Plain

from .browser import Browser, installed

HISTORY = (
    Call(0.001, "A", "mount", "0", "", True, ""),
    Call(0.002, "A", "f = open lost rw create", "0", "", True, ""),
    Call(0.010, "disk", "push", "0", "", True, "3 writes, 1 refused"),
    Call(0.020, "A", "newly syncfs .", "EIO", "told", True, ""),
    Call(0.030, "B", "newly syncfs .", "0", "told", False, "1 flush"),
)


def outcomes() -> list[Outcome]:
    found = []
    for upper in ("ext4", "xfs"):
        for scenario in ("U5-new-fd", "U6-old-fds", "U10-host-still-told"):
            found.append(Outcome(scenario, "plain", upper, HOLDS, "", HISTORY[:4]))
            found.append(Outcome(scenario, "a <system>", upper, VIOLATED, "B: newly syncfs .: 0, due told", HISTORY))
            found.append(Outcome(scenario, "odd", upper, UNKNOWN if scenario[1] == "5" else HOLDS, "not installed"))
            found.append(Outcome(scenario, "volatile one", upper, NOT_APPLICABLE, "the claim is about ordinary mounts"))
    return found


@pytest.fixture(scope="module")
def text() -> str:
    return page.render(outcomes(), choose([], ["U5", "U6", "U10"], None), [Plain("plain")])


class Reader(HTMLParser):
    """Ids, links, and whether every element is closed."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.links += [found["href"]] if tag == "a" and found.get("href") else []  # type: ignore[list-item]
        self.sources += [value for key, value in attrs if key == "src" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_link_leads_somewhere_and_every_element_is_closed(text: str) -> None:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    cells = [link for link in reader.links if link != "#"]
    assert {link[1:] for link in cells} == set(reader.ids)
    assert len(cells) == 18 and not reader.sources


def test_nothing_of_it_is_elsewhere(text: str) -> None:
    assert not re.findall(r"(?:https?:)?//\w", text)


def test_what_a_system_says_is_text_and_not_markup(text: str) -> None:
    assert "a &lt;system&gt;" in text and "<system>" not in text


def test_the_picture_shows_calls_answers_and_the_disk() -> None:
    picture = timeline.draw(HISTORY)
    for words in ("newly syncfs .", "EIO", "3 writes, 1 refused", "due told", ">disk<", ">A<", ">B<"):
        assert words in picture
    assert picture.count("<circle") == len(HISTORY)
    assert timeline.draw(()) == ""


def test_a_thousand_containers_that_do_the_same_are_one_line() -> None:
    history = [Call(0.0, f"A{number}", "newly syncfs .", "EIO", "told", True, "") for number in range(26, 1026)]
    (line,) = timeline.lines(history)
    assert line.who == "A26-A1025"


@pytest.fixture(scope="module")
def file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text)
    return path


@pytest.fixture
def browser(file: Path) -> Iterator[Browser]:
    with opened(file) as found:
        yield found


def opened(file: Path, **how: object) -> Browser:
    if not installed():
        pytest.skip("chromium is not installed")
    found = Browser(**how)  # type: ignore[arg-type]
    try:
        found.open(file)
    except BaseException:
        found.close()
        raise
    return found


CELL = 'td a[href="#ext4--U5-new-fd--plain"]'
SHOWN = "getComputedStyle(document.getElementById('ext4--U5-new-fd--plain')).display"


def test_a_cell_opens_by_mouse_and_closes_again(browser: Browser) -> None:
    assert browser.evaluate(SHOWN) == "none"
    browser.click(CELL)
    assert browser.evaluate(SHOWN) == "block"
    browser.click("article:target .close")
    assert browser.evaluate(SHOWN) == "none"
    quiet(browser)


def test_a_cell_opens_by_keyboard_and_arrows_lead_from_cell_to_cell(browser: Browser) -> None:
    browser.evaluate(f"document.querySelector('{CELL}').focus()")
    browser.press("Enter")
    assert browser.evaluate(SHOWN) == "block"
    browser.press("Escape")
    assert browser.evaluate(SHOWN) == "none"
    browser.evaluate(f"document.querySelector('{CELL}').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowDown")
    assert browser.evaluate("document.activeElement.getAttribute('href')") == "#ext4--U6-old-fds--a__system_"
    quiet(browser)


def test_tab_reaches_the_filters_and_then_the_cells(browser: Browser) -> None:
    seen = []
    for _ in range(12):
        browser.press("Tab")
        seen.append(browser.evaluate("document.activeElement.tagName + (document.activeElement.name || '')"))
    assert seen[:1] == ["SUMMARY"]
    assert {"INPUTupper", "INPUTneed", "INPUTdiffer", "INPUTwords", "A"} <= set(seen)


def test_filters_hide_uppers_and_rows(browser: Browser) -> None:
    rows = "[...document.querySelectorAll('.matrix:not([hidden]) tbody tr:not([hidden])')].length"
    assert browser.evaluate(rows) == 6
    browser.click("input[name=upper][value=xfs]")
    assert browser.evaluate(rows) == 3
    browser.click("input[name=need][value=nice]")
    assert browser.evaluate(rows) == 2
    browser.evaluate(
        "document.forms[0].words.value = 'U6';"
        "document.forms[0].words.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert browser.evaluate(rows) == 1
    quiet(browser)


def quiet(browser: Browser) -> None:
    """No message on the console, and nothing asked for but the page."""
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(file: Path, dark: bool, width: int) -> None:
    with opened(file, dark=dark, width=width) as browser:
        colours = browser.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        text, back = (sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in colours)
        assert (back < 150 and text > 500) if dark else (back > 600 and text < 200)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        quiet(browser)

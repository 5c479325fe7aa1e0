"""Proves that a page is whole in itself, that text from outside stays text on it, and that people can use it.

Pages are parsed, and opened in a real browser: wide and narrow, light and dark, by keyboard. Text from
outside is put in every field of an answer; the page must then have the very elements and attributes that it
has with plain words.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from r2scp.jobs.answer.page import LONGEST, SECONDS, answer_card, answer_page, shown, stills
from r2scp.jobs.answer.records import Candidate, Neighbour, RecoveredSecond, Result, Stream
from r2scp.jobs.html import render as pages
from r2scp.jobs.html.render import TEMPLATES, data_uri, inline_svg, outline, page
from r2scp.jobs.html.thumbnails import Preview, Previews, Sight, preview_of
from r2scp.pipelines.decoding.decode import Clip, StreamReport
from r2scp.store.schema import ModalityStatus

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attributes": '" onmouseover="alert(1)" x=\'',
    "quotes": "' autofocus onfocus='alert(1)'",
    "address": "javascript:alert(1)",
    "end of title": "</title></style></script><img src=x onerror=alert(1)>",
    "comment": "--><!-- ]]> <![CDATA[",
    "template": "{{ 7 * 7 }}{% raw %}",
    "entity": "&lt;b&gt;&#60;",
    "control": "a\x00b\x07c\x1b[2Jd\x7fe\x9bf\rg\nh\ti",
    "direction": "\u202egpj.exe\u2066x\u200f",
    "surrogate": "name\udcff",
    "long word": "W" * 5000,
    "long text": "long words " * 2000,
    "formula": '=HYPERLINK("http://example.org")',
}
WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")
VOID = {"meta", "link", "img", "br", "hr", "input"}

Look = Callable[..., Any]


class Parsed(HTMLParser):
    """A page's elements in order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.bodies: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.feed(html)
        self.close()
        assert self.open == [], "elements that nobody closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> says an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.bodies:
            self.bodies[self.open[-1]].append(data)
        else:
            self.text += data

    @property
    def structure(self) -> list[tuple[str, list[str]]]:
        return [(tag, list(attributes)) for tag, attributes in self.elements]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def texts(text: str, n: int = 3) -> Result:
    """An answer with `text` wherever there is text."""
    stream = Stream(status=text, expected=4.0, decoded=4.0, used=True, why=text)
    neighbour = Neighbour(
        clip_id=text,
        file=text,
        second=1,
        score=0.75,
        labels=[text, text],
        split=text,
        source_id=text,
        content_sha256=text,
        encoder=text,
        clips_version=3,
    )
    return Result(
        video=text,
        question=text,
        answers=[Candidate(answer=text, probability=0.6 / 2**at, logit=-at) for at in range(7)],
        missing="audio",
        audio=replace(stream, used=False),
        visual=stream,
        duration_s=4.0,
        content_sha256=text,
        recovery=text,
        neighbours=[neighbour] * n,
        recovered=[
            RecoveredSecond(second=0, dissonance=0.25, purged=False, replaced_by=None),
            RecoveredSecond(second=1, dissonance=0.75, purged=True, replaced_by=2),
            RecoveredSecond(second=2, dissonance=None, purged=False, replaced_by=None),
        ],
        router={"audio": 0.25, "visual": 0.5, text: 0.25},
        model={"run": text, text: [text, text], "nothing": None},
        store={"versions": {text: text}},
        notes=[text, text],
        id=text,
    )


def drawn(seed: int = 0, seconds: int = 4) -> Clip:
    """A recording of noise, the worst that a picture's size can meet, quieter to its end."""
    rng = np.random.default_rng(seed)
    report = StreamReport(ModalityStatus.PRESENT, seconds, seconds)
    return Clip(
        frames=rng.integers(0, 256, (seconds, 224, 224, 3), np.uint8),
        waveform=(np.linspace(0.5, 0, 16_000 * seconds) * rng.uniform(-1, 1, 16_000 * seconds)).astype("f4"),
        visual=report,
        audio=report,
        duration_s=float(seconds),
        errors="",
    )


@cache
def seen(seconds: tuple[int, ...]) -> Preview:
    return preview_of(drawn(), seconds)


class Drawn(Previews):
    """Shows `drawn` for every file."""

    def preview(self, path: str | Path, seconds: Iterable[int], content_sha256: str | None = None) -> Preview:
        return seen(tuple(seconds))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`written(html)`: the file that holds it."""
    folder = tmp_path_factory.mktemp("pages")

    def write(html: str) -> Path:
        path = folder / f"{hashlib.sha256(html.encode()).hexdigest()[:16]}.html"
        path.write_text(html, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def plain_page() -> str:
    return answer_page(texts("a few plain words"), Drawn())


COLUMNS = ({"text": "model"}, {"text": "accuracy", "numeric": True}, {"text": "type"})
ROWS = (
    ["b", {"text": "9.0 (8–10)", "value": 9.0}, "x"],
    ["a", {"text": "10.0 (9–11)", "value": 10.0}, "item 10"],
    ["ä", None, "item 9"],
    ["c", {"text": "−1.5", "value": -1.5}, "y"],
)


@pytest.fixture(scope="module")
def parts_page() -> str:
    """Each of the parts once, as a template of somebody else's may use it."""
    source = """{% extends "base.html" %}{% import "parts.html" as parts %}
{% block title %}Parts of a page{% endblock %}
{% block contents %}{{ parts.contents([("one", "The first"), ("two", "The second")]) }}{% endblock %}
{% block content %}<section id="one"><h2>One</h2>
{{ parts.table("Accuracy", columns, rows, note="in %") }}
{{ parts.table("Wide", wide, [wide_row, wide_row], roomy=true) }}
{{ parts.notice("all is well") }}{{ parts.notice("take care", "warning") }}
{{ parts.notice("broken", "fault") }}
</section><section id="two"><h2>Two</h2>
{{ parts.figure(svg, "A line.", "A line that rises") }}{{ parts.figure(png, "A dot.", "One dot", wide=true) }}
{{ parts.definitions([("term", "value"), ("several", ["one", "two"]), ("none", none), ("empty", [])]) }}
{% call parts.fold("More") %}<p>folded</p>{% endcall %}</section>{% endblock %}"""
    line = "<path d='M0 9L9 0' stroke='#1b1d1f'/>"
    line = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'>{line}</svg>"
    dot = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    values = {
        "columns": COLUMNS,
        "rows": ROWS,
        "wide": [{"text": f"column number {at}"} for at in range(30)],
        "wide_row": list(range(30)),
        "svg": inline_svg(line, "fig-one", {"#1b1d1f": "--ink"}),
        "png": data_uri(dot, "image/png"),
    }
    return pages._environment().from_string(source).render(values)


# --- what a page is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plain_page", "parts_page"])
def test_a_page_is_whole_in_itself_and_well_formed(which: str, request: pytest.FixtureRequest) -> None:
    parsed = Parsed(request.getfixturevalue(which))
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in ("src", "href"):
                assert re.match(r"data:(image/\w+;base64,|,$)|#[a-z]", value or ""), (tag, value)
            assert name not in ("srcset", "action", "formaction", "poster", "data", "background")
    assert not re.search(r"url\(|@import|expression\(", parsed.bodies["style"][0])
    assert all(attributes.get("alt") for attributes in parsed.all("img"))
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for landmark in ("header", "main", "footer"):
        assert len(parsed.all(landmark)) == 1
    assert parsed.all("a")[0] == {"class": "skip", "href": "#content"}
    assert all(attributes.get("scope") in ("col", "row") for attributes in parsed.all("th"))
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_one_script_is_the_one_that_the_policy_lets_run(plain_page: str) -> None:
    parsed = Parsed(plain_page)
    assert len(parsed.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(parsed.bodies["script"][0].encode()).digest()).decode()
    policy = parsed.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    content = policy["content"] or ""
    assert content.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in content
    assert "unsafe" not in content.replace("style-src 'unsafe-inline'", "")
    assert "http" not in plain_page.replace("http-equiv", "")


def test_a_name_that_is_missing_raises() -> None:
    with pytest.raises(UndefinedError):
        page("answer.html", {"title": "x", "lede": "y"})


def test_not_even_markup_brings_control_or_direction_characters() -> None:
    html = page("answer.html", {"title": Markup("a\u202eb\x1bc"), "lede": "", "cards": []})
    assert "<h1>a\\u202eb\\x1bc</h1>" in html


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.html")))
def test_templates_put_outside_text_only_where_it_is_escaped(template: str) -> None:
    source = re.sub(r"\{#.*?#\}", "", (TEMPLATES / template).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", source)
    assert not re.search(r"=\{\{", source), "an attribute without quotes"
    for name, value in re.findall(r'([\w-]+)="([^"]*\{\{[^"]*)"', source):
        assert not name.startswith(("on", "srcset", "action"))
        if name == "style":
            assert re.fullmatch(r"[a-z]+:\{\{ [\w.]+\|css_percent \}\}", value)
        if name == "href":
            assert re.fullmatch(r"#\{\{ id \}\}", value)
        if name == "src":
            assert re.fullmatch(r"\{\{ [\w.\[\]]+\|(only_data|webp) \}\}", value)
    for tag in ("script", "style"):
        for body in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", source, re.DOTALL):
            assert body == f"{{{{ {tag} }}}}" or "{{" not in body


# --- text from outside ------------------------------------------------------------------------------


@pytest.mark.parametrize("previews", [Previews(), Drawn()], ids=["gone", "shown"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_text_from_outside_adds_no_element_and_no_attribute(kind: str, previews: Previews) -> None:
    text = HOSTILE[kind]
    plain = Parsed(answer_page([texts("plain"), texts("plain")], previews))
    html = answer_page([texts(text), texts(text)], previews)
    parsed = Parsed(html)
    assert parsed.structure == plain.structure
    assert parsed.bodies["script"] == plain.bodies["script"]
    assert parsed.bodies["style"] == plain.bodies["style"]
    assert all(c.isprintable() or c == "\n" for c in html)
    html.encode("utf-8")
    for name in ("src", "href", "style", "class"):
        values = [[a[name] for _, a in each.elements if name in a] for each in (parsed, plain)]
        assert values[0] == values[1]


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if not kind.startswith("long")])
def test_text_from_outside_is_there_to_read(kind: str) -> None:
    text = pages.printable(HOSTILE[kind])
    parsed = Parsed(answer_page(texts(HOSTILE[kind]), Drawn()))
    assert parsed.text.count(text) > 20
    assert parsed.bodies["title"] == [re.sub(r"\s+", " ", text)] or "<" in text
    assert parsed.all("article")[0]["aria-label"] == text


def test_long_text_is_cut_and_the_page_stays_small() -> None:
    html = answer_page(texts(HOSTILE["long word"]))
    assert "W" * LONGEST not in html
    assert "W" * (LONGEST - 1) + "…" in html
    assert len(html) < 200_000


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_from_outside_runs_or_overflows(kind: str, open_page: Look, written: Any) -> None:
    looked = open_page(written(answer_page([texts(HOSTILE[kind]), texts("plain")], Drawn())), 360)
    assert (looked.errors, looked.page_errors, looked.requests, looked.dialogs) == ([], [], [], [])
    looked.ask("for (const each of document.querySelectorAll('details')) each.open = true")
    assert looked.ask(OVERFLOW) == []
    assert looked.ask("document.title") != ""


def test_a_drawing_brings_shapes_and_nothing_else() -> None:
    source = """<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" width="9pt"
      xmlns:xlink="http://www.w3.org/1999/xlink" onload="alert(1)"><metadata>m</metadata>
      <script>alert(2)</script><style>* {fill: url(http://example.org/x)}</style><title>t</title>
      <defs><clipPath id="c"><rect width="9"/></clipPath></defs>
      <foreignObject><p xmlns="http://www.w3.org/1999/xhtml">html</p></foreignObject>
      <g clip-path="url(#c)" style="fill: #1B1D1F" onclick="alert(3)"><text>&lt;script&gt;</text>
      <use xlink:href="#c"/><use xlink:href="http://example.org/y"/>
      <a href="javascript:alert(4)"><path d="M0"/></a>
      <image xlink:href="data:image/png;base64,AAAA"/><image xlink:href="data:image/svg+xml;base64,AAAA"/>
      <path d="M0 0" fill="url(http://example.org/z)" stroke="#1b1d1f"/>
      <animate onbegin="alert(5)"/></g></svg>"""
    svg = inline_svg(source, "one", {"#1b1d1f": "--ink"})
    assert isinstance(svg, Markup)
    for gone in (
        "alert",
        "example",
        "http",
        "html",
        "metadata",
        "<style",
        "<title",
        "<a",
        "9pt",
        "xlink",
        "ns0",
    ):
        assert gone not in svg, gone
    assert "&lt;script&gt;" in svg
    assert 'id="one-c"' in svg
    assert 'clip-path="url(#one-c)"' in svg
    assert 'href="#one-c"' in svg
    assert 'href="data:image/png;base64,AAAA"' in svg
    assert svg.count("href") == 2
    assert 'style="fill: var(--ink)"' in svg
    assert 'stroke="var(--ink)"' in svg


@pytest.mark.parametrize(
    "source", ["", "no svg", "<html/>", "<svg/>", "<svg xmlns='http://www.w3.org/2000/svg'>"]
)
def test_what_is_no_drawing_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="SVG"):
        inline_svg(source, "one")


def test_a_picture_must_be_in_the_page() -> None:
    template = '{% import "parts.html" as parts %}{{ parts.figure(image, "c", "a") }}'
    made = pages._environment().from_string(template)
    for image in ("https://example.org/a.png", "javascript:alert(1)", "data:text/html,x", "a.png"):
        with pytest.raises(ValueError, match="data: address"):
            made.render(image=image)


# --- how it looks -----------------------------------------------------------------------------------

OVERFLOW = """(() => {
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const inside = (e) => e.closest(".scroll, .hidden, .skip, svg");
  const out = [...document.querySelectorAll("body *")].filter(
    (e) => !inside(e) && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  return [...(wide > 0 ? [`page ${wide}`] : []), ...out.map((e) => `${e.tagName}.${e.className}`)];
})()"""

#: Text whose contrast with what lies behind it is below WCAG 2.2's 1.4.3 (AA).
FAINT = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    throw new Error("nothing behind");
  };
  const found = [];
  let seen = 0;
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || e.closest("script, svg, .hidden") || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const [a, b] = [luminance(rgba(style.color)), luminance(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.textContent.trim()}`);
  }
  return { found, seen };
})()"""


@pytest.mark.parametrize("which", ["plain_page", "parts_page"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_quiet_fits_and_can_be_read(
    which: str, scheme: str, width: int, open_page: Look, written: Any, request: pytest.FixtureRequest
) -> None:
    looked = open_page(written(request.getfixturevalue(which)), width, scheme)
    assert (looked.errors, looked.page_errors, looked.requests) == ([], [], [])
    looked.ask("for (const each of document.querySelectorAll('details')) each.open = true")
    assert looked.ask(OVERFLOW) == []
    faint = looked.ask(FAINT)
    assert faint["found"] == []
    assert faint["seen"] > 20
    assert looked.ask("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    page_colour = looked.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert (page_colour == "rgb(255, 255, 255)") == (scheme == "light")


def column(looked: Any, at: int) -> list[str]:
    return looked.ask(
        "(at) => [...document.querySelector('tbody').rows].map((r) => r.cells[at].textContent)", at
    )


def test_tables_are_sorted_by_keyboard_and_say_so(parts_page: str, open_page: Look, written: Any) -> None:
    looked = open_page(written(parts_page))
    states = "[...document.querySelector('thead').rows[0].cells].map((c) => c.getAttribute('aria-sort'))"
    came = ["b", "a", "ä", "c"]
    assert column(looked, 0) == came
    assert looked.ask(states) == [None, None, None]
    button = "document.querySelectorAll('thead button')[1]"
    looked.ask(f"{button}.focus()")
    looked.do(lambda page: page.keyboard.press("Enter"))
    assert column(looked, 0) == ["c", "b", "a", "ä"]  # by value, what has none last
    assert looked.ask(states) == [None, "ascending", None]
    looked.do(lambda page: page.keyboard.press("Space"))
    assert column(looked, 0) == ["a", "b", "c", "ä"]
    assert looked.ask(states) == [None, "descending", None]
    looked.do(lambda page: page.keyboard.press("Enter"))
    assert column(looked, 0) == came
    assert looked.ask(states) == [None, None, None]
    looked.do(lambda page: page.keyboard.press("Shift+Tab"))
    looked.do(lambda page: page.keyboard.press("Enter"))
    assert column(looked, 0) == ["a", "ä", "b", "c"]
    assert looked.ask(states) == ["ascending", None, None]
    looked.do(lambda page: page.get_by_role("button", name="type").first.click())
    assert column(looked, 2) == ["item 9", "item 10", "x", "y"]


def test_a_keyboard_gets_to_the_content_and_into_what_scrolls(
    parts_page: str, open_page: Look, written: Any
) -> None:
    looked = open_page(written(parts_page), 360)
    looked.do(lambda page: page.keyboard.press("Tab"))
    assert looked.ask("document.activeElement.className") == "skip"
    assert looked.ask("document.activeElement.getBoundingClientRect().top") >= 0
    looked.do(lambda page: page.keyboard.press("Enter"))
    assert looked.ask("document.activeElement.id") == "content"
    stops = (
        "[...document.querySelectorAll('.scroll')].map((e) => [e.tabIndex, e.scrollWidth > e.clientWidth])"
    )
    found = looked.ask(stops)
    assert [0, True] in found
    assert all((at == 0) == scrolls for at, scrolls in found)
    region = looked.do(lambda page: page.get_by_role("region", name="Wide").count())
    assert region == 1


def test_without_its_script_a_page_says_the_same(parts_page: str) -> None:
    assert "<button" not in parts_page
    assert "9.0 (8–10)" in Parsed(parts_page).text


def test_print_is_light_and_fits_paper(plain_page: str, open_page: Look, written: Any) -> None:
    looked = open_page(written(plain_page), 700, "dark")
    looked.do(lambda page: page.emulate_media(media="print", color_scheme="dark"))
    looked.ask("dispatchEvent(new Event('beforeprint'))")
    assert looked.ask("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert looked.ask(OVERFLOW.replace(".scroll, ", "")) == []
    assert looked.ask(FAINT)["found"] == []


def test_print_opens_what_is_folded(plain_page: str, open_page: Look, written: Any) -> None:
    looked = open_page(written(plain_page))
    folded = "[...document.querySelectorAll('details')].map((each) => each.open)"
    before = looked.ask(folded)
    looked.ask("dispatchEvent(new Event('beforeprint'))")
    assert all(looked.ask(folded))
    looked.ask("dispatchEvent(new Event('afterprint'))")
    assert looked.ask(folded) == before
    assert not any(before)


def test_a_browser_that_is_closed_leaves_no_process(browser: Any) -> None:
    def children() -> set[int]:
        return {process.pid for process in psutil.Process().children(recursive=True)}

    before = children()
    another = type(browser)(browser.program, browser.start)
    started = children() - before
    another.close()
    assert started
    assert not started & children()


# --- what an answer's page says ---------------------------------------------------------------------


def test_an_answer_says_what_was_found_missing_and_used() -> None:
    answered = replace(texts("words"), recovery="neighbours", question="What sounds?")
    answered = replace(
        answered, audio=replace(answered.audio, status="absent", why="there is no such stream")
    )
    text = re.sub(r"\s+", " ", Parsed(answer_page(answered, Drawn())).text)
    assert "What sounds?" in text
    assert "The sound is missing (there is no such stream): the sound of 3 clips" in text
    assert "60.0 %" in text
    assert "2 more share 2.8 %" in text
    assert "Second 1: dissonance 0.75, purged, replaced by the guided token of second 2." in text
    assert "Second 2: not purified." in text
    assert "1 of 3 seconds were purged" in text
    assert "second 1, score 0.750" in text
    assert "0.500" in text


def test_purged_seconds_differ_by_more_than_colour(plain_page: str, open_page: Look, written: Any) -> None:
    looked = open_page(written(plain_page))
    marks = looked.ask(
        "[...document.querySelectorAll('.timeline li')].map((e) => e.querySelector('.column').innerText)"
    )
    assert marks == ["", "×", ""]
    styles = "[...document.querySelectorAll('.column > span')].map((e) => getComputedStyle(e).borderTopStyle)"
    assert looked.ask(styles) == ["none", "dashed", "none"]


def test_what_cannot_be_shown_says_why(tmp_path: Path, rendered_media: Mapping[str, bytes]) -> None:
    path = tmp_path / "both.mp4"
    path.write_bytes(rendered_media["both.mp4"])
    gone = replace(texts("x").neighbours[0], file=str(tmp_path / "gone.mp4"), content_sha256="1" * 64)
    changed = replace(gone, file=str(path))
    digest = hashlib.sha256(rendered_media["both.mp4"]).hexdigest()
    same = replace(changed, content_sha256=digest)
    answered = replace(
        texts("x"), video=str(path), content_sha256=digest, neighbours=[gone, changed, same, same]
    )
    previews = Previews()
    seen = shown(answered, previews)
    assert [each.sight for each in seen.neighbours] == [Sight.GONE, Sight.CHANGED, Sight.SHOWN, Sight.SHOWN]
    assert previews.decoded == 1  # the recording, and twice its own neighbour
    html = answer_page(answered, previews)
    assert "The file is gone" in html
    assert "no longer the one that was stored" in html
    assert (
        html.count("<img") == 2 + 2
    )  # two seconds of the recording, one of each neighbour that is what it was


def test_stills_are_spread_over_the_recording() -> None:
    assert stills(0) == []
    assert stills(3) == [0, 1, 2]
    assert stills(60) == [5, 15, 25, 35, 45, 55]


def test_a_long_recording_is_not_drawn_to_its_end() -> None:
    second = texts("x").recovered[0]
    answered = replace(texts("x"), recovered=[replace(second, second=at) for at in range(3600)])
    card = answer_card(answered, shown(answered, Drawn()))
    assert len(card["timeline"]) == SECONDS
    html = answer_page(answered, Drawn())
    assert "3,300 more seconds are not drawn" in html
    assert len(html) < 400_000


def test_outline_shows_the_loudest_moment_full_and_silence_flat() -> None:
    assert outline([(-0.1, 0.05), (0.0, 0.0)]) == "M0,-24L1,0L2,0L2,0L1,0L0,48Z"
    assert outline([(0.0, 0.0)] * 2) == "M0,0L1,0L2,0L2,0L1,0L0,0Z"
    assert "48" not in outline([(-0.001, 0.001)])


def test_twelve_answers_of_noise_are_below_three_megabytes() -> None:
    several = [texts(f"words {at}", n=10) for at in range(12)]
    size = len(answer_page(several, Drawn()).encode())
    assert size < 3_000_000, size

"""Pages are self-contained, text from outside stays text, and people can use them.

Pages are parsed, and opened in a real browser: wide and narrow, light and dark, by keyboard. Hostile text is
put in every field of an answer; the page must then have the same elements and attributes as with plain words.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from r2scp.jobs.answer.page import MAX_SECONDS, MAX_TEXT, answer_card, answer_page, load_media, stills
from r2scp.jobs.answer.records import Candidate, Neighbour, RecoveredSecond, Result, Stream
from r2scp.jobs.console import printable
from r2scp.jobs.html.render import TEMPLATES, _environment, data_uri, inline_svg, outline, page
from r2scp.jobs.html.thumbnails import Preview, Previews, PreviewStatus, _peaks, _picture

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
VOID = {"meta", "link", "img", "br", "hr", "input"}

OpenPage = Callable[..., Any]


class Parsed(HTMLParser):
    """The elements of a page in order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.bodies: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.feed(html)
        self.close()
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
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


def result_of(text: str, n: int = 3) -> Result:
    """An answer with `text` in every text field."""
    stream = Stream(status=text, expected=4.0, decoded=4.0, used=True, why=text)
    names = ("clip_id", "file", "split", "source_id", "content_sha256", "encoder")
    neighbour = Neighbour(
        **dict.fromkeys(names, text), second=1, score=0.75, labels=[text, text], clips_version=3
    )
    seconds = [(0.25, False, None), (0.75, True, 2), (None, False, None)]
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
            RecoveredSecond(second=at, dissonance=dissonance, purged=purged, replaced_by=source)
            for at, (dissonance, purged, source) in enumerate(seconds)
        ],
        router={"audio": 0.25, "visual": 0.5, text: 0.25},
        model={"run": text, text: [text, text], "nothing": None},
        store={"versions": {text: text}},
        notes=[text, text],
        id=text,
    )


class NoisePreviews(Previews):
    """Shows a recording of noise for every file, the largest that a preview can be."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, (4, 224, 224, 3), np.uint8)
        waveform = np.linspace(0.5, 0, 64_000) * rng.uniform(-1, 1, 64_000)
        self.noise = Preview(
            status=PreviewStatus.SHOWN,
            pictures={second: _picture(frame) for second, frame in enumerate(frames)},
            peaks=_peaks(waveform.astype("f4"))[1],
            duration_s=4.0,
            seconds=4,
        )

    def preview(self, path: str | Path, seconds: Iterable[int], content_sha256: str | None = None) -> Preview:
        return replace(self.noise, pictures={second: self.noise.pictures[second] for second in seconds})


NOISE = NoisePreviews()


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`save(html)`: the path of a file with it."""
    folder = tmp_path_factory.mktemp("pages")

    def write(html: str) -> Path:
        path = folder / f"{hashlib.sha256(html.encode()).hexdigest()[:16]}.html"
        path.write_text(html, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def plain_page() -> str:
    return answer_page(result_of("a few plain words"), NOISE)


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return answer_page([result_of(text) for text in HOSTILE.values()], NOISE)


COLUMNS = ({"text": "model"}, {"text": "accuracy", "numeric": True}, {"text": "type"})
ROWS = (
    ["b", {"text": "9.0 (8–10)", "value": 9.0}, "x"],
    ["a", {"text": "10.0 (9–11)", "value": 10.0}, "item 10"],
    ["ä", None, "item 9"],
    ["c", {"text": "−1.5", "value": -1.5}, "y"],
)


@pytest.fixture(scope="module")
def parts_page() -> str:
    """Each part once, as a template may use it."""
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
    return _environment().from_string(source).render(values)


# --- the contract of a page


@pytest.mark.parametrize("which", ["plain_page", "parts_page"])
def test_a_page_is_self_contained_and_well_formed(which: str, request: pytest.FixtureRequest) -> None:
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


def test_the_policy_allows_only_the_one_script(plain_page: str) -> None:
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


def test_a_missing_value_raises() -> None:
    with pytest.raises(UndefinedError):
        page("answer.html", {"title": "x", "lede": "y"})


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.html")))
def test_templates_use_text_only_where_it_is_escaped(template: str) -> None:
    source = re.sub(r"\{#.*?#\}", "", (TEMPLATES / template).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", source)
    assert not re.search(r"=\{\{", source), "an unquoted attribute"
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


# --- text from outside


def test_hostile_text_adds_no_element_and_no_attribute(hostile_page: str) -> None:
    plain = Parsed(answer_page([result_of("plain")] * len(HOSTILE), NOISE))
    parsed = Parsed(hostile_page)
    assert parsed.structure == plain.structure
    assert parsed.bodies == plain.bodies
    for name in ("src", "href", "style", "class"):
        values = [[a[name] for _, a in each.elements if name in a] for each in (parsed, plain)]
        assert values[0] == values[1]
    assert all(character.isprintable() or character == "\n" for character in hostile_page)
    hostile_page.encode("utf-8")
    for kind, text in HOSTILE.items():
        if not kind.startswith("long"):
            assert parsed.text.count(printable(text)) > 20
            assert printable(text) in [attributes["aria-label"] for attributes in parsed.all("article")]
    assert "W" * MAX_TEXT not in hostile_page
    assert "W" * (MAX_TEXT - 1) + "…" in hostile_page


def test_hostile_text_neither_runs_nor_overflows(hostile_page: str, open_page: OpenPage, save: Any) -> None:
    opened = open_page(save(hostile_page), 360)
    assert (opened.errors, opened.page_errors, opened.requests, opened.dialogs) == ([], [], [], [])
    opened.ask("for (const each of document.querySelectorAll('details')) each.open = true")
    assert opened.ask(OVERFLOW) == []


def test_a_title_is_one_line_of_text() -> None:
    for kind in ("attributes", "control"):
        parsed = Parsed(answer_page(result_of(HOSTILE[kind])))
        assert parsed.bodies["title"] == [printable(HOSTILE[kind])]
    html = page("answer.html", {"title": Markup("a\u202eb\x1bc"), "lede": "", "cards": []})
    assert "<h1>a\\u202eb\\x1bc</h1>" in html  # in markup too


def test_an_svg_keeps_only_shapes_and_text() -> None:
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
    removed = (
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
    )
    for text in removed:
        assert text not in svg, text
    assert "&lt;script&gt;" in svg
    assert 'id="one-c"' in svg
    assert 'clip-path="url(#one-c)"' in svg
    assert 'href="#one-c"' in svg
    assert 'href="data:image/png;base64,AAAA"' in svg
    assert svg.count("href") == 2
    assert 'style="fill: var(--ink)"' in svg
    assert 'stroke="var(--ink)"' in svg


def test_what_is_not_an_svg_or_a_data_url_is_refused() -> None:
    for source in ("", "no svg", "<html/>", "<svg/>", "<svg xmlns='http://www.w3.org/2000/svg'>"):
        with pytest.raises(ValueError, match="SVG"):
            inline_svg(source, "one")
    template = '{% import "parts.html" as parts %}{{ parts.figure(image, "c", "a") }}'
    for image in ("https://example.org/a.png", "javascript:alert(1)", "data:text/html,x", "a.png"):
        with pytest.raises(ValueError, match="data: URL"):
            _environment().from_string(template).render(image=image)


# --- in a browser

OVERFLOW = """(() => {
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const inside = (e) => e.closest(".scroll, .hidden, .skip, svg");
  const out = [...document.querySelectorAll("body *")].filter(
    (e) => !inside(e) && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  return [...(wide > 0 ? [`page ${wide}`] : []), ...out.map((e) => `${e.tagName}.${e.className}`)];
})()"""

#: Text whose contrast with its background is below WCAG 2.2, 1.4.3 (AA).
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


@pytest.mark.parametrize(
    ("which", "scheme", "width"),
    [
        ("plain_page", "light", 360),
        ("plain_page", "dark", 1280),
        ("parts_page", "light", 1280),
        ("parts_page", "dark", 360),
    ],
)
def test_a_page_fits_and_can_be_read(
    which: str, scheme: str, width: int, open_page: OpenPage, save: Any, request: pytest.FixtureRequest
) -> None:
    opened = open_page(save(request.getfixturevalue(which)), width, scheme)
    assert (opened.errors, opened.page_errors, opened.requests) == ([], [], [])
    opened.ask("for (const each of document.querySelectorAll('details')) each.open = true")
    assert opened.ask(OVERFLOW) == []
    contrast = opened.ask(FAINT)
    assert contrast["found"] == []
    assert contrast["seen"] > 20
    assert opened.ask("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    background = opened.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def column(opened: Any, at: int) -> list[str]:
    return opened.ask(
        "(at) => [...document.querySelector('tbody').rows].map((r) => r.cells[at].textContent)", at
    )


def test_tables_are_sorted_by_keyboard(parts_page: str, open_page: OpenPage, save: Any) -> None:
    opened = open_page(save(parts_page))
    states = "[...document.querySelector('thead').rows[0].cells].map((c) => c.getAttribute('aria-sort'))"
    original = ["b", "a", "ä", "c"]
    assert "<button" not in parts_page  # without the script, tables keep their order
    assert column(opened, 0) == original
    assert opened.ask(states) == [None, None, None]
    button = "document.querySelectorAll('thead button')[1]"
    opened.ask(f"{button}.focus()")
    opened.do(lambda page: page.keyboard.press("Enter"))
    assert column(opened, 0) == ["c", "b", "a", "ä"]  # by value, missing last
    assert opened.ask(states) == [None, "ascending", None]
    opened.do(lambda page: page.keyboard.press("Space"))
    assert column(opened, 0) == ["a", "b", "c", "ä"]
    assert opened.ask(states) == [None, "descending", None]
    opened.do(lambda page: page.keyboard.press("Enter"))
    assert column(opened, 0) == original
    assert opened.ask(states) == [None, None, None]
    opened.do(lambda page: page.keyboard.press("Shift+Tab"))
    opened.do(lambda page: page.keyboard.press("Enter"))
    assert column(opened, 0) == ["a", "ä", "b", "c"]
    assert opened.ask(states) == ["ascending", None, None]
    opened.do(lambda page: page.get_by_role("button", name="type").first.click())
    assert column(opened, 2) == ["item 9", "item 10", "x", "y"]


def test_a_keyboard_reaches_the_content_and_what_scrolls(
    parts_page: str, open_page: OpenPage, save: Any
) -> None:
    opened = open_page(save(parts_page), 360)
    opened.do(lambda page: page.keyboard.press("Tab"))
    assert opened.ask("document.activeElement.className") == "skip"
    assert opened.ask("document.activeElement.getBoundingClientRect().top") >= 0
    opened.do(lambda page: page.keyboard.press("Enter"))
    assert opened.ask("document.activeElement.id") == "content"
    regions = opened.ask(
        "[...document.querySelectorAll('.scroll')].map((e) => [e.tabIndex, e.scrollWidth > e.clientWidth])"
    )
    assert [0, True] in regions
    assert all((tab_index == 0) == scrolls for tab_index, scrolls in regions)
    assert opened.do(lambda page: page.get_by_role("region", name="Wide").count()) == 1


def test_print_is_light_fits_paper_and_opens_what_is_folded(
    plain_page: str, open_page: OpenPage, save: Any
) -> None:
    opened = open_page(save(plain_page), 700, "dark")
    is_open = "[...document.querySelectorAll('details')].map((each) => each.open)"
    assert not any(opened.ask(is_open))
    opened.do(lambda page: page.emulate_media(media="print", color_scheme="dark"))
    opened.ask("dispatchEvent(new Event('beforeprint'))")
    assert all(opened.ask(is_open))
    assert opened.ask("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.ask(OVERFLOW.replace(".scroll, ", "")) == []
    assert opened.ask(FAINT)["found"] == []
    opened.ask("dispatchEvent(new Event('afterprint'))")
    assert not any(opened.ask(is_open))


def test_purged_seconds_differ_by_more_than_colour(plain_page: str, open_page: OpenPage, save: Any) -> None:
    opened = open_page(save(plain_page))
    marks = "[...document.querySelectorAll('.timeline li')].map((e) => e.querySelector('.column').innerText)"
    assert opened.ask(marks) == ["", "×", ""]
    styles = "[...document.querySelectorAll('.column > span')].map((e) => getComputedStyle(e).borderTopStyle)"
    assert opened.ask(styles) == ["none", "dashed", "none"]


# --- the page of an answer


def test_an_answer_says_what_is_missing_and_what_was_used() -> None:
    result = result_of("words")
    audio = replace(result.audio, status="absent", why="there is no such stream")
    result = replace(result, recovery="neighbours", question="What sounds?", audio=audio)
    text = re.sub(r"\s+", " ", Parsed(answer_page(result, NOISE)).text)
    assert "What sounds?" in text
    assert "The sound is missing (there is no such stream): the sound of 3 clips" in text
    assert "60.0 %" in text
    assert "2 other answers share 2.8 %" in text
    guided = "replaced with the representation guided by the picture at 0:02"
    assert f"Second 1: dissonance 0.75, purged, {guided}." in text
    assert "Second 2: not purified." in text
    assert "1 of 3 seconds were purged" in text
    assert "second 1, score 0.750" in text
    assert "0.500" in text


def test_what_cannot_be_shown_says_why(tmp_path: Path, rendered_media: Mapping[str, bytes]) -> None:
    path = tmp_path / "both.mp4"
    path.write_bytes(rendered_media["both.mp4"])
    gone = replace(result_of("x").neighbours[0], file=str(tmp_path / "gone.mp4"), content_sha256="1" * 64)
    changed = replace(gone, file=str(path))
    digest = hashlib.sha256(rendered_media["both.mp4"]).hexdigest()
    same = replace(changed, content_sha256=digest)
    result = replace(
        result_of("x"), video=str(path), content_sha256=digest, neighbours=[gone, changed, same, same]
    )
    previews = Previews()
    statuses = [preview.status for preview in load_media(result, previews).neighbours]
    assert statuses == ["gone", "changed", "shown", "shown"]
    assert previews.decoded == 1  # the recording and two neighbours are one file
    html = answer_page(result, previews)
    assert "The file no longer exists." in html
    assert "not the one that was stored" in html
    assert html.count("<img") == 2 + 2  # two seconds of the recording, one of each unchanged neighbour


def test_stills_are_spread_over_the_recording() -> None:
    assert stills(0) == []
    assert stills(3) == [0, 1, 2]
    assert stills(60) == [5, 15, 25, 35, 45, 55]


def test_a_long_recording_is_not_shown_to_its_end() -> None:
    second = result_of("x").recovered[0]
    result = replace(result_of("x"), recovered=[replace(second, second=at) for at in range(3600)])
    card = answer_card(result, load_media(result, NOISE))
    assert len(card["timeline"]) == MAX_SECONDS
    html = answer_page(result, NOISE)
    assert "3,300 more seconds are not shown" in html
    assert len(html) < 400_000


def test_an_outline_has_full_height_and_keeps_silence_flat() -> None:
    assert outline([(-0.1, 0.05), (0.0, 0.0)]) == "M0,-24L1,0L2,0L2,0L1,0L0,48Z"
    assert outline([(0.0, 0.0)] * 2) == "M0,0L1,0L2,0L2,0L1,0L0,0Z"
    assert "48" not in outline([(-0.001, 0.001)])


def test_twelve_answers_of_noise_are_below_three_megabytes() -> None:
    results = [result_of(f"words {at}", n=10) for at in range(12)]
    assert len(answer_page(results, NOISE).encode()) < 3_000_000

"""Pages: one HTML file each, with all that it needs in itself, that nothing from outside can steer.

    >>> page("report.html", {"title": "Run 7", "figures": figures})

A page asks the network for nothing and runs one script, known by its SHA-256. What comes from outside is
escaped by rule, not by care: `templates/parts.html` tells what a template may do with it.
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from r2scp.jobs.console import printable

TEMPLATES = Path(__file__).with_name("templates")
NONE = "–"  # shown where there is no value
LOUDEST = 48  # height of the loudest sample, of the 50 that a drawing has above its middle ...
MOST_GAIN = 20.0  # ... unless that would blow up what is all but silence
ID_OK = re.compile(r"[a-z][a-z0-9-]*")

SVG = "{http://www.w3.org/2000/svg}"
#: What a drawing may be made of; everything else is left out with all that is in it.
SVG_PARTS = frozenset(
    SVG + name
    for name in (
        *("svg", "g", "defs", "clipPath", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon"),
        *("text", "tspan", "use", "linearGradient", "stop", "pattern", "marker", "image"),
    )
)
XLINK = "{http://www.w3.org/1999/xlink}href"
LOCAL = re.compile(r"url\(\s*['\"]?#([^)'\"]*)['\"]?\s*\)")
ELSEWHERE = re.compile(r"url\(\s*['\"]?(?!#)|@import|expression\(|javascript:", re.IGNORECASE)
PIXELS = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=\s]*\Z")


def page(template: str, values: Mapping[str, object]) -> str:
    """The whole file. `template` is one of `templates/`; a name that it uses and `values` lack raises."""
    made = _environment().get_template(template).render(dict(values))
    for character in set(made):  # also what reached the page as markup
        if not character.isprintable() and character != "\n":
            made = made.replace(character, printable(character))
    return made


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that needs no fetching. `kind`: `image/webp`, `image/png`, `image/svg+xml`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def inline_svg(source: str | bytes, prefix: str, palette: Mapping[str, str] | None = None) -> Markup:
    """A drawing as part of the page, so that it follows light and dark.

    `prefix` (a-z, 0-9, -) sets its ids apart from those of other drawings on the page. `palette` maps colours
    of the drawing, as they stand in it (`#1b1d1f`), to variables of the page's style (`--ink`). Nothing but
    shapes and text comes through: no script, no link, no style sheet, no address.
    Raises `ValueError` for what is no SVG.
    """
    if not ID_OK.fullmatch(prefix):
        raise ValueError(f"prefix must be of a-z, 0-9 and -, a letter first; got {prefix!r}")
    try:
        root = ElementTree.fromstring(source)
    except ElementTree.ParseError as error:
        raise ValueError(f"must be SVG; got something else: {error}") from error
    if root.tag != SVG + "svg":
        raise ValueError(f"must be SVG; got an element {root.tag!r}")
    colours = {colour.lower(): f"var({name})" for colour, name in (palette or {}).items()}
    _tame(root, prefix, colours)
    for name in ("width", "height") if "viewBox" in root.attrib else ():
        root.attrib.pop(name, None)  # the page gives it its size
    return Markup(re.sub(r"\s?xmlns(?::\w+)?=\"[^\"]*\"", "", _written(root)))


def _written(root: ElementTree.Element) -> str:
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _tame(element: ElementTree.Element, prefix: str, colours: Mapping[str, str]) -> None:
    """Leave of an SVG element what can do nothing but be looked at."""
    for child in list(element):
        if child.tag in SVG_PARTS:
            _tame(child, prefix, colours)
        else:
            element.remove(child)
    for name, value in list(element.attrib.items()):
        del element.attrib[name]
        plain = "href" if name == XLINK else name
        if plain == "href":
            local = value.startswith("#")
            if local or (element.tag == SVG + "image" and PIXELS.match(value)):
                element.set("href", f"#{prefix}-{value[1:]}" if local else value)
        elif not (plain.startswith(("{", "on")) or ELSEWHERE.search(value)):
            value = f"{prefix}-{value}" if plain == "id" else LOCAL.sub(rf"url(#{prefix}-\1)", value)
            element.set(plain, _recoloured(value, colours) if plain != "d" else value)


def _recoloured(value: str, colours: Mapping[str, str]) -> str:
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: colours.get(found[0].lower(), found[0]), value)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "decimal": decimal,
        "percent": lambda share: decimal(None if share is None else 100 * share, 1),
        "grouped": lambda number: NONE if number is None else f"{number:,}",
        "css_percent": _css_percent,
        "outline": outline,
        "webp": lambda content: data_uri(content, "image/webp"),
        "only_data": _only_data,
    }
    made.tests["markup"] = lambda value: isinstance(value, Markup)
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {
        "script": Markup(script),
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    }
    return made


def _shown(value: object) -> object:
    """What stands for a value before it is escaped."""
    if value is None:
        return NONE
    if isinstance(value, str) and not (isinstance(value, Markup) or value.isprintable()):
        return printable(value)
    return value


def decimal(number: float | None, places: int) -> str:
    """A number with so many places; a dash where there is none."""
    return NONE if number is None or not math.isfinite(number) else f"{number:.{places}f}"


def outline(peaks: Sequence[tuple[float, float]]) -> str:
    """The path around (lowest, highest) sample of each slice, one unit wide each."""
    loudest = max((max(-low, high) for low, high in peaks), default=0.0)
    gain = LOUDEST * min(MOST_GAIN, 1 / loudest if loudest > 0 else MOST_GAIN)
    points = [*enumerate(peaks), *((len(peaks), last) for last in peaks[-1:])]
    upper = [f"{x},{round(-gain * high)}" for x, (_, high) in points]
    lower = [f"{x},{round(-gain * low)}" for x, (low, _) in points]
    return "M" + "L".join([*upper, *reversed(lower)]) + "Z"


def _css_percent(share: float | None) -> str:
    inside = min(1.0, max(0.0, share)) if share is not None and math.isfinite(share) else 0.0
    return f"{100 * inside:.2f}%"


def _only_data(address: object) -> str:
    if not (isinstance(address, str) and address.startswith("data:image/")):
        raise ValueError(
            f"a picture must be Markup of inline_svg or a data: address; got {str(address)[:60]!r}"
        )
    return address

"""Self-contained HTML pages that are safe to open whatever text they show.

    >>> page("report.html", {"title": "Run 7", "figures": figures})

A page loads nothing from the network and runs one script, which its content security policy names by SHA-256.
Text from outside is always escaped; `templates/parts.html` says where a template may put it.
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
NO_VALUE = "–"  # shown for None and NaN
PEAK_HEIGHT = 48  # of the loudest sample; a waveform has 50 units above its middle
MAX_GAIN = 20.0  # so that near silence stays flat
ID_OK = re.compile(r"[a-z][a-z0-9-]*")

SVG = "{http://www.w3.org/2000/svg}"
#: Any other SVG element is removed with all its children.
ALLOWED_ELEMENTS = frozenset(
    SVG + name
    for name in (
        *("svg", "g", "defs", "clipPath", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon"),
        *("text", "tspan", "use", "linearGradient", "stop", "pattern", "marker", "image"),
    )
)
XLINK = "{http://www.w3.org/1999/xlink}href"
LOCAL_URL = re.compile(r"url\(\s*['\"]?#([^)'\"]*)['\"]?\s*\)")
EXTERNAL_URL = re.compile(r"url\(\s*['\"]?(?!#)|@import|expression\(|javascript:", re.IGNORECASE)
INLINE_IMAGE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=\s]*\Z")


def page(template: str, values: Mapping[str, object]) -> str:
    """The HTML of a page. `template`: a file of `templates/`. Raises for an undefined name."""
    html = _environment().get_template(template).render(dict(values))
    for character in set(html):  # in markup too, which is not escaped
        if not character.isprintable() and character != "\n":
            html = html.replace(character, printable(character))
    return html


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a data: URL. `kind`: `image/webp`, `image/png`, `image/svg+xml`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def inline_svg(source: str | bytes, prefix: str, palette: Mapping[str, str] | None = None) -> Markup:
    """An SVG as part of the page, so that it follows the light and dark themes.

    `prefix` (a-z, 0-9, -) makes its ids unique on the page. `palette` maps colours of the SVG, as written in
    it (`#1b1d1f`), to CSS variables of the page (`--ink`). Only shapes and text are kept: no script, link,
    style sheet or URL. Raises `ValueError` for anything but SVG.
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
    _sanitise(root, prefix, colours)
    for name in ("width", "height") if "viewBox" in root.attrib else ():
        root.attrib.pop(name, None)  # the page sets the size
    return Markup(re.sub(r"\s?xmlns(?::\w+)?=\"[^\"]*\"", "", _serialised(root)))


def _serialised(root: ElementTree.Element) -> str:
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _sanitise(element: ElementTree.Element, prefix: str, colours: Mapping[str, str]) -> None:
    """Remove from an SVG element all that is not shape or text."""
    for child in list(element):
        if child.tag in ALLOWED_ELEMENTS:
            _sanitise(child, prefix, colours)
        else:
            element.remove(child)
    for name, value in list(element.attrib.items()):
        del element.attrib[name]
        plain = "href" if name == XLINK else name
        if plain == "href":
            local = value.startswith("#")
            if local or (element.tag == SVG + "image" and INLINE_IMAGE.match(value)):
                element.set("href", f"#{prefix}-{value[1:]}" if local else value)
        elif not (plain.startswith(("{", "on")) or EXTERNAL_URL.search(value)):
            value = f"{prefix}-{value}" if plain == "id" else LOCAL_URL.sub(rf"url(#{prefix}-\1)", value)
            element.set(plain, _recoloured(value, colours) if plain != "d" else value)


def _recoloured(value: str, colours: Mapping[str, str]) -> str:
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: colours.get(match[0].lower(), match[0]), value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_displayed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decimal": decimal,
        "percent": lambda share: decimal(None if share is None else 100 * share, 1),
        "grouped": lambda number: NO_VALUE if number is None else f"{number:,}",
        "css_percent": _css_percent,
        "outline": outline,
        "webp": lambda content: data_uri(content, "image/webp"),
        "only_data": _only_data,
    }
    environment.tests["markup"] = lambda value: isinstance(value, Markup)
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "script": Markup(script),
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    }
    return environment


def _displayed(value: object) -> object:
    """The text of a value, before it is escaped."""
    if value is None:
        return NO_VALUE
    if isinstance(value, str) and not (isinstance(value, Markup) or value.isprintable()):
        return printable(value)
    return value


def decimal(number: float | None, places: int) -> str:
    """A number with this many decimal places; a dash for None and NaN."""
    return NO_VALUE if number is None or not math.isfinite(number) else f"{number:.{places}f}"


def outline(peaks: Sequence[tuple[float, float]]) -> str:
    """The SVG path of a waveform: (lowest, highest) sample of each slice, one unit wide."""
    loudest = max((max(-low, high) for low, high in peaks), default=0.0)
    gain = PEAK_HEIGHT * min(MAX_GAIN, 1 / loudest if loudest > 0 else MAX_GAIN)
    points = [*enumerate(peaks), *((len(peaks), last) for last in peaks[-1:])]
    upper = [f"{x},{round(-gain * high)}" for x, (_, high) in points]
    lower = [f"{x},{round(-gain * low)}" for x, (low, _) in points]
    return "M" + "L".join([*upper, *reversed(lower)]) + "Z"


def _css_percent(share: float | None) -> str:
    inside = min(1.0, max(0.0, share)) if share is not None and math.isfinite(share) else 0.0
    return f"{100 * inside:.2f}%"


def _only_data(address: object) -> str:
    if not (isinstance(address, str) and address.startswith("data:image/")):
        raise ValueError(f"an image must be Markup of inline_svg or a data: URL; got {str(address)[:60]!r}")
    return address

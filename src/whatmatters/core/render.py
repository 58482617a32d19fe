"""Rendering: HTML in which every text is escaped, and matplotlib figures as inline SVG that follow the page's light or dark colours.

Pages are made of three things from here: a jinja2 environment that cannot forget to escape, `svg` for figures, and filters that write
numbers the same way everywhere.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup

from whatmatters.core.errors import InputError

__all__ = [
    "ACCENT",
    "COLOURS",
    "INK",
    "MUTED",
    "PAPER",
    "RULE",
    "SOFT",
    "change",
    "colour_css",
    "count",
    "duration",
    "environment",
    "fixed",
    "megabytes",
    "percent",
    "printable",
    "spread",
    "styled",
    "svg",
]

# Stand-ins that figures are drawn in; in the page they become its CSS variables, so that one figure suits light and dark.
INK, MUTED, SOFT, RULE, PAPER, ACCENT = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"

COLOURS: Mapping[str, tuple[str, str, str]] = {
    INK: ("ink", "#1d2126", "#e9e7e2"),
    MUTED: ("muted", "#5b626a", "#a3a9b0"),
    SOFT: ("soft", "#9aa0a6", "#6d747c"),
    RULE: ("rule", "#dfdcd5", "#343941"),
    PAPER: ("paper", "#fdfcfa", "#15181c"),
    ACCENT: ("accent", "#1f57b8", "#82b1ff"),
}
"""Of each stand-in: the CSS variable, its colour on a light page and on a dark one. One accent, told apart from greys by all eyes; ink,
muted and accent have at least 4.5 : 1 against the paper."""

MINUS, SPACE, DASH = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}", "\N{EN DASH}"

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp at any zoom, searchable, in the page's own font
    "text.parse_math": False,
    "font.size": 12.0,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
}


def environment(package: str) -> jinja2.Environment:
    """Templates of a package's `templates` folder; everything put into them is escaped, and a name that is missing raises.

    Args:
        package: the dotted name of the package.

    Example:
        >>> environment("whatmatters.pages").from_string("{{ text }}").render(text="<script>")
        '&lt;script&gt;'
    """
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "change": change,
        "count": count,
        "duration": duration,
        "fixed": fixed,
        "megabytes": megabytes,
        "percent": percent,
        "printable": printable,
        "spread": spread,
    }
    return made


def colour_css() -> Markup:
    """The CSS variables of `COLOURS` for light and dark pages."""
    light = "".join(f"--{name}:{colour};" for name, colour, _ in COLOURS.values())
    dark = "".join(f"--{name}:{colour};" for name, _, colour in COLOURS.values())
    return Markup(f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}")


def styled() -> AbstractContextManager[None]:
    """matplotlib's settings for figures of a page, for the length of a `with`; the user's own are back afterwards."""
    import matplotlib

    return matplotlib.rc_context(cast(Any, _STYLE))


def svg(
    paint: Callable[[Any], None], *, name: str, width: float | int, height: float | int, title: str, description: str, class_name: str = ""
) -> Markup:
    """A figure as an `<svg>` element to be put into a page.

    The same figure gives the same text: no dates, no versions. Nothing in it refers to anything outside it, names of other
    figures in the page included.

    Args:
        paint: draws on the matplotlib `Figure` it is given, in `INK`, `ACCENT` and the other stand-ins.
        name: begins the ids inside, so letters, digits and hyphens; unique in its page.
        width: in CSS pixels at which text has its nominal size.
        height: in CSS pixels.
        title: what a screen reader says first.
        description: what the figure shows, in words.
        class_name: CSS class of the element.

    Raises:
        InputError: the name is not made of letters, digits and hyphens.

    Example:
        >>> str(svg(lambda figure: None, name="a", width=10, height=5, title="<b>", description=""))[:60]
        '<svg viewBox="0 0 10 5" role="img" aria-labelledby="a-title '
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise InputError(f"figure name {name!r:.40}; expected letters, digits and hyphens")
    from matplotlib.figure import Figure

    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the page's fonts are used, not matplotlib's
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    drawn = ElementTree.fromstring(printable(file.getvalue()))
    root = ElementTree.Element(
        "svg",
        {
            "viewBox": drawn.attrib["viewBox"],
            "role": "img",
            "aria-labelledby": f"{name}-title {name}-description",
            **({"class": class_name} if class_name else {}),
        },
    )
    ElementTree.SubElement(root, "title", id=f"{name}-title").text = printable(title)
    ElementTree.SubElement(root, "desc", id=f"{name}-description").text = printable(description)
    names: dict[str, str] = {}  # matplotlib's ids are hashes with a random salt: numbered here, in the order they are met
    wanted = {m for value in _values(drawn) for m in re.findall(r"(?:url\(#|^#)([^)]+)", value)}
    for child in drawn:
        if _local(child.tag) != "metadata":
            root.append(_plain(child, wanted, names, name))
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _follow(value, names))
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _values(root: ElementTree.Element) -> list[str]:
    return [value for element in root.iter() for key, value in element.attrib.items() if _local(key) in ("href", "clip-path", "style")]


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _plain(element: ElementTree.Element, wanted: set[str], names: dict[str, str], prefix: str) -> ElementTree.Element:
    """A copy without namespaces, style sheets (which would apply to the whole page), fonts and ids that nothing refers to."""
    copy = ElementTree.Element(_local(element.tag))
    for key, value in element.attrib.items():
        if key == "id":
            if value in wanted:
                copy.set("id", names.setdefault(value, f"{prefix}-{len(names)}"))
        elif _local(key) == "style":
            copy.set("style", _style(value))
        else:
            copy.set(_local(key), re.sub(r"\s+", " ", value).strip())
    copy.text, copy.tail = (element.text if _local(element.tag) == "text" else None), None
    copy.extend(_plain(child, wanted, names, prefix) for child in element if _local(child.tag) != "style")
    return copy


def _style(value: str) -> str:
    kept = [part.strip() for part in value.split(";") if part.strip() and not part.strip().startswith("font-family")]
    text = ";".join(kept)
    for colour, (variable, _, _) in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def _follow(value: str, names: Mapping[str, str]) -> str:
    """References to the ids as they are called now."""
    return re.sub(r"(url\(#|^#)([^)]+)", lambda m: m[1] + names.get(m[2], m[2]), value)


def printable(text: str) -> str:
    """Text without control characters (line ends and tabs stay), which neither XML nor HTML can hold.

    Example:
        >>> printable("a\\x00b")
        'a\N{REPLACEMENT CHARACTER}b'
    """
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", text)


def fixed(value: float | int | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals; a dash for None.

    Example:
        >>> fixed(-1.005), fixed(None)
        ('−1.00', '–')
    """
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "\N{INFINITY}" if value > 0 else f"{MINUS}\N{INFINITY}" if value < 0 else "NaN"
    text = f"{value:,.{digits}f}"
    zero = not text.strip("-0.,")
    return text.replace("-", "" if zero else MINUS)


def count(value: int) -> str:
    """A whole number with thousands apart.

    Example:
        >>> count(5770496)
        '5,770,496'
    """
    return f"{value:,}"


def megabytes(value: int | None) -> str:
    """Bytes as MB (millions), three digits that mean something, GB from a billion.

    Example:
        >>> megabytes(4_227_121)
        '4.23\N{NO-BREAK SPACE}MB'
    """
    if value is None:
        return DASH
    amount, unit = (value / 1e9, "GB") if value >= 999_500_000 else (value / 1e6, "MB")
    return f"{fixed(amount, 0 if amount >= 100 else 1 if amount >= 10 else 2)}{SPACE}{unit}"


def percent(value: float | int | None, digits: int = 1) -> str:
    """A share as a percentage.

    Example:
        >>> percent(0.5)
        '50.0\N{NO-BREAK SPACE}%'
    """
    return DASH if value is None else f"{fixed(100 * value, digits)}{SPACE}%"


def change(value: float | int | None, digits: int = 1) -> str:
    """A change that is in percent already, with its sign.

    Example:
        >>> change(2.34)
        '+2.3\N{NO-BREAK SPACE}%'
    """
    if value is None:
        return DASH
    text = fixed(value, digits)
    signed = "" if text.startswith(MINUS) or not text.strip("0.") else "+"
    return f"{signed}{text}{SPACE}%"


def spread(low: float | int | None, high: float | int | None, digits: int = 1, unit: str = f"{SPACE}%") -> str:
    """An interval of changes.

    Example:
        >>> spread(1.92, 2.78)
        '+1.9 to +2.8\N{NO-BREAK SPACE}%'
    """
    if low is None or high is None:
        return DASH
    bounds = [change(value, digits).removesuffix(f"{SPACE}%") for value in (low, high)]
    return f"{bounds[0]} to {bounds[1]}{unit}"


def duration(seconds: float | int | None) -> str:
    """A time as a person says it.

    Example:
        >>> duration(0.031), duration(75), duration(7260)
        ('31\N{NO-BREAK SPACE}ms', '1\N{NO-BREAK SPACE}min 15\N{NO-BREAK SPACE}s', '2\N{NO-BREAK SPACE}h 1\N{NO-BREAK SPACE}min')
    """
    if seconds is None:
        return DASH
    if seconds < 0.9995:
        return f"{round(1000 * seconds)}{SPACE}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {left}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"

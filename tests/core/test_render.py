"""Rendering: nothing gets out unescaped, figures follow the page and are the same every time, numbers read as they should."""

import math
import re
from html.parser import HTMLParser

import jinja2
import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whatmatters.core import render
from whatmatters.core.errors import InputError
from whatmatters.core.render import ACCENT, COLOURS, INK, environment, svg

HOSTILE = '"><script>alert(1)</script>&amp;$x^2$\x00\x1b]]>--><!--'


class Elements(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def figure(paint=None, **changed):
    def plain(drawn):
        axes = drawn.add_subplot()
        axes.plot([0, 1], [2, 3], color=ACCENT, clip_on=True)
        axes.set_title("title", color=INK)

    return svg(paint or plain, **({"name": "one", "width": 200, "height": 100, "title": "t", "description": "d"} | changed))


def test_templates_escape_whatever_they_are_given():
    made = environment("whatmatters.pages").from_string("<p title='{{ text }}'>{{ text }}</p>{{ number | fixed }}")
    parsed = Elements(made.render(text=HOSTILE, number=1.5))
    assert [tag for tag, _ in parsed.tags] == ["p"]
    assert "<script>alert(1)</script>" in parsed.tags[0][1]["title"]
    assert parsed.text.startswith('"><script>alert(1)</script>&amp;$x^2$')
    assert parsed.text.endswith("1.50")


def test_a_missing_name_raises():
    with pytest.raises(jinja2.UndefinedError):
        environment("whatmatters.pages").from_string("{{ absent }}").render()


def test_figures_escape_titles_descriptions_and_labels():
    def paint(drawn):
        axes = drawn.add_subplot()
        axes.set_title(HOSTILE)
        axes.set_xticks([0], [HOSTILE])
        axes.annotate(HOSTILE, (0, 0))

    made = figure(paint, title=HOSTILE, description=HOSTILE, width=2000, height=1500)
    tags = {tag for tag, _ in Elements(made).tags}
    assert "script" not in tags
    assert "<!--" not in made
    assert made.count("&lt;script&gt;") == 5
    assert "$x^2$" in made  # not taken for mathematics
    assert "\x00" not in made
    assert "\x1b" not in made


def test_a_figure_is_one_element_without_anything_from_outside():
    made = figure()
    assert made.startswith("<svg ")
    assert made.endswith("</svg>")
    parsed = Elements(made)
    assert not {tag for tag, _ in parsed.tags} & {"style", "metadata", "image", "script", "link"}
    assert "http" not in made
    assert "font-family" not in made
    assert "DOCTYPE" not in made
    root = parsed.tags[0][1]
    assert root["role"] == "img"
    ids = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    assert set(root["aria-labelledby"].split()) <= ids
    assert "width" not in root  # the page decides


def test_every_reference_of_a_figure_is_to_an_id_in_it():
    def paint(drawn):
        axes = drawn.add_subplot()
        axes.scatter([0, 1], [0, 1])
        axes.plot([0, 5], [0, 5])
        axes.set_xlim(0, 1)

    made = figure(paint, name="some-name")
    ids = re.findall(r'\bid="([^"]+)"', made)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', made)
    assert used
    assert {a or b for a, b in used} <= set(ids)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("some-name-") for name in ids)


def test_the_same_figure_gives_the_same_text_and_two_names_share_no_id():
    assert figure() == figure()
    one, two = (set(re.findall(r'\bid="([^"]+)"', figure(name=name))) for name in ("one", "two"))
    assert not one & two


def test_colours_become_variables_of_the_page():
    made = figure()
    assert "var(--accent)" in made
    assert "var(--ink)" in made
    assert not re.search(r"#0102[0-9a-f]{2}", made)
    css = render.colour_css()
    for name, light, dark in COLOURS.values():
        assert f"--{name}:{light}" in css
        assert f"--{name}:{dark}" in css


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a, b):
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("colour", [render.INK, render.MUTED, render.ACCENT])
def test_text_colours_have_the_contrast_that_wcag_asks_for(colour, which):
    assert _contrast(COLOURS[colour][which], COLOURS[render.PAPER][which]) >= 4.5


def test_figures_leave_the_users_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    figure()
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ZeroDivisionError):
        figure(lambda drawn: 1 / 0)
    assert dict(matplotlib.rcParams) == before
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("name", ["", "1a", "a b", 'a"', "a<"])
def test_names_of_figures_are_checked(name):
    with pytest.raises(InputError, match="figure name"):
        figure(name=name)


@given(st.floats(-1e9, 1e9), st.integers(0, 4))
def test_fixed_reads_back_as_the_rounded_number(value, digits):
    told = render.fixed(value, digits)
    assert float(told.replace(",", "").replace("−", "-")) == pytest.approx(round(value, digits), abs=10.0**-digits * 0.51)
    assert told not in {"−0", "−0.0", "−0.00"}


@given(st.integers(1, 10**13))
@settings(max_examples=200)
def test_megabytes_are_right_to_one_percent(value):
    number, unit = render.megabytes(value).split("\N{NO-BREAK SPACE}")
    told = float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]
    assert told == pytest.approx(value, rel=0.01, abs=5000)


@given(st.floats(0, 3e6))
def test_durations_are_right(value):
    told = render.duration(value)
    units = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600}
    parts = told.replace("\N{NO-BREAK SPACE}", " ").split()
    total = sum(float(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))
    assert total == pytest.approx(value, rel=0.01, abs=31 if value >= 3600 else 0.051)


def test_signs_and_missing_values():
    assert render.change(0.0) == "0.0\N{NO-BREAK SPACE}%"
    assert render.change(-0.04) == "0.0\N{NO-BREAK SPACE}%"
    assert render.change(-2.5) == "−2.5\N{NO-BREAK SPACE}%"
    assert render.spread(-1.0, 2.0) == "−1.0 to +2.0\N{NO-BREAK SPACE}%"
    assert [f(None) for f in (render.fixed, render.change, render.percent, render.megabytes, render.duration)] == ["–"] * 5
    assert render.spread(None, 1.0) == "–"
    assert render.fixed(math.inf) == "∞"
    assert render.fixed(math.nan) == "NaN"


@given(st.text())
def test_printable_text_fits_xml(text):
    from xml.etree import ElementTree

    clean = render.printable(text)
    element = ElementTree.Element("a")
    element.text = clean
    read = ElementTree.fromstring(ElementTree.tostring(element, encoding="unicode")).text or ""
    assert read == clean.replace("\r\n", "\n").replace("\r", "\n")

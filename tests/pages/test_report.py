"""The page: nothing unescaped, nothing from outside, the same every time, and it says what the numbers say."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from whatmatters.core.errors import FileError, FormatError
from whatmatters.pages.naming import Naming, ranges
from whatmatters.pages.report import page, render, verdict
from whatmatters.pages.results import Command, Continuation, Model, Site, Token, Tokens

HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>&lt;{{ 7*7 }}\x00"
VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """Elements with attributes, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts, self.mistakes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID - {"path", "use", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        return "".join(data for tag, data in self.texts if tag not in ("style", "script"))


def spoiled(value):
    """The same results with hostile text wherever text is free."""
    return dataclasses.replace(
        value,
        title=HOSTILE,
        reason=HOSTILE,
        prompt=HOSTILE,
        interpreter=HOSTILE,
        model=Model(
            HOSTILE,
            1,
            tuple(f"{block}{HOSTILE}" for block in value.model.blocks),
            tuple(Site(f"{value.model.blocks[s.block]}{HOSTILE}{s.name}", s.block, s.size) for s in value.model.sites),
        ),
        texts=tuple(dataclasses.replace(t, used_for=HOSTILE, source=HOSTILE, digest=HOSTILE) for t in value.texts),
        audit=dataclasses.replace(
            value.audit,
            how=HOSTILE,
            verdict=HOSTILE,
            best=None,
            units=tuple(tuple(f"{_block(name)}{HOSTILE}{name}" for name in unit) for unit in value.audit.units),
            scorers=tuple(dataclasses.replace(s, name=s.name + HOSTILE) for s in value.audit.scorers),
            curves=tuple(dataclasses.replace(c, name=HOSTILE) for c in value.audit.curves),
        ),
        arms=tuple(
            dataclasses.replace(a, label=HOSTILE, note=HOSTILE, levels={f"{_block(n)}{HOSTILE}{n}": b for n, b in a.levels.items()})
            for a in value.arms
        ),
        continuations=tuple(Continuation(c.arm, HOSTILE) for c in value.continuations),
        tokens=Tokens(HOSTILE, 0, HOSTILE, (Token(HOSTILE, 1.0), Token("", 0.0))),
        reload=dataclasses.replace(value.reload, path=HOSTILE),
        stages=tuple(dataclasses.replace(s, name=HOSTILE) for s in value.stages),
        settings={HOSTILE: {HOSTILE: [HOSTILE]}},
        versions={HOSTILE: HOSTILE},
        commands=(Command(HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
    )


def _block(name):
    return ".".join(name.split(".")[:3])


def test_the_page_opens_offline_and_is_well_formed(html):
    parsed = Page(html)
    assert not parsed.mistakes
    assert not parsed.open
    assert not {tag for tag, _ in parsed.elements} & {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "image"}
    for tag, attributes in parsed.elements:
        for key in ("src", "srcset", "action", "data", "poster", "background"):
            assert key not in attributes, tag
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#"), tag
        assert not any(key.startswith("on") for key in attributes)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1


def test_hostile_text_stays_text(results, html):
    spoilt = page(spoiled(results))
    clean, dirty = Page(html), Page(spoilt)
    assert not dirty.mistakes
    assert sum(tag == "script" for tag, _ in dirty.elements) == 1
    assert {tag for tag, _ in dirty.elements} <= {tag for tag, _ in clean.elements}
    assert not any(key.startswith("on") or key == "src" for _, attributes in dirty.elements for key in attributes)
    assert dirty.text.count("<script>alert(1)</script>") > 60
    assert "{{ 7*7 }}" in dirty.text
    assert "\x00" not in spoilt


def test_the_same_results_give_the_same_bytes(results, html, tmp_path):
    results.save(tmp_path / "a")
    first = render(tmp_path / "a")
    assert first == tmp_path / "a" / "report.html"
    assert first.read_bytes() == html.encode()
    assert render(tmp_path / "a").read_bytes() == html.encode()


def test_ids_are_unique_and_what_labels_refer_to_exists(html):
    elements = Page(html).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
        if "href" in attributes:
            assert attributes["href"][1:] in ids


def test_figures_tell_what_they_show_in_words_at_both_widths(results, html):
    parsed = Page(html)
    figures = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert sorted(f["class"] for f in figures) == ["narrow"] * 5 + ["wide"] * 5
    assert all(f["role"] == "img" for f in figures)
    told = [data for tag, data in parsed.texts if tag == "desc"]
    for arm in results.arms[1:]:
        assert any(arm.label in text for text in told)
    for scorer in results.audit.scorers:
        assert any(f"{scorer.name} {scorer.correlation:.2f}".replace("-0", "−0") in text for text in told)


def test_tables_have_heads_and_scrolling_parts_can_be_reached_by_keys(html):
    assert html.count("<table") == html.count("<thead>")
    for _, attributes in Page(html).elements:
        if attributes.get("class") in ("scroll", "code"):
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


def test_the_verdict_says_size_damage_interval_who_paid_and_that_it_is_not_faster(results, html):
    told = str(verdict(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert "From 11.9 MB to 4.45 MB, 63 % smaller; perplexity +1.1 % (95 % interval +0.5 to +1.8 %)." in told
    assert "4 of 42 sites paid most, at 2 bits: mlp.up_proj in blocks 2–5." in told
    assert "6 kept 8 bits: self_attn.v_proj in every block." in told
    assert "smaller, not faster" in told
    assert told in Page(html).text.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ")


def test_the_verdict_of_equal_bits_and_of_one_document(results, replaced):
    uniform = replaced(results, best="gptq-3")
    assert "“GPTQ, 3 bits”: all 42 sites paid alike, at 3 bits." in str(verdict(uniform))
    one = replaced(results, arms=tuple(replaced(a, low=None, high=None) for a in results.arms))
    assert "interval" not in verdict(one).headline
    assert "<svg" in page(one)


def test_no_score_to_trust_is_shown_as_such(results, replaced):
    audit = replaced(results.audit, best=None, verdict="No score can be told from a random order.", ceiling=None)
    assert "No score can be told from a random order." in page(replaced(results, audit=audit))


def test_parts_that_a_run_did_not_do_are_left_out(results, replaced):
    audit_only = page(replaced(results, arms=(), best=None, continuations=(), reload=None, tokens=None, commands=()))
    for heading in ("Size against perplexity", "Which tokens matter", "The same prompt", "What to do next"):
        assert heading not in audit_only
    assert results.audit.verdict in audit_only
    arms_only = page(replaced(results, audit=None, texts=(), stages=(), notes=(), interpreter=None))
    assert "What matters</h2>" not in arms_only
    assert "Size against perplexity" in arms_only
    dense = replaced(results, arms=results.arms[:1], best="dense", continuations=(), reload=None, audit=None)
    assert "<h1>" in page(dense)


def test_line_ends_at_the_beginning_of_a_text_are_kept(results, replaced):
    html = page(replaced(results, continuations=(Continuation("dense", "\n\nabc"),), prompt="\nprompt"))
    parsed = Page(html)
    shown = [data for tag, data in parsed.texts if tag == "pre"]
    # a browser drops the first line end of a <pre>; html.parser keeps it
    assert "\n\n\nabc" in shown
    assert "\n\nprompt" in shown


def test_a_checkpoint_that_reloads_to_the_last_bit_is_said_to(results, replaced):
    exact = page(replaced(results, reload=replaced(results.reload, difference=0.0)))
    assert "to the last bit" in exact
    assert "0.0e+00" not in exact


def test_every_number_of_the_arms_is_in_the_table(results, html):
    text = Page(html).text.replace("\N{NO-BREAK SPACE}", " ")
    for arm in results.arms:
        assert f"{arm.perplexity:.2f}" in text
        assert arm.label in text
    assert "2.3e-06" in text
    for value in (results.interpreter, *results.versions.values(), results.prompt.strip(), *(c.command for c in results.commands)):
        assert value in text
    assert all(text_part.digest[:16] in text for text_part in results.texts)


def test_many_blocks_are_shown_by_block(results, replaced):
    blocks = tuple(f"h.{i}" for i in range(40))
    sites = tuple(Site(f"{block}.{part}", i, 10) for i, block in enumerate(blocks) for part in ("a", "b"))
    units = tuple((site.name,) for site in sites)
    damage = tuple(float(i % 7) for i in range(len(units)))
    scorers = tuple(replaced(s, values=damage) for s in results.audit.scorers)
    audit = replaced(results.audit, units=units, damage=damage, scorers=scorers)
    wide = replaced(results, model=Model("m", 800, blocks, sites), audit=audit, arms=(), best=None, continuations=(), reload=None)
    heat = re.search(r'<svg [^>]*aria-labelledby="heat-wide.*?</svg>', page(wide), re.DOTALL)[0]
    assert heat.count("fill-opacity") >= 40 * (len(scorers) + 1)
    assert heat.count("fill-opacity") < 80 * (len(scorers) + 1)


def test_malformed_results_make_no_page(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FormatError, match=r"results\.json"):
        render(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(FileError):
        render(tmp_path / "absent")


def test_names_are_short_and_say_where(results):
    naming = Naming(results.model)
    assert naming.part("model.layers.3.mlp.down_proj") == "mlp.down_proj"
    assert naming.part("model.layers.3") == "whole block"
    assert naming.block("model.layers.3") == naming.block("model.layers.3.mlp.up_proj") == 3
    assert naming.unit([f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]) == "self_attn.q_proj + k_proj + v_proj"
    assert naming.size(["model.layers.0"]) == sum(s.size for s in results.model.sites if s.block == 0)
    assert naming.size(["model.layers.0.mlp.up_proj"]) == 196608
    assert ranges([5, 0, 1, 2, 2, 7, 8]) == "0–2, 5, 7, 8"

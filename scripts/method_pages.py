"""Put what was measured into the pages of docs/methods: tables between two markers, and the figures in docs/assets.

    python scripts/method_pages.py            # after `whatmatters reproduce`, which writes evidence/*.json
    python scripts/method_pages.py --check    # exit status 1 if a page or a figure is not that of the evidence

The words of the pages are written by hand; every number between the markers comes from evidence/.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whatmatters.core.render import ACCENT, COLOURS, INK, MUTED, RULE, SOFT, svg

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DRAWS, DOCUMENTS = " (over calibration draws)", " (over documents)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something would change")
    check = parser.parse_args().check
    stale = [path for path, text in made().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(made()[path], encoding="utf-8")
    sys.exit(1 if check and stale else 0)


def made() -> dict[Path, str]:
    """Every page and figure as it should be: three with tables of their own, the others with what all evidence has."""
    records = {path.stem: evidence(path.stem) for path in sorted((ROOT / "evidence").glob("*.json"))}
    own = {
        "rsq": (rsq_page, rsq_figure), "layerwise-quant": (layers_page, layers_figure),
        "composability": (composability_page, composability_figure),
    }  # fmt: skip
    result = {ROOT / "docs" / "assets" / "composability.json": (ROOT / "evidence" / "composability.json").read_text(encoding="utf-8")}
    for name, record in records.items():
        page, figure = own.get(name, (claims_page, claims_figure))
        path = ROOT / "docs" / "methods" / f"{name}.md"
        if name not in own and not (path.is_file() and BEGIN in path.read_text(encoding="utf-8")):
            continue  # a page that is still to be written, or that tells its numbers itself
        if (ROOT / "scripts" / f"{name.replace('-', '_')}_page.py").is_file():
            continue  # a page with a script of its own
        text = page(record)
        result[path] = re.sub(
            f"{BEGIN}.*{END}", lambda _, text=text: f"{BEGIN}\n\n{text}\n{END}", path.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        asset = "verdicts-" + name if name not in own else name
        result[ROOT / "docs" / "assets" / f"{asset}.svg"] = figure(record)
    return result


def evidence(slug: str) -> dict[str, Any]:
    return json.loads((ROOT / "evidence" / f"{slug}.json").read_text(encoding="utf-8"))


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(value: float) -> str:
    return f"{value:+.2f} %"


def spread(pair: Sequence[float]) -> str:
    return f"{pair[0]:+.2f} to {pair[1]:+.2f}"


def relative(value: float) -> float:
    """A difference of log perplexity as a change of perplexity in percent."""
    return 100 * float(np.expm1(value))


def verdicts(claims: Sequence[Mapping[str, Any]], *, strip: str = "") -> str:
    """A row for each claim: verdict, effect and interval; the two intervals of one claim side by side."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for claim in claims:
        name, kind = claim["claim"], "only"
        for ending in (DRAWS, DOCUMENTS):
            if name.endswith(ending):
                name, kind = name.removesuffix(ending), ending
        rows.setdefault(name.removeprefix(strip), {})[kind] = claim
    paired = any(DRAWS in row for row in rows.values())
    if not paired:
        lines = [[name, f"**{r['only']['verdict']}**", number(r["only"]["effect"]), between(r["only"])] for name, r in rows.items()]
        return table(["claim", "verdict", "effect", "95 % interval"], lines)
    lines = []
    for name, row in rows.items():
        documents = row.get(DOCUMENTS, row.get("only", {}))
        draws = f"**{row[DRAWS]['verdict']}** {between(row[DRAWS])}" if DRAWS in row else ""
        lines.append([name, number(documents["effect"]), draws, f"**{documents['verdict']}** {between(documents)}"])
    return table(["claim", "effect", "over calibration draws", "over documents"], lines)


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def between(claim: Mapping[str, Any]) -> str:
    return "" if claim.get("interval") is None else f"{claim['interval'][0]:+.4f} to {claim['interval'][1]:+.4f}"


def counted(record: Mapping[str, Any]) -> str:
    """How many claims of each tier came out how."""
    found: dict[str, dict[str, int]] = {}
    for claim in record["claims"]:
        tier = found.setdefault(claim["tier"], {})
        tier[claim["verdict"]] = tier.get(claim["verdict"], 0) + 1
    kinds = ("shown", "refuted", "inconclusive")
    return table(["tier", *kinds], [[tier, *(str(own.get(kind, 0)) for kind in kinds)] for tier, own in found.items()])


def origin(record: Mapping[str, Any]) -> str:
    software = record["versions"]
    return (
        f"Seeds {record['seeds'][0]} to {record['seeds'][-1]}, {record['seconds']:.0f} seconds, Python {software['python']}, "
        f"torch {software['torch']}, transformers {software['transformers']}. Every number: `evidence/{record['slug']}.json`.\n"
    )


def subjects(record: Mapping[str, Any]) -> list[str]:
    return [name for name, result in record["results"].items() if isinstance(result, dict) and "dense_perplexity" in result]


def group(size: int) -> str:
    return "one scale per output channel" if size == -1 else f"groups of {size}"


def rsq_page(record: Mapping[str, Any]) -> str:
    parts = [
        counted(record),
        "### Identities, planted tokens, costs\n",
        verdicts([c for c in record["claims"] if c["tier"] not in ("desk", "public")]),
    ]
    for name in subjects(record):
        result = record["results"][name]
        parts.append(
            f"### {name}\n\n{result['calibration_tokens']:,} calibration tokens a draw, {len(result['draws'])} draws, "
            f"{group(result['group_size'])}; {result['test_documents']} held-out documents with {result['test_tokens']:,} tokens. "
            f"Perplexity of the model as it is: {result['dense_perplexity']:.3f}.\n"
        )
        parts.append(table(
            ["arm", "bits", "perplexity", "change to dense", "95 % interval over documents", "draws", "processor seconds"],
            [[arm["arm"], str(arm["bits"]), f"{arm['perplexity']:.3f}", percent(arm["change_percent"]), spread(arm["interval_percent"]),
              f"{min(arm['by_draw']):.3f} to {max(arm['by_draw']):.3f}", f"{arm['processor_seconds']:.1f}"] for arm in result["arms"]],
        ))  # fmt: skip
        for bits in sorted({arm["bits"] for arm in result["arms"]}, reverse=True):
            at = f"{name}, {bits} bits: log perplexity of "
            parts.append(verdicts([c for c in record["claims"] if c["claim"].startswith(at)], strip=at))
        other = result["settings_on_validation"]
        parts.append(
            f"Other settings of RSQ on validation text ({other['draws']} draws), against rotate+GPTQ there; nothing was chosen by them:\n"
        )
        parts.append(table(
            ["setting", *(f"{bits} bits" for bits in sorted({row["bits"] for row in other["rows"]}, reverse=True))],
            [[setting, *(f"{percent(relative(row['to_rotate_gptq']))} ({spread([relative(v) for v in row['interval']])})" for row in rows)]
             for setting, rows in by_setting(other["rows"]).items()],
        ))  # fmt: skip
    return "\n".join([*parts, origin(record)])


def claims_page(record: Mapping[str, Any]) -> str:
    """What all evidence has: the count of verdicts, and every claim by tier."""
    parts = [counted(record)]
    for tier in dict.fromkeys(claim["tier"] for claim in record["claims"]):
        parts.append(f"### {tier.capitalize()}\n")
        parts.append(verdicts([c for c in record["claims"] if c["tier"] == tier]))
    if record.get("differs_from_paper"):
        parts.append("What differs from the paper's setting:\n\n" + "\n".join(f"- {line}" for line in record["differs_from_paper"]) + "\n")
    return "\n".join([*parts, origin(record)])


def by_setting(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        (setting,) = (f"`{k}={v!r}`" for k, v in row.items() if k not in ("bits", "perplexity", "to_rotate_gptq", "interval"))
        found.setdefault(setting, []).append(row)
    return found


def layers_page(record: Mapping[str, Any]) -> str:
    parts = [
        counted(record),
        "### Closed forms and arithmetic\n",
        verdicts([c for c in record["claims"] if c["tier"] not in ("desk", "public")]),
    ]
    for name in subjects(record):
        result = record["results"][name]
        orders = result["orders"]
        parts.append(
            f"### {name}\n\n{result['blocks']} blocks, {group(result['group_size'])}, asymmetric; {result['test_documents']} held-out "
            f"documents with {result['test_tokens']:,} tokens; perplexity of the model as it is: {result['dense_perplexity']:.3f}. "
            f"Least important first, counted from 0: LIM {orders['LIM'][0]} "
            f"({len({tuple(order) for order in orders['LIM']})} distinct in {len(orders['LIM'])} draws), ZD {orders['ZD']}. "
            f"Judged among {result['population']}.\n"
        )
        for level in result["levels"]:
            high, low = level["levels"]
            better = level["share_of_orders_that_are_better"]
            means = sorted(level["mean_log_perplexity"].items(), key=lambda item: item[1])
            parts.append(f"{high} to {low} bits, mean over the number of lowered layers:\n")
            parts.append(table(
                ["order", "geometric mean of perplexity", "orders that are better"],
                [[order, f"{np.exp(loss):.3f}", f"{100 * better[order]['share']:.1f} %" if order in better else ""]
                 for order, loss in means],
            ))  # fmt: skip
            ranks = ", ".join(f"{r['rank']} of {r['sets']} with {r['lowered']} lowered" for r in level["rank_among_sets"])
            parts.append(f"Rank of LIM's set among all sets: {ranks}.\n")
        dropping = result["dropping"]
        parts.append(table(
            ["layers, LIM order", *map(str, dropping["layers"])],
            [[kind, *(f"{np.exp(loss):.2f}" for loss in losses)] for kind, losses in dropping["log_perplexity"].items()],
        ))  # fmt: skip
        parts.append(table(
            ["quantizer at an average of 3 bits", "LIM", "reverse LIM"],
            [[backend, *(f"{row['perplexity']:.3f}" for row in result["backends"] if row["backend"] == backend)]
             for backend in dict.fromkeys(row["backend"] for row in result["backends"])],
        ))  # fmt: skip
        parts.append(verdicts([c for c in record["claims"] if c["claim"].startswith(name)], strip=f"{name}, "))
    return "\n".join([*parts, origin(record)])


def composability_page(record: Mapping[str, Any]) -> str:
    quantizers = list(dict.fromkeys(row["quantizer"] for row in record["layers"]))
    parts = [
        f"{record['subject']}, perplexity {record['dense_perplexity']:.3f} as it is, judged on {record['test_documents']} held-out "
        f"documents ({record['test_tokens']:,} tokens); {record['calibration_tokens']:,} calibration tokens; levels "
        f"{', '.join(map(str, record['levels']))}, {group(record['group_size'])}. Cells: change of the perplexity in percent, with its "
        "95 % interval over documents.\n"
    ]
    for budget, by in ((budget, by) for budget in record["budgets"] for by in ("site", "block")):
        own = [row for row in record["layers"] if row["budget"] == budget and row["by"] == by]
        cells = {(row["scorer"], row["quantizer"]): row for row in own}
        names = sorted({row["scorer"] for row in own}, key=lambda name: (cells[name, "GPTQ"]["change_percent"], name))
        parts.append(f"### Average of {budget} stored bits, by {'group of tied sites' if by == 'site' else 'block'}\n")
        rows = [
            [f"{name}{' (control, mean of draws)' if cells[name, quantizers[0]]['control'] else ''}", cells[name, quantizers[0]]["how"],
             f"{cells[name, quantizers[0]]['stored']:.3f}", *(cell(cells[name, q]) for q in quantizers)]
            for name in names
        ]  # fmt: skip
        for bits, size in sorted({(row["bits"], row["group_size"]) for row in record["uniform"]}):
            same = [row for row in record["uniform"] if (row["bits"], row["group_size"]) == (bits, size)]
            if abs(same[0]["stored"] - budget) < 0.26:
                rows.append([f"*uniform {bits} bits, groups of {size}*", "", f"{same[0]['stored']:.3f}", *(cell(row) for row in same)])
        parts.append(table(["layer scorer", "allocation", "stored bits", *quantizers], rows))
        same_plan: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            if not cells[name, quantizers[0]]["control"]:
                same_plan.setdefault(tuple(cells[name, quantizers[0]]["bits"]), []).append(name)
        alike = "; ".join(", ".join(group) for group in same_plan.values() if len(group) > 1)
        parts.append(f"Scorers that came to the same plan: {alike or 'none'}.\n")
    parts.append("Seconds to score by site: " + ", ".join(f"{k} {v:.1f}" for k, v in record["scoring_seconds"].items()) + ".\n")
    parts.append(f"### Token scorers in RSQ, 3 bits, {len(record['seeds'])} calibration draws\n")
    parts.append(table(
        ["token scorer", "perplexity", "change to dense", "change to uniform weights", "95 % interval", "draws better than uniform"],
        [[row["scorer"], f"{row['perplexity']:.3f}", percent(row["change_percent"]), percent(relative(row["to_uniform"])),
          spread([relative(value) for value in row["interval"]]), f"{row['draws_better_than_uniform']} of {len(row['by_draw'])}"]
         for row in sorted(record["tokens"], key=lambda row: row["perplexity"])],
    ))  # fmt: skip
    allocators = record["allocators"]
    parts.append("### Allocators on the loss table of `quantization-error`\n")
    parts.append(table(
        ["allocator", "budgets", "worse than the optimum", "largest excess of predicted loss", "mean excess"],
        [[row["allocator"], str(row["budgets"]), str(row["worse_than_optimum"]),
          f"{row['largest_excess_percent']:.2f} % (at {row['at_budget']} bits)", f"{row['mean_excess_percent']:.2f} %"]
         for row in allocators["predicted"]],
    ))  # fmt: skip
    parts.append(table(
        ["allocator, measured with RTN", "stored bits", "predicted loss", "change of perplexity"],
        [[row["allocator"], str(row["budget"]), number(row["predicted_loss"]), cell(row)] for row in allocators["measured_with_RTN"]],
    ))  # fmt: skip
    parts.append("All numbers: [composability.json](../assets/composability.json).\n")
    return "\n".join(parts)


def cell(row: Mapping[str, Any]) -> str:
    low, high = row["interval_percent"]
    return f"{row['change_percent']:+.1f} ({low:+.1f} to {high:+.1f})"


# Figures: files of their own, which follow the reader's light or dark preference as the pages do


def figure(paint: Callable[[Any], None], name: str, width: float, height: float, title: str, description: str) -> str:
    inline = str(svg(paint, name=name, width=width, height=height, title=title, description=description))
    light = "".join(f"--{variable}:{colour};" for variable, colour, _ in COLOURS.values())
    dark = "".join(f"--{variable}:{colour};" for variable, _, colour in COLOURS.values())
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}text{{font-family:system-ui,sans-serif}}</style>"
    opened = inline.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" ', 1)
    return opened.replace(">", f">{style}", 1) + "\n"


def claims_figure(record: Mapping[str, Any]) -> str:
    """How many claims of each tier came out how."""
    kinds = {"shown": ACCENT, "inconclusive": SOFT, "refuted": INK}
    tiers = list(dict.fromkeys(claim["tier"] for claim in record["claims"]))
    counts = {kind: [sum(c["tier"] == tier and c["verdict"] == kind for c in record["claims"]) for tier in tiers] for kind in kinds}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        start = np.zeros(len(tiers))
        for kind, colour in kinds.items():
            axes.barh(range(len(tiers)), counts[kind], left=start, color=colour, label=kind, height=0.6)
            start += np.array(counts[kind])
        axes.set_yticks(range(len(tiers)), tiers)
        axes.invert_yaxis()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("claims")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.35 if len(tiers) < 3 else 1.2), ncols=3, frameon=False)

    told = "; ".join(f"{tier}: " + ", ".join(f"{counts[kind][i]} {kind}" for kind in kinds) for i, tier in enumerate(tiers))
    return figure(paint, f"verdicts-{record['slug']}", 560, 110 + 34 * len(tiers), f"Verdicts on the claims of {record['slug']}", told)


ARMS = ("GPTQ", "RSQ", "RSQ, no rotation", "RSQ, permuted weights")


def rsq_figure(record: Mapping[str, Any]) -> str:
    """Arms against rotate+GPTQ: change of perplexity with intervals."""
    names = subjects(record)
    panels = [(name, bits) for name in names for bits in sorted({a["bits"] for a in record["results"][name]["arms"]}, reverse=True)]

    def paint(figure: Any) -> None:
        all_axes = figure.subplots(len(names), len(panels) // len(names), squeeze=False)
        for axes, (name, bits) in zip(all_axes.flat, panels, strict=True):
            arms = {arm["arm"]: arm for arm in record["results"][name]["arms"] if arm["bits"] == bits}
            axes.axvline(0, color=SOFT, linewidth=0.8)
            for place, label in enumerate(ARMS):
                effect, low, high = (relative(value) for value in arms[label]["to_rotate_gptq"])
                colour = ACCENT if label == "RSQ" else INK
                axes.plot([low, high], [place, place], color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round")
                axes.plot([effect], [place], marker="o", markersize=6, color=colour)
            axes.set_yticks(range(len(ARMS)), ARMS)
            axes.set_ylim(len(ARMS) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
            axes.set_axisbelow(True)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set_title(f"{name}, {bits} bits")
            axes.set_xlabel("perplexity against rotate+GPTQ, % (left is better)")
        for axes in all_axes[:, 1:].flat:
            axes.tick_params(labelleft=False)

    told = "; ".join(
        f"{name} at {bits} bits: " + ", ".join(
            f"{arm['arm']} {relative(arm['to_rotate_gptq'][0]):+.2f} %" for arm in record["results"][name]["arms"]
            if arm["bits"] == bits and arm["arm"] in ARMS)
        for name, bits in panels
    )  # fmt: skip
    return figure(paint, "rsq", 720, 60 + 170 * len(names), "Perplexity against rotate+GPTQ, with 95 % intervals over documents", told)


LINES: dict[str, dict[str, Any]] = {
    "LIM": {"color": ACCENT, "linewidth": 2.6, "zorder": 4},
    "ZD": {"color": INK, "linewidth": 1.6, "linestyle": (0, (4, 2)), "zorder": 3},
    "reverse LIM": {"color": MUTED, "linewidth": 1.6, "zorder": 2},
    "mean of all orders": {"color": SOFT, "linewidth": 1.8, "zorder": 1},
    "best order": {"color": INK, "linewidth": 1.2, "linestyle": (0, (1, 1.5)), "zorder": 3},
}


def layers_figure(record: Mapping[str, Any]) -> str:
    """Perplexity over the number of lowered layers."""
    names = subjects(record)

    def paint(figure: Any) -> None:
        all_axes = figure.subplots(len(names), 2, squeeze=False)
        for row, name in zip(all_axes, names, strict=True):
            for axes, level in zip(row, record["results"][name]["levels"], strict=True):
                for label, style in LINES.items():
                    curve = np.exp(level["curves"][label])
                    axes.plot(range(len(curve)), curve, label=label, **style)
                axes.set_yscale("log")
                ticks = np.geomspace(*np.exp([min(level["curves"]["best order"]), max(level["curves"]["reverse LIM"])]), 4)
                axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
                axes.minorticks_off()
                axes.set_title(f"{name}, {level['levels'][0]} to {level['levels'][1]} bits")
                axes.set_xlabel("lowered layers")
                axes.set_ylabel("perplexity")
                axes.spines["left"].set_color(RULE)
        figure.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LINES), labelcolor=MUTED)

    told = "; ".join(
        f"{name}, {level['levels'][0]} to {level['levels'][1]} bits, geometric mean of perplexity: "
        + ", ".join(f"{key} {np.exp(value):.2f}" for key, value in level["mean_log_perplexity"].items())
        for name in names for level in record["results"][name]["levels"]
    )  # fmt: skip
    return figure(paint, "layerwise-quant", 720, 30 + 260 * len(names), "Perplexity as layers are lowered, in several orders", told)


def composability_figure(record: Mapping[str, Any]) -> str:
    """Change of perplexity by scorer and quantizer, at each budget."""
    names = list(dict.fromkeys(row["scorer"] for row in record["layers"]))
    of = {(row["scorer"], row["budget"], row["quantizer"]): row["change_percent"] for row in record["layers"] if row["by"] == "site"}
    names.sort(key=lambda name: (of[name, record["budgets"][0], "GPTQ"], name))
    marks = {"RTN": ("s", SOFT), "GPTQ": ("o", INK), "RSQ": ("D", ACCENT)}

    def paint(figure: Any) -> None:
        all_axes = figure.subplots(1, len(record["budgets"]), sharey=True)
        for axes, budget in zip(all_axes, record["budgets"], strict=True):
            for quantizer, (marker, colour) in marks.items():
                values = [of[name, budget, quantizer] for name in names]
                axes.plot(values, range(len(names)), marker, color=colour, markersize=6, label=quantizer)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="both")
            axes.set_axisbelow(True)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.set_title(f"average of {budget} stored bits")
            axes.set_xlabel("change of perplexity, %")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(marks), labelcolor=MUTED)

    told = "; ".join(
        f"{name} at {budget} bits: " + ", ".join(f"{q} {of[name, budget, q]:+.1f} %" for q in marks)
        for name in names
        for budget in record["budgets"]
    )
    return figure(paint, "composability", 720, 120 + 24 * len(names), "Change of perplexity by layer scorer and quantizer", told)


if __name__ == "__main__":
    main()

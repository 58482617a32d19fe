"""Put WINA's evidence and the benchmark into docs/methods/wina.md, and the picture into docs/assets.

python scripts/wina_page.py            # after `whatmatters reproduce wina` and benchmarks/wina.py
python scripts/wina_page.py --check    # exit status 1 if the page or the picture is not that of the evidence
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from method_pages import BEGIN, END, ROOT, counted, evidence, figure, number, origin, percent, spread, subjects, table, verdicts

from whatmatters.core.render import ACCENT, INK, MUTED, RULE, SOFT

LINES = {
    "random": {"color": SOFT, "linestyle": ":"},
    "TEAL": {"color": INK},
    "WINA": {"color": ACCENT},
    "TEAL, transform": {"color": INK, "linestyle": "--"},
    "WINA, transform": {"color": ACCENT, "linestyle": "--"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something would change")
    check = parser.parse_args().check
    record = evidence("wina")
    path = ROOT / "docs" / "methods" / "wina.md"
    page = path.read_text(encoding="utf-8")
    measured = f"{BEGIN}\n\n{speed()}\n{quality(record)}\n{END}"
    made = {
        path: re.sub(f"{BEGIN}.*{END}", lambda _: measured, page, flags=re.DOTALL),
        ROOT / "docs" / "assets" / "wina.svg": picture(record),
    }
    stale = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(f"{'stale' if check else 'written'}: {file.relative_to(ROOT)}")
        if not check:
            file.write_text(made[file], encoding="utf-8")
    sys.exit(1 if check and stale else 0)


def speed() -> str:
    """Tables of the benchmark."""
    results = json.loads(Path(ROOT / "benchmarks" / "results-wina.json").read_text(encoding="utf-8"))
    products = table(
        ["one product, float32, 4096 to 11008, 65 % skipped", "dense ms", "sparse ms", "speed-up", "share of the bandwidth bound",
         "without numba"],
        [[f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}", f"{row['milliseconds']['dense']:.2f}",
          f"{row['milliseconds']['sparse']:.2f}", f"**{row['speedup']:.2f}x**", f"{row['share_of_the_bandwidth_bound']:.0%}",
          f"{row['speedup_without_numba']:.2f}x"] for row in results["gemv"]],
    )  # fmt: skip
    tokens = table(
        ["decoding, random Llama, 65 % skipped", "dense ms a token", "sparse ms a token", "speed-up", "prefill, masked: time to dense"],
        [[f"{row['parameters'] / 1e6:.0f}M parameters, {row['threads']} thread{'s' if row['threads'] > 1 else ''}",
          f"{row['milliseconds_a_token']['dense']:.1f}", f"{row['milliseconds_a_token']['sparse']:.1f}", f"**{row['speedup']:.2f}x**",
          f"{row['prefill_time_to_dense']:.2f}x"] for row in results["decode"]],
    )  # fmt: skip
    memory = results["memory"][0]
    return (
        f"### Speed and memory\n\n{products}\n{tokens}\nResident memory with the weights laid out anew: {memory['growth']:+.1%} of the "
        f"process, {memory['growth_to_weights']:+.1%} of the weights; {memory['peak_above_mb']:.0f} MB more while that is done; "
        f"{memory['seconds']:.1f} s for {memory['weights_mb']:.0f} MB of weights.\n"
    )


def quality(record: Mapping[str, Any]) -> str:
    """Tables of the experiment."""
    parts = [
        "### Claims\n",
        counted(record),
        verdicts([claim for claim in record["claims"] if claim["tier"] not in ("desk", "public")]),
    ]
    for name in subjects(record):
        result = record["results"][name]
        parts.append(
            f"### {name}\n\n{result['test_documents']} held-out documents with {result['test_tokens']:,} tokens. Perplexity of the model "
            f"as it is: {result['dense_perplexity']:.3f}.\n"
        )
        parts.append(table(
            ["arm", "skipped", "perplexity", "change to dense", "95 % interval over documents", "next-token accuracy"],
            [[arm["arm"], f"{arm['sparsity']:.0%}", f"{arm['perplexity']:.2f}", percent(arm["change_percent"]),
              spread(arm["interval_percent"]), f"{arm['accuracy']:.3f}"] for arm in result["arms"]],
        ))  # fmt: skip
        parts.append(verdicts([claim for claim in record["claims"] if claim["claim"].startswith(f"{name} at")], strip=f"{name} at "))
    rows = record["results"]["arithmetic"]
    parts.append(table(
        ["model at 65 %", "GFLOP of the linears, dense", "multiplications saved", "the transform adds to a block"],
        [[name, number(row["linears_gflop"]), f"{row['reduction_at_65_percent']:.1%}", f"{row['transform_share_of_a_block']:.1%}"]
         for name, row in rows.items()],
    ))  # fmt: skip
    return "\n".join([*parts, origin(record)])


def picture(record: Mapping[str, Any]) -> str:
    """Perplexity over the share of channels that is skipped."""
    names = subjects(record)

    def paint(canvas: Any) -> None:
        all_axes = canvas.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(all_axes, names, strict=True):
            result = record["results"][name]
            for arm, style in LINES.items():
                points = [(row["sparsity"], row["perplexity"]) for row in result["arms"] if row["arm"] == arm]
                shares, values = zip((0.0, result["dense_perplexity"]), *points, strict=True)
                axes.plot([100 * share for share in shares], values, marker="o", markersize=3, label=arm, **style)
            axes.set_yscale("log")
            axes.set_ylim(result["dense_perplexity"] * 0.9, result["dense_perplexity"] * 12)
            ticks = [round(result["dense_perplexity"] * factor, 1) for factor in (1, 2, 4, 8)]
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(name)
            axes.set_xlabel("channels skipped, %")
            axes.set_ylabel("perplexity")
            axes.spines["left"].set_color(RULE)
        canvas.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LINES), labelcolor=MUTED)

    told = "; ".join(
        f"{name} at 65 %: " + ", ".join(f"{row['arm']} {row['perplexity']:.2f}" for row in record["results"][name]["arms"]
                                        if row["sparsity"] == 0.65 and row["arm"] in LINES)
        for name in names
    )  # fmt: skip
    return figure(paint, "wina", 720, 320, "Perplexity as more channels are skipped", told)


if __name__ == "__main__":
    main()

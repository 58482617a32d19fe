"""`python -m whatmatters.testing`: the contract and the kernels, on the device at hand, in less than a minute.

What is the same on every machine (documentation, signatures) is left out unless one entry is named.
"""

import argparse
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from whatmatters.testing.contract import ROOT, Result, every_entry, run
from whatmatters.testing.kernels import check_kernels


def main() -> int:
    """Run and print; 0 where everything holds."""
    parser = argparse.ArgumentParser(prog="python -m whatmatters.testing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where models and tensors are put")
    parser.add_argument("--entry", help="one method, baseline or scorer, with all its checks")
    options = parser.parse_args()
    console = Console()
    entries = [entry for entry in every_entry() if options.entry in (None, entry.slug, entry.slug.replace("-", "_"))]
    if not entries:
        parser.error(f"no entry named {options.entry!r}; known: {', '.join(entry.slug for entry in every_entry())}")
    start = time.perf_counter()
    table = Table("entry", "job", "checks", "seconds", "broken")
    results: list[Result] = []
    for entry in entries:
        own = run(entry, root=ROOT if options.entry else None, device_only=options.entry is None, device=options.device)
        broken = [result.check for result in own if result.error is not None]
        table.add_row(entry.slug, entry.job, str(len(own)), f"{sum(r.seconds for r in own):.1f}", ", ".join(broken))
        results += own
    kernels = check_kernels(options.device) if options.entry is None else {}
    for name, error in kernels.items():
        table.add_row(name, "kernels", "1", "", "" if error is None else error)
    console.print(table)
    failed = [f"{r.entry.slug}: {r.check}: {r.error}" for r in results if r.error is not None]
    failed += [f"{name}: {error}" for name, error in kernels.items() if error is not None]
    for line in failed:
        console.print(line, markup=False)
    told = f"{len(results) + len(kernels)} checks on {options.device} in {time.perf_counter() - start:.0f} s"
    console.print(f"{told}: {len(failed)} broken" if failed else f"{told}: all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

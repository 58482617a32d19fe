"""Put what was executed for each family into docs/guide/families.md.

    python scripts/family_page.py    # runs every family of the table: half a minute

The words of the page are written by hand; the table between the markers comes from the runs. tests/core/test_families.py holds it to them.
"""

import re
import tempfile
from pathlib import Path

from whatmatters.testing.families import FAMILIES
from whatmatters.testing.support import HEAD, demonstrate, row

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "families.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    lines = [HEAD, ("---",) * len(HEAD)]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(demonstrate(family, Path(folder))))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Fixtures for all tests: the shared data, if it is at hand."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("WHATMATTERS_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the shared data sets; tests that need it are skipped where it is absent, or fail if WHATMATTERS_DATA is set."""
    if not DATA.is_dir():
        if "WHATMATTERS_DATA" in os.environ:
            pytest.fail(f"WHATMATTERS_DATA={DATA} is not a folder")
        pytest.skip("the shared data is not here; set WHATMATTERS_DATA to its folder")
    return DATA

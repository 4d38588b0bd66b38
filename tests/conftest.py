"""Settings of all tests."""

import os

import pytest
from hypothesis import settings

# Continuous integration draws the same examples every time, so that a red run is about the change.
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="session")
def _no_measured_tables(tmp_path_factory):
    """Engines go by what was measured on this machine: not in tests."""
    before = os.environ.get("BLOCKDROP_CACHE")
    os.environ["BLOCKDROP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["BLOCKDROP_CACHE"]
    if before is not None:
        os.environ["BLOCKDROP_CACHE"] = before

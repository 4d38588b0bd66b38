"""Settings of all tests."""

import os

from hypothesis import settings

# Continuous integration draws the same examples every time, so that a red run is about the change.
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

"""Fixtures of the page's tests, where there is a browser to drive."""

from importlib.util import find_spec

import pytest

pytest.register_assert_rewrite("browser", "scene")
if find_spec("playwright"):
    from browser import browser, chat, served, stub  # noqa: F401

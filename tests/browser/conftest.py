"""Fixtures of the tests in a browser."""

from tests.browser.chromium import browser as browser

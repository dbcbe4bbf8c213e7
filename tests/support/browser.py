"""A real browser for tests: this machine's Chromium, driven by Playwright, which downloads none itself."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextlib.contextmanager
def chromium():
    """The browser; skips the test where Playwright or Chromium is missing."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or the like")
    api = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
    with api.sync_playwright() as playwright:
        # the sandbox does not start in a container, and the pages are our own
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def complaints(page) -> list[str]:
    """A list that fills with what goes wrong: errors, console messages, requests that fail or leave."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("requestfailed", lambda request: found.append(f"failed: {request.url}"))

    def console(message):
        if message.type in ("error", "warning"):
            found.append(f"{message.type}: {message.text}")

    def request(asked):
        if not asked.url.startswith(("file:", "data:", "blob:")):
            found.append(f"from the network: {asked.url}")

    page.on("console", console)
    page.on("request", request)
    return found

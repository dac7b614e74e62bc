"""A headless Chromium for the tests in this folder, which run by `make test-browser` only: they need what may be absent."""

from __future__ import annotations

import os
import shutil
from urllib.parse import urlsplit

import pytest

if not os.environ.get("BROWSER_TESTS"):
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as run:
        arguments = [
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
        ]  # no sandbox: containers run tests as root
        opened = run.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def watched(browser):
    """(page, faults): a new page; faults fills with console errors, exceptions, failed requests and foreign ones."""
    page, faults = browser.new_page(), []
    page.on(
        "console",
        lambda said: faults.append(f"{said.type}: {said.text}") if said.type == "error" else None,
    )
    page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
    page.on(
        "requestfailed", lambda request: faults.append(f"failed: {request.url} {request.failure}")
    )

    def foreign(request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("file", "data", "blob") and address.hostname not in (
            "127.0.0.1",
            "localhost",
        ):
            faults.append(f"foreign: {request.url}")

    page.on("request", foreign)
    yield page, faults
    page.close()

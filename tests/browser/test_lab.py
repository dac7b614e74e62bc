"""Notebook 01 in a live JupyterLab: all cells run, and a slider changes the picture."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOK = "01_attention_masks.ipynb"
PATIENCE = 300  # seconds for all cells of the notebook, on a slow and busy machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, notebook file) of a server, loopback only, with a token; it serves a copy: the original stays."""
    folder = tmp_path_factory.mktemp("lab")
    runtime = tmp_path_factory.mktemp("runtime")
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, folder)
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    command += ["--allow-root"] if os.geteuid() == 0 else []
    names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    environment = {**os.environ, **{name: str(runtime) for name in names}}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        address = _address(server, runtime, folder / "lab.log")
        yield f"{address}lab/tree/{NOTEBOOK}?token={token}", folder / NOTEBOOK
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _address(server: subprocess.Popen, runtime: Path, log: Path) -> str:
    for _ in range(240):
        if found := list(runtime.glob("jpserver-*.json")):
            return json.loads(found[0].read_text())["url"]
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def _run_all(page) -> None:
    """Run > Run All Cells, again where JupyterLab was not ready yet: it then drops the command without a word."""
    status = '.jp-Notebook-ExecutionIndicator[data-status="{}"]'
    page.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for(timeout=120_000)
    for _ in range(5):
        page.locator(status.format("idle")).wait_for(timeout=120_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=re.compile("^Run All Cells")).first.click()
        try:
            page.locator(status.format("busy")).wait_for(timeout=10_000)
            return
        except Exception as error:  # playwright's own TimeoutError; playwright may be absent when this file is read
            if type(error).__name__ != "TimeoutError":
                raise
    raise AssertionError("JupyterLab does not run the cells")


def test_run_all_cells_and_move_a_slider(watched, lab):
    page, faults = watched
    address, notebook = lab
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.goto(address, timeout=120_000)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    _run_all(page)
    slider = page.locator('.cocoa-explorer [data-name="n_a"]')
    deadline = time.monotonic() + PATIENCE
    while (
        not slider.count()
    ):  # the notebook renders only what is near the window: go where the panel will be
        assert time.monotonic() < deadline, "no slider: " + "; ".join(
            page.locator(".jp-RenderedText").all_inner_texts()[-3:]
        )
        page.keyboard.press("Control+End")
        page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollBy(0, 400)")
        page.wait_for_timeout(500)
    slider.scroll_into_view_if_needed()
    box = page.locator(".cocoa-explorer")
    assert box.locator("svg rect").count() == 2 * 9 * 9
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert box.locator("svg rect").count() == 2 * 10 * 10, "five tokens of A, EOS, four of B"
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(
        timeout=PATIENCE * 1000
    )
    before = notebook.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    while notebook.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "JupyterLab did not save the notebook"
        page.wait_for_timeout(500)
    cells = [
        cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"
    ]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        output for cell in cells for output in cell.outputs if output.output_type == "error"
    ]
    assert [fault for fault in faults if fault.startswith(("foreign", "exception"))] == []

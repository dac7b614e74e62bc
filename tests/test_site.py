"""The site: whole, self-contained, under a policy that lets no script of an output run."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat import v4
from PIL import Image

from cocoa_lib.evaluate import write_ranks, write_report
from cocoa_lib.show.panel import SCRIPT, still

pytestmark = pytest.mark.filterwarnings("ignore:.*myst_parser.*app")  # its own call of an old name
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
ATTACK = '<script>document.title="owned"</script><img src="data:,x" onerror="alert(1)">'


def png(colour: str) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def make_notebooks(folder: Path) -> Path:
    """Two executed notebooks; an output holds an attack, another an explorer."""
    folder.mkdir(parents=True)
    widget = {"text/plain": "VBox()", "application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
    outputs = [
        v4.new_output("display_data", {"text/html": f"<p>words</p>{ATTACK}"}),
        v4.new_output(
            "display_data", {"image/png": png("red")}, metadata={"image/png": {"alt": "red"}}
        ),
        v4.new_output(
            "display_data",
            {**widget, "text/html": still({"a": {"one": 1}}, {"one": "<b>first</b>"})},
        ),
    ]
    for name, title in (("00_first", "00 · First"), ("01_second", "01 · Second")):
        cells = [
            v4.new_markdown_cell(f"# {title}\n\n**The message <of> it.** More."),
            v4.new_markdown_cell("## A part\n\n$$x^2$$\n\nAn aardvark. See [00](00_first.ipynb)."),
            v4.new_code_cell("show()", outputs=outputs),
        ]
        nbformat.write(v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder


def make_report(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for arm, most in (("contrastive", 8), ("cocoa", 1)):
        for seed in (0, 1):
            table = pd.DataFrame({"task": "T", "meta_task": "vqa", "in_distribution": True, "query": range(40),
                                  "rank": rng.integers(1, most + 1, 40), "n_candidates": 4, "ties": 0})  # fmt: skip
            facts = {
                "arm": arm,
                "seed": seed,
                "recipes": {"stage3": {"steps": 5}},
                "commit": "abc",
                "seconds": {"stage3": 1},
            }
            write_ranks(folder / "run" / arm / str(seed), table, facts)
    return write_report(folder / "run", folder / "tiny")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    build_site = pytest.importorskip("build_site", reason="sphinx is not installed")
    folder = tmp_path_factory.mktemp("site")
    notebooks = sorted(make_notebooks(folder / "notebooks").glob("*.ipynb"))
    build_site.build_site(notebooks, make_report(folder), folder / "out")
    return folder / "out"


def read_pages(folder: Path) -> dict[str, BeautifulSoup]:
    return {path.relative_to(folder).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
            for path in folder.rglob("*.html")}  # fmt: skip


def check_links(folder: Path) -> None:
    """Everything that pages load or link to is here, or a link to the web."""
    pages = read_pages(folder)
    for name, page in pages.items():
        for tag in page.select("[href], [src]"):
            target = tag.get("href") or tag.get("src")
            if target.startswith("data:") or tag.get("rel") == ["canonical"]:
                continue
            if re.match(r"https?:|mailto:", target):
                assert tag.name == "a", f"{name} loads {target}"
                continue
            file, _, part = target.partition("#")
            path = (folder / name).parent / file.partition("?")[0] if file else folder / name
            assert path.is_file(), f"{name}: {target}"
            if part and path.suffix == ".html":
                assert BeautifulSoup(path.read_text("utf-8"), "html.parser").find(
                    id=unquote(part)
                ), f"{name}: {target}"


def test_pages_are_whole_and_load_nothing_from_elsewhere(site):
    assert {
        "index.html",
        "notebooks/00_first.html",
        "notebooks/01_second.html",
        "search.html",
    } <= set(read_pages(site))
    check_links(site)


def test_the_front_page_states_the_finding_of_the_report_and_has_a_card_a_notebook(site):
    page = read_pages(site)["index.html"]
    text = page.get_text()
    assert (
        "CoCoA is better than contrastive learning alone overall." in text
        and "2 seeds" in text
        and "commit abc" in text
    )
    cards = page.select(".cards a")
    assert [card["href"] for card in cards] == [
        "notebooks/00_first.html",
        "notebooks/01_second.html",
    ]
    assert "The message <of> it." in cards[0].get_text() and cards[0].img
    assert page.select_one(".pipeline svg") and (site / "_static" / "finding.png").is_file()


def test_the_policy_knows_the_explorers_script_and_no_script_of_an_output(site):
    page = read_pages(site)["notebooks/00_first.html"]
    policy = page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert page.head.contents[0].get("http-equiv") == "Content-Security-Policy", (
        "before anything loads"
    )

    def allows(text: str) -> bool:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy

    assert allows(SCRIPT) and not allows('document.title="owned"')
    assert (
        "default-src 'none'" in policy
        and "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    )
    explorer = page.select_one(".cocoa-explorer")
    assert (
        explorer.select_one("select option").get_text() == "one"
        and explorer.b.get_text() == "first"
    )
    assert not page.select('script[type="application/vnd.jupyter.widget-view+json"]'), (
        "no widget without a kernel"
    )


def test_formulas_are_mathml_and_links_between_notebooks_lead_to_pages(site):
    page = read_pages(site)["notebooks/01_second.html"]
    assert page.find("math") and page.select_one('article a[href="00_first.html"]')


def test_the_committed_site_is_whole_and_small():
    folder = ROOT / "reports" / "site"
    check_links(folder)
    assert len(list(folder.glob("notebooks/0*.html"))) == 6
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12_000_000

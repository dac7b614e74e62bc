"""The pages of a run: whole, escaped, self-contained, with what a reader must know at the top."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat import v4
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
ATTACK = (
    '</title></main><script>document.title="owned"</script><img src="https://example.com/x.png" onerror="alert(1)">'
)
ALT = 'a "circle" <b> & more'


def png(colour: str) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def make_run(folder: Path) -> Path:
    """A small finished run: two notebooks, two arms, two seeds; texts and names hold an attack."""
    run = folder / "runs" / "tiny"
    for arm, rank in (("contrastive", 2), ("cocoa", 1)):
        for seed in (0, 1):
            results = run / "results" / arm / f"seed{seed}"
            results.mkdir(parents=True)
            row = {
                "task": "T",
                "meta_task": "vqa",
                "in_distribution": True,
                "metric": "p@1",
                "value": 100.0 * (rank == 1),
            }
            pd.DataFrame([row]).to_csv(results / "results.csv", index=False)
            ranks = pd.DataFrame({"task": "T", "query": range(20), "rank": rank, "n_candidates": 4})
            ranks.to_parquet(results / "per_query.parquet")
            facts = {"machine": "9 cores, <abacus>", "commit": f"abc{seed}", "seed": seed}
            (results / "provenance.json").write_text(json.dumps(facts))
    (run / "figures").mkdir()
    (run / "figures" / "scenes.txt").write_text(ALT)
    (run / "notebooks").mkdir()
    for name, title in (("00_first", "00 First"), ("01_second", "01 Second: more")):
        outputs = [
            v4.new_output("display_data", {"text/html": f"<style>body {{display:none}}</style><p>{ATTACK}</p>"}),
            v4.new_output("display_data", {"text/markdown": f"Said: {ATTACK}"}),
            v4.new_output(
                "display_data", {"image/png": png("blue")}, metadata={"image/png": {"alt": "not the figure"}}
            ),
            v4.new_output("display_data", {"image/png": png("red")}, metadata={"image/png": {"alt": ALT}}),
            v4.new_output(
                "display_data",
                {"text/plain": "VBox()", "application/vnd.jupyter.widget-view+json": {"model_id": "a"}},
            ),
            v4.new_output(
                "display_data", {"text/html": '<svg><rect width="9" height="9"><title>ok</title></rect></svg>'}
            ),
        ]
        cells = [
            v4.new_markdown_cell(f"# {title}"),
            v4.new_markdown_cell("## What's in it?\n\nAn aardvark. See [00](00_first.ipynb)."),
            v4.new_code_cell("print('<aside>')", outputs=outputs),
        ]
        notebook = v4.new_notebook(cells=cells, metadata={"papermill": {"end_time": "2030-01-02T03:04:05+00:00"}})
        nbformat.write(notebook, run / "notebooks" / f"{name}.ipynb")
    return run


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    from publish import publish

    folder = tmp_path_factory.mktemp("published")
    publish(make_run(folder), folder / "reports" / "tiny")
    return folder / "reports"


@pytest.fixture(scope="module")
def pages(reports):
    return {
        path.name: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in (reports / "site").glob("*.html")
    }


def committed() -> dict[str, BeautifulSoup]:
    return {
        path.name: BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted((ROOT / "reports" / "site").glob("*.html"))
    }


def dead_links(folder: Path, pages: dict[str, BeautifulSoup]) -> list[str]:
    """Links, pictures and stylesheets of pages that lead to no file or heading."""
    dead = []
    for name, page in pages.items():
        for tag in page.select("[href], [src]"):
            target = tag.get("href") or tag.get("src")
            if target.startswith("data:") or (tag.name == "a" and target.startswith("https:")):
                continue
            file, _, part = target.partition("#")
            if not (folder / (file or name)).is_file() or (part and not pages[file or name].find(id=unquote(part))):
                dead.append(f"{name}: {target}")
    return dead


def test_pages_are_in_order_and_reachable(reports, pages):
    assert sorted(pages) == ["00_first.html", "01_second.html", "index.html"]
    cards = [a["href"] for a in pages["index.html"].select(".cards a")]
    assert cards == ["00_first.html", "01_second.html"]
    links = {name: [a["href"] for a in page.select("header nav a")] for name, page in pages.items()}
    assert links["00_first.html"] == ["index.html", "01_second.html"]
    assert links["01_second.html"] == ["index.html", "00_first.html"]
    assert not dead_links(reports / "site", pages)
    assert pages["01_second.html"].select_one('.words a[href="00_first.html"]'), (
        "a link to a notebook leads to its page"
    )


def test_a_page_whose_notebook_was_not_executed_again_stays(tmp_path, pages):
    from publish import publish

    run, site = make_run(tmp_path), tmp_path / "reports" / "site"
    publish(run, tmp_path / "reports" / "tiny")
    before = {path.name: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    (run / "notebooks" / "00_first.ipynb").unlink()
    publish(run, tmp_path / "reports" / "tiny")
    assert {path.name: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before, "to the byte"
    other = run.rename(run.with_name("other"))
    publish(other, tmp_path / "reports" / "other")
    assert sorted(path.name for path in site.glob("*.html")) == ["01_second.html", "index.html"], "of another profile"


def test_every_page_says_which_run_it_shows(pages):
    for page in pages.values():
        facts = {each.dt.get_text(): each.dd.get_text() for each in page.select(".facts > div")}
        assert facts == {
            "Profile": "tiny", "Machine": "9 cores, <abacus>", "Commit of the results": "abc0, abc1", "Seeds": "0, 1",
            "Executed": "2030-01-02",
        }  # fmt: skip


def test_what_users_write_becomes_text(pages):
    for name, page in pages.items():
        assert len(page.find_all("script")) == 1 and len(page.find_all("main")) == 1
        assert not page.select("[onerror], main style, img[src^=http]")
        if name != "index.html":
            assert 'document.title="owned"' in page.main.get_text()
            assert page.select_one("svg rect title").get_text() == "ok", "the explorers' own drawings stay"


def test_pictures_have_their_alt_text_and_the_index_the_right_one(reports, pages):
    figures = [tag for tag in pages["00_first.html"].select("figure img")]
    assert [(tag["alt"], tag["src"]) for tag in figures] == [
        ("not the figure", "figures/00_cell2.png"), (ALT, "figures/00_scenes.png")
    ]  # fmt: skip
    assert pages["index.html"].select_one(".cards img")["src"] == "figures/00_scenes.png"
    assert Image.open(reports / "site" / "figures" / "00_scenes.png").getpixel((0, 0)) == (255, 0, 0)


def test_panels_of_a_kernel_say_so_and_code_is_folded(pages):
    page = pages["00_first.html"]
    assert "make lab" in page.select_one(".panel").get_text() and "VBox" not in page.get_text()
    code = page.select("details.code")
    assert code and not any(each.has_attr("open") for each in code) and "<aside>" in code[0].get_text()


def test_the_index_finds_words_of_sections_and_says_what_was_gained(pages):
    index = pages["index.html"]
    assert "aardvark" in index.select_one("#contents li li")["data-words"]
    cells = [cell.get_text() for cell in index.select("tbody tr:last-child td")]
    assert cells[0].startswith("cocoaThe full method")
    assert cells[1:] == ["+100.0 [+100.0, +100.0]", "supported", "100.0", "2"]
    assert "In short: a certain gain with a model of full width. CoCoA less" in index.get_text()
    said = " ".join(index.get_text().split())
    assert (
        "reports 67.5 on MMEB (36 tasks, precision@1), 1.1 points above contrastive training alone with causal attention "
        "and 2.1 above it" in said
    )
    first = index.select_one("#gain ~ ul li").get_text()
    assert first == (
        "+100.0 [+100.0, +100.0], 100.0 against 0.0: the profile's contrastive steps on both sides; a gain, certain after "
        "correction for these rows (Holm: p below 0.001). By seed: +100.0, +100.0."
    )


def test_the_index_says_in_short_what_its_rows_say():
    from publish import in_short

    def rows(**gains):
        return [{"arms": {arm, "contrastive"}, "gain": gain} for arm, gain in gains.items()]

    assert in_short(rows(cocoa=False, cocoa_longer=False)) == "no certain gain with a model of full width"
    assert in_short(rows(cocoa=False, cocoa_longer=True)) == "a certain gain with a model of full width"
    both = in_short(rows(cocoa=False, cocoa_half=True, no_truncation_half=True))
    assert both == (
        "no certain gain with a model of full width, a certain gain with one of half the width, where the same "
        "reconstruction without the bottleneck gains too"
    )
    behind = [{"arms": {"cocoa", "contrastive_longer"}, "gain": False, "loss": True}]
    assert in_short(behind).endswith("; a certain loss against contrastive training alone that is simply longer")
    alone = in_short(rows(cocoa=True, cocoa_half=False, no_truncation_half=True))
    assert alone == "a certain gain with a model of full width, no certain gain with one of half the width"


def test_the_index_tells_a_loss_from_what_is_not_certain():
    from publish import answers

    found = {row["budget"]: row for row in answers(ROOT / "reports" / "long")}
    same = found["250 contrastive steps on both sides"]
    assert same["verdict"].startswith("not certain after correction for these rows (Holm: p 0.")
    assert same["levels"] == "24.7 against 28.2" and same["by_seed"] == "-1.9, -3.3, -0.9, -4.0, -7.8"
    behind = found["CoCoA with 250, contrastive training alone with 1,100"]
    assert behind["verdict"].startswith("a loss, certain after correction for these rows (Holm: p 0.00")


def test_what_only_the_committed_run_can_say_stands_on_no_other_index(tmp_path):
    from publish import committed_run, scale

    assert committed_run(make_run(tmp_path)) == []
    said = " ".join(committed_run(ROOT / "reports" / "long"))
    assert (
        "1,380 [1,347, 1,394] contrastive steps" in said
        and "squared error 0.199 where an average cell has 0.195" in said
    )
    assert scale(ROOT / "reports" / "long") == "12 tasks, 6,000 queries in all; a random guess scores 2.8"


def test_an_interval_keeps_together_and_code_stays_as_it_is():
    from publish import _keep_together

    soup = BeautifulSoup(
        "<td>a -0.2 [-1.9, +1.4] b +7.2 [+5.2, +9.7] *, p</td><code>1.0 [0.5, 1.5]</code>", "html.parser"
    )
    text = soup.get_text()
    _keep_together(soup)
    assert [span.get_text() for span in soup.select("td span.interval")] == ["-0.2 [-1.9, +1.4]", "+7.2 [+5.2, +9.7] *"]
    assert soup.get_text() == text and soup.code.string == "1.0 [0.5, 1.5]"


def test_the_filter_knows_the_words_of_tables_and_pictures():
    from publish import headings

    page = """<div class="words"><h2 id="one">One</h2><p>1,100 steps</p></div>
    <pre>code</pre><table><td>Grounding</td><td>12.5</td></table>
    <img alt="forest plot"><div class="words"><h3>not a section</h3><h2 id="two">Two</h2></div>"""
    one, two = headings(BeautifulSoup(page, "html.parser"))
    assert one["words"] == "1,100 a forest grounding not one plot section steps" and two["words"] == "two"


def test_a_page_names_its_own_commit_and_many_stand_on_page_05(tmp_path):
    from publish import _facts, provenance

    run = make_run(tmp_path)
    assert provenance(run)["Commit of the results"] == "abc0, abc1"
    for i, arm in enumerate(("contrastive", "cocoa")):
        for seed in (0, 1):
            facts = {"machine": f"{seed} cores, m", "commit": f"{i}{seed}" + "+changes" * (seed == 1)}
            (run / "results" / arm / f"seed{seed}" / "provenance.json").write_text(json.dumps(facts))

    def top(file, seed=""):
        facts = _facts(file, {"seed": seed, "date": "today"}, run)
        return facts["Commit of the results"], facts["Seeds"]

    assert _facts("index.html", {"seed": "", "date": "today"}, run)["Machine"] == "0 cores, m; 1 cores, m"
    assert top("index.html") == (
        "4 commits, listed at the top of notebook 05 (some +changes: with files not committed)",
        "0, 1",
    )
    assert top("05_ablations.html") == ("00, 01+changes, 10, 11+changes (+changes: with files not committed)", "0, 1")
    assert top("03_contrastive_training.html", "0") == ("10", "0 on this page, of 0, 1")


def test_a_change_of_the_script_changes_the_policy():
    from publish import policy

    one, two = (policy(f'<script>{n}</script><p style="color:red">') for n in (1, 2))
    assert one != two and "unsafe-inline" not in one and one.startswith("default-src 'none'")


def test_pairs_of_users_get_tables_only(tmp_path):
    from publish import publish

    publish(make_run(tmp_path), tmp_path / "reports" / "tiny", tables_only=True)
    assert not (tmp_path / "reports" / "site").exists()
    assert not list((tmp_path / "reports").rglob("*.png")) and (tmp_path / "reports" / "tiny" / "summary.md").is_file()


def test_the_committed_site_is_whole_and_small():
    folder = ROOT / "reports" / "site"
    if not (pages := committed()):
        pytest.skip("no committed pages")
    assert len(pages) == 7 and not dead_links(folder, pages)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 15e6
    for name, page in pages.items():
        absent = ("", "No description has been provided for this image")  # the second is nbconvert's
        poor = [tag for tag in page.find_all("img") if tag.get("alt", "").strip() in absent]
        assert not poor, f"{name}: {len(poor)} pictures without alt text"
        assert len(page.select(".facts dd")) == 5 and "not recorded" not in page.select_one(".facts").get_text()


def test_the_committed_pages_name_no_folder_of_the_machine_that_made_them():
    for page in sorted((ROOT / "reports" / "site").glob("*.html")):
        text = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").get_text(" ")
        assert re.findall(r"(?<![\w.])/(?:tmp|home|root|work|Users)/\S*", text) == [], page.name


def test_the_index_compares_arms_on_the_same_budget_only():
    from publish import arms_table

    names = [row["arm"] for row in arms_table(ROOT / "reports" / "long")]
    assert {"contrastive", "cocoa", "stage1_longer"} <= set(names) and not {
        "contrastive_longer",
        "cocoa_longer",
        "cocoa_few",
    } & set(names)


def test_the_page_of_verdicts_is_that_of_the_committed_tables():
    from cocoa_lib.evaluate import effects as analysis

    page = BeautifulSoup((ROOT / "reports" / "site" / "05_ablations.html").read_text(encoding="utf-8"), "html.parser")
    rows = [[cell.get_text(" ", strip=True) for cell in row.select("td")] for row in page.select("tr")]
    per_query = analysis.gather_ranks(ROOT / "reports" / "long", analysis.gather_results(ROOT / "reports" / "long"))
    few = {"cocoa_few": 1, "contrastive_few": -1}
    for claim, weights in {
        "1. Full CoCoA": {"cocoa": 1, "contrastive": -1},
        "1c. ...": {"cocoa_longer": 1, "contrastive_longer": -1},
        "2b. ... and than with the same stage 2": {"cocoa": 1, "no_truncation": -1},
        "3. The gain is larger": {**few, "cocoa": -1, "contrastive": 1},
        "250 contrastive steps, all pairs": {"cocoa": 1, "contrastive": -1},
        "half the width": {"cocoa_half": 1, "contrastive_half": -1},
        "half the width, another backbone": {"cocoa_half_other": 1, "contrastive_half_other": -1},
        "half the width, another backbone, 1,100 contrastive steps": {
            "cocoa_half_other_longer": 1,
            "contrastive_half_other_longer": -1,
        },
        "1e3. ": {"cocoa_half_other_longer": 1, "contrastive_half_other_longer": -1},
        "the bottleneck": {"cocoa": 1, "no_truncation": -1},
    }.items():
        begun = [row for row in rows if row and row[0].startswith(claim)]
        (shown,) = [row for row in begun if row[0] == claim] or begun
        assert any(cell.startswith(analysis.said(analysis.contrast(per_query, weights))) for cell in shown[1:]), shown


@pytest.mark.parametrize("place", ["reports/tiny", "reports/site"])
def test_a_folder_that_publishing_did_not_make_is_not_replaced(tmp_path, place):
    from publish import publish

    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="was not made by this script"):
        publish(make_run(tmp_path), tmp_path / "reports" / "tiny")
    assert (tmp_path / place / "thesis.tex").exists()

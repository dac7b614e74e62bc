"""Every page as a reader opens it: from the disk, on a wide screen and on a phone; explorers moved."""

from __future__ import annotations

from pathlib import Path

import pytest

SITE = Path(__file__).resolve().parent.parent.parent / "reports" / "site"
PAGES = sorted(SITE.rglob("*.html"))
WIDTHS = (1400, 390)


def name(path: Path) -> str:
    return path.relative_to(SITE).as_posix()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_opens_without_a_fault_and_fits(watched, path, width):
    page, faults = watched
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(path.as_uri())
    assert page.locator("h1").count() == (path.name != "search.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "sideways scrolling"
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
    assert page.evaluate(broken) == []
    thin = "[...document.querySelectorAll('.cell_output svg, .pipeline svg')].filter(s => s.clientWidth < 8).length"
    assert page.evaluate(thin) == 0, "a blank drawing"
    assert faults == []


def test_the_mask_explorer_moves(watched):
    page, faults = watched
    page.goto((SITE / "notebooks" / "01_attention_masks.html").as_uri())
    box = page.locator('.cocoa-explorer[data-kind="mask"]')
    assert box.locator("svg rect").count() == 2 * 9 * 9
    box.locator('[data-name="n_a"]').fill("6")
    assert box.locator("svg rect").count() == 2 * 11 * 11
    assert "B1 knows A1 through others after 2 layers" in box.inner_text()
    box.locator('[data-name="layout"]').select_option("eos_bridged_strict")
    assert "A1 cannot know B1" in box.inner_text()
    box.locator('[data-name="layers"]').fill("1")
    assert "B1 cannot know A1 within 1 layer" in box.inner_text()
    assert faults == []


@pytest.mark.parametrize("file", ["02_reconstruction_pretraining", "03_contrastive_training",
                                  "04_mmeb_evaluation", "05_ablations"])  # fmt: skip
def test_every_menu_of_an_explorer_changes_its_answer(watched, file):
    page, faults = watched
    page.goto((SITE / "notebooks" / f"{file}.html").as_uri())
    boxes = page.locator('.cocoa-explorer[data-kind="cases"]')
    assert boxes.count()
    for i in range(boxes.count()):
        menus = boxes.nth(i).locator("select")
        for k in range(menus.count()):
            before = boxes.nth(i).locator(".answer").inner_html()
            if menus.nth(k).locator("option").count() > 1:
                menus.nth(k).select_option(index=1)
                assert boxes.nth(i).locator(".answer").inner_html() != before
    assert faults == []


def test_search_finds_a_word_and_dark_mode_is_dark(watched):
    page, faults = watched
    page.goto(f"{(SITE / 'search.html').as_uri()}?q=reachability")
    page.locator("#search-results li").first.wait_for(timeout=10_000)
    assert "01" in page.locator("#search-results").inner_text()
    page.goto((SITE / "index.html").as_uri())
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("document.body.dataset.theme = 'dark'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert faults == []


def test_a_script_that_got_in_does_not_run(watched, tmp_path):
    page, faults = watched
    html = (SITE / "notebooks" / "00_data_and_backbone.html").read_text(encoding="utf-8")
    bad = SITE / "notebooks" / "bad.html"
    bad.write_text(
        html.replace("</article>", '<script>document.title="owned"</script></article>'),
        encoding="utf-8",
    )
    try:
        page.goto(bad.as_uri())
        assert page.title() != "owned" and "Content Security Policy" in faults[0]
    finally:
        bad.unlink()

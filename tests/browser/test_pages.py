"""Every page as a reader opens it: from the disk, on a wide screen and on a phone, with the keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_site import make_run

SITE = Path(__file__).resolve().parent.parent.parent / "reports" / "site"
PAGES = sorted(SITE.glob("*.html"))
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    from publish import publish

    folder = tmp_path_factory.mktemp("hostile")
    publish(make_run(folder), folder / "reports" / "tiny")
    return folder / "reports" / "site"


def test_there_are_pages():
    assert PAGES, "no pages in reports/site: run `make site` first"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_opens_without_a_fault_and_its_links_lead_somewhere(watched, path):
    page, faults = watched
    page.goto(path.as_uri())
    assert page.locator("h1").count() == 1
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
    assert page.evaluate(broken) == []
    assert page.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") != "none", "no stylesheet"
    targets = page.evaluate("[...document.links].map(a => a.href).filter(h => h.startsWith('file:'))")
    for target in sorted(set(targets)):
        page.goto(target)
        if "#" in target:
            assert page.evaluate("document.querySelector(':target') !== null"), f"{path.name}: nothing at {target}"
    assert faults == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_fits_a_phone(watched, path):
    page, faults = watched
    page.set_viewport_size(PHONE)
    page.goto(path.as_uri())
    if page.locator("#show-code").is_visible():
        page.click("#show-code")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert faults == []


def test_code_unfolds_by_keyboard(watched, hostile):
    page, _ = watched
    page.goto((hostile / "00_first.html").as_uri())
    opened = "document.querySelectorAll('details.code[open]').length"
    assert page.evaluate(opened) == 0
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "show-code":
            break
    page.keyboard.press("Enter")
    assert page.evaluate(opened) == 1 and page.get_attribute("#show-code", "aria-pressed") == "true"
    page.keyboard.press("Space")
    assert page.evaluate(opened) == 0
    page.focus("details.code summary")
    page.keyboard.press("Enter")
    assert page.evaluate(opened) == 1


def test_the_filter_finds_a_section_by_its_words(watched, hostile):
    page, faults = watched
    page.goto((hostile / "index.html").as_uri())
    page.fill("#filter", "aardvark see")
    assert page.locator("#contents li[data-words]:visible").count() == 2
    page.fill("#filter", "ardvark")
    assert page.locator("#contents li:visible").count() == 0, "words are found from their beginning"
    page.fill("#filter", "zebra")
    assert page.locator("#contents li:visible").count() == 0 and page.inner_text("#found") == "no section"
    assert faults == []


def test_nothing_that_a_user_wrote_acts(watched, hostile):
    page, faults = watched
    page.goto((hostile / "00_first.html").as_uri())
    assert page.title() == "00 First" and page.locator("h1").is_visible()
    assert faults == []


def test_the_policy_stops_a_script_that_got_in(watched, hostile, tmp_path):
    page, faults = watched
    html = (hostile / "00_first.html").read_text(encoding="utf-8")
    bad = hostile / "bad.html"
    bad.write_text(html.replace("</main>", '<script>document.title="owned"</script></main>'), encoding="utf-8")
    page.goto(bad.as_uri())
    assert page.title() == "00 First" and "Content Security Policy" in faults[0]

"""The built pages in a real browser, with the network off: what a reader would see, and what would go wrong unseen."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from built import Open, pages
from playwright.sync_api import Page

PAGES = pages()
CHAPTERS = [path for path in PAGES if path.startswith("notebooks/")]
WIDTHS = {"phone": 390, "desk": 1280}
# Icons, styles and scripts that no reader hears of are not meant; pictures are.
UNDESCRIBED = "[...document.querySelectorAll('main img')].filter(e => !(e.alt || '').trim()).map(e => e.src)"
UNRENDERED = "[...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BACKGROUND = "e => getComputedStyle(e).backgroundColor"
THEME = "document.documentElement.dataset.theme"


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("path", PAGES)
def test_page_opens_whole_and_without_a_fault(visit: Open, path: str, width: int) -> None:
    opened = visit(path, width)
    assert opened.faults == []
    overflow = opened.page.evaluate(OVERFLOW)
    assert overflow <= 0, f"the page scrolls sideways by {overflow} pixels"
    assert opened.page.evaluate(UNDESCRIBED) == []
    assert opened.page.evaluate(UNRENDERED) == 0
    assert opened.page.locator("mjx-merror").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_page_is_accessible(visit: Open, path: str, theme: str) -> None:
    page = visit(path).page
    _switch(page, theme)
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important; }")
    page.evaluate("document.querySelectorAll('main details').forEach(e => e.open = true)")
    found = Axe().run(page).response["violations"]
    told = [
        f"{each['id']}: {node['target']} {node['html'][:150]} {node['any'][0]['message'] if node['any'] else ''}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert told == []


@pytest.mark.parametrize("path", CHAPTERS)
def test_figures_are_visible_numbered_and_described(visit: Open, path: str) -> None:
    page = visit(path).page
    images = page.locator("main .cell_output figure img")
    assert images.count() > 0
    for i in range(images.count()):
        image = images.nth(i)
        image.scroll_into_view_if_needed()
        assert image.evaluate("e => e.complete && e.naturalWidth > 100 && e.getBoundingClientRect().width > 100")
        assert len(image.get_attribute("alt") or "") > 20
    assert page.locator("main .cell_output figure figcaption .caption-number").count() == images.count()


@pytest.mark.parametrize("path", CHAPTERS)
def test_chapter_has_mathematics_and_shows_neither_parameters_nor_installation(visit: Open, path: str) -> None:
    page = visit(path).page
    assert page.locator("mjx-container").count() > 0
    text = page.text_content("main") or ""
    assert "folder of results; None" not in text
    assert "# Parameters" not in text
    assert "git clone" not in text


@pytest.mark.parametrize("path", CHAPTERS)
def test_chapter_can_be_launched_and_downloaded(visit: Open, path: str) -> None:
    page = visit(path).page
    notebook = path.replace(".html", ".ipynb")
    for host in ("mybinder.org", "colab.research.google.com"):
        assert page.locator(f'a[href*="{host}"][href$="{notebook}"]').count() > 0
    link = page.locator(f'a[href$="_sources/{notebook}"]').first.evaluate("e => e.href")
    downloaded = page.request.get(link).json()
    assert all(not cell.get("outputs") for cell in downloaded["cells"]), "it is the notebook as committed"
    assert page.locator("button.copybtn").count() > 0


def test_code_is_folded_and_opens(visit: Open) -> None:
    page = visit("notebooks/03_hessian_spectrum.html").page
    folded = page.locator("details.hide.above-input").first
    code = folded.locator(".highlight").first
    assert not code.is_visible()
    folded.locator("summary").click()
    assert code.is_visible()


def test_table_seven_shows_ours_beside_the_papers(visit: Open) -> None:
    page = visit("notebooks/03_hessian_spectrum.html").page
    rows = page.locator("#tab-7-record tbody tr")
    assert rows.count() == 6
    assert rows.nth(0).locator("td").nth(4).inner_text().replace("\u00a0", " ") == "0.49 (2.96)"
    live = page.locator("#tab-7-live tbody tr").first.locator("td").nth(3).inner_text()
    assert float(live.split()[0]) > 0


def test_dark_mode_is_dark_and_keeps_figures_readable(visit: Open) -> None:
    page = visit("notebooks/03_hessian_spectrum.html").page
    _switch(page, "light")
    light = page.locator("body").evaluate(BACKGROUND)
    _switch(page, "dark")
    assert page.locator("body").evaluate(BACKGROUND) != light
    figure = page.locator("main .cell_output figure img").first
    assert figure.evaluate(BACKGROUND) == "rgb(255, 255, 255)", "dark lines need a light ground"


def test_search_finds_a_page_and_an_api_entry(visit: Open) -> None:
    page = visit("book/intro.html").page
    page.keyboard.press("Control+k")
    page.locator("dialog[open] input[type=search]").fill("lanczos")
    page.keyboard.press("Enter")
    results = page.locator("#search-results ul.search li a")
    results.first.wait_for()
    page.wait_for_function("document.querySelectorAll('#search-results ul.search li').length > 2")
    found = " ".join(results.all_inner_texts())
    assert "The Hessian spectrum" in found
    assert "curvature" in found


def test_print_shows_the_text_alone(visit: Open) -> None:
    page = visit("notebooks/03_hessian_spectrum.html").page
    page.emulate_media(media="print")
    for hidden in (".bd-sidebar-primary", ".bd-header-article", ".prev-next-footer"):
        assert not page.locator(hidden).first.is_visible(), hidden
    assert page.locator("main h1").is_visible()


def _switch(page: Page, theme: str) -> None:
    """Press the switch until the page has the theme."""
    for _ in range(4):
        if page.evaluate(THEME) == theme:
            return
        page.locator("button.theme-switch-button:visible").first.click()
    raise AssertionError(f"the switch never came to {theme}")

"""The built pages in a real browser, with the network off: what a reader would see, and what would go wrong unseen."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from built import Open, Visit, pages
from playwright.sync_api import Browser, Page

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


@pytest.mark.parametrize("path", PAGES)
def test_page_is_accessible_in_light_and_in_dark(visit: Open, path: str) -> None:
    page = visit(path).page
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important; }")
    page.evaluate("document.querySelectorAll('main details').forEach(e => e.open = true)")
    for theme in ("light", "dark"):
        _switch(page, theme)
        found = Axe().run(page).response["violations"]
        told = [
            f"{each['id']}: {node['target']} {node['html'][:150]} {node['any'][0]['message'] if node['any'] else ''}"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
        assert told == [], theme


class TestChapter:
    """What each chapter has, on one visit."""

    @pytest.fixture(scope="class", params=CHAPTERS)
    @classmethod
    def path(cls, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def page(cls, browser: Browser, site: str, path: str) -> Iterator[Page]:
        page = Visit(browser, site, path).page
        yield page
        page.close()

    def test_figures_are_visible_numbered_and_described(self, page: Page) -> None:
        images = page.locator("main .cell_output figure img")
        assert images.count() > 0
        for i in range(images.count()):
            image = images.nth(i)
            image.scroll_into_view_if_needed()
            assert image.evaluate("e => e.complete && e.naturalWidth > 100 && e.getBoundingClientRect().width > 100")
            assert len(image.get_attribute("alt") or "") > 20
        assert page.locator("main .cell_output figure figcaption .caption-number").count() == images.count()

    def test_mathematics_is_there_and_parameters_and_installation_are_not(self, page: Page) -> None:
        assert page.locator("mjx-container").count() > 0
        text = page.text_content("main") or ""
        assert "folder of results; None" not in text
        assert "# Parameters" not in text
        assert "git clone" not in text

    def test_it_can_be_launched_and_downloaded(self, page: Page, path: str) -> None:
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

    def curvature(table: str, row: int) -> list[str]:
        """The cell of our eigenvalue and the one beside it."""
        place = page.locator(f"#{table} thead th").all_inner_texts().index("λ₁, ours")
        cells = page.locator(f"#{table} tbody tr").nth(row).locator("td").all_inner_texts()
        return [cell.replace("\u00a0", " ") for cell in cells[place : place + 2]]

    assert page.locator("#tab-7-record tbody tr").count() == 6
    assert [curvature("tab-7-record", row)[1] for row in (0, 5)] == ["0.49 (2.96)", "44.3 (49.36)"]
    assert all(float(curvature(table, 0)[0].split()[0]) > 0 for table in ("tab-7-live", "tab-7-record"))


def test_dark_mode_is_dark_and_keeps_figures_readable(visit: Open) -> None:
    page = visit("notebooks/03_hessian_spectrum.html").page
    _switch(page, "light")
    light = page.locator("body").evaluate(BACKGROUND)
    _switch(page, "dark")
    assert page.locator("body").evaluate(BACKGROUND) != light
    ground = page.locator("main .cell_output figure img").first.evaluate(BACKGROUND)
    assert min(map(int, re.findall(r"\d+", ground))) > 180, f"dark lines need a light ground, not {ground}"


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
    assert page.locator("main h1:visible").count() == 1


def _switch(page: Page, theme: str) -> None:
    """Press the switch until the page has the theme."""
    for _ in range(4):
        if page.evaluate(THEME) == theme:
            return
        page.locator("button.theme-switch-button:visible").first.click()
    raise AssertionError(f"the switch never came to {theme}")

"""The built pages in a real browser, with the network off: what a reader would see, and what would go wrong unseen."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
HTML = ROOT / "book" / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the book is not built; run: make book"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

PAGES = [
    "book/intro.html",
    "notebooks/01_models_and_data.html",
    "notebooks/02_saddle_free.html",
    "notebooks/03_hessian_spectrum.html",
    "notebooks/06_five_attacks.html",
    "notebooks/09_second_order.html",
    "book/silent.html",
    "book/speed.html",
    "book/provenance.html",
    "book/bibliography.html",
]
WITH_MATHEMATICS = {page for page in PAGES if page.startswith("notebooks/")} | {"book/silent.html", "book/speed.html"}
FIGURES = {"01": 1, "02": 3, "03": 4, "06": 4, "09": 2}
WIDTHS = {"phone": 390, "desk": 1280}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Serve the built book on the loopback interface, as any static host would."""
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


class Visit:
    """A page that has been opened, and all that went wrong on the way."""

    def __init__(self, browser: Browser, site: str, path: str, width: int = 1280) -> None:
        self.faults: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("console", lambda m: self.faults.append(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))
        self.page.on("response", lambda r: self.faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        self.page.route(
            "**/*", lambda route: route.continue_() if route.request.url.startswith(site) else route.abort()
        )
        self.page.goto(f"{site}/{path}", wait_until="networkidle")
        self.page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("path", PAGES)
def test_page_opens_without_a_fault_and_without_the_network(browser: Browser, site: str, path: str, width: int) -> None:
    visit = Visit(browser, site, path, width)
    assert visit.faults == []
    overflow = visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, f"the page scrolls sideways by {overflow} pixels"
    visit.page.close()


@pytest.mark.parametrize("path", sorted(WITH_MATHEMATICS))
def test_mathematics_is_rendered(browser: Browser, site: str, path: str) -> None:
    page = Visit(browser, site, path).page
    assert page.locator("mjx-container").count() > 0
    assert page.locator("mjx-merror").count() == 0
    unrendered = page.evaluate(
        "[...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length"
    )
    assert unrendered == 0
    page.close()


@pytest.mark.parametrize(("number", "figures"), FIGURES.items())
def test_figures_are_visible_and_described(browser: Browser, site: str, number: str, figures: int) -> None:
    (path,) = [page for page in PAGES if page.startswith(f"notebooks/{number}")]
    page = Visit(browser, site, path).page
    images = page.locator("figure img")
    assert images.count() == figures
    for i in range(figures):
        image = images.nth(i)
        image.scroll_into_view_if_needed()
        assert image.evaluate("e => e.complete && e.naturalWidth > 100 && e.getBoundingClientRect().width > 100")
        assert len(image.get_attribute("alt") or "") > 20
    assert page.locator("figure figcaption .caption-number").count() == figures
    page.close()


@pytest.mark.parametrize("path", [page for page in PAGES if page.startswith("notebooks/")])
def test_parameter_cells_are_hidden(browser: Browser, site: str, path: str) -> None:
    page = Visit(browser, site, path).page
    assert "folder of results; None" not in (page.text_content("main") or "")
    assert "# Parameters" not in (page.text_content("main") or "")
    page.close()


def test_table_seven_shows_ours_beside_the_papers(browser: Browser, site: str) -> None:
    page = Visit(browser, site, "notebooks/03_hessian_spectrum.html").page
    rows = page.locator("#tab-7-record tbody tr")
    assert rows.count() == 6
    assert rows.nth(0).locator("td").nth(4).inner_text().replace("\u00a0", " ") == "0.49 (2.96)"
    live = page.locator("#tab-7-live tbody tr").first.locator("td").nth(3).inner_text()
    assert float(live.split()[0]) > 0
    page.close()


def test_dark_mode_can_be_switched_on(browser: Browser, site: str) -> None:
    page = Visit(browser, site, "book/intro.html").page
    dark = "getComputedStyle(document.body).backgroundColor"
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    light_background = page.evaluate(dark)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert page.evaluate(dark) != light_background
    page.close()


def test_every_internal_link_leads_somewhere(browser: Browser, site: str) -> None:
    broken = []
    for path in PAGES:
        page = Visit(browser, site, path).page
        links = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
        for link in sorted({link.split("#")[0] for link in links if link.startswith(site)}):
            if page.request.get(link).status != 200:
                broken.append(f"{path}: {link}")
        page.close()
    assert broken == []

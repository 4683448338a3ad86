"""The explorers on a built page, opened from the disk, the network off: moved by mouse and keyboard, both change."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from hessnb.book import Parameters, build

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

CHAPTER = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Explorers

```{code-cell} ipython3
:tags: [parameters]

profile = "smoke"
seeds = None
device = "cpu"
store = None
```

```{code-cell} ipython3
import torch
from hessnb import data
from hessnb.models import build
from hessnb.widgets import attack_explorer, landscape_explorer, leading_directions

splits = data.load("mnist5k", n_train=200, n_test=100)
models = {}
for batch_size in (20, 100):
    models[str(batch_size)] = build("M1", width=0.2, seed=0)
    optimiser = torch.optim.SGD(models[str(batch_size)].parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        for x, y in splits.train.batches(batch_size):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(models[str(batch_size)](x), y).backward()
            optimiser.step()
directions = {name: leading_directions(model, splits.train) for name, model in models.items()}
landscape_explorer(models, directions, splits, positions=torch.linspace(-1, 1, 9))
```

```{code-cell} ipython3
attack_explorer(models["20"], splits.test.head(3), splits.classes)
```
"""


@pytest.fixture(scope="module")
def page_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a book of one chapter, with the configuration of this one, and return the chapter's page."""
    root = tmp_path_factory.mktemp("explorers")
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    shutil.copy(ROOT / "book" / "references.bib", root / "book")
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_chapter.ipynb\n")
    (root / "book" / "intro.md").write_text("# A small book\n")
    (root / "notebooks").mkdir()
    (root / "notebooks" / "01_chapter.md").write_text(CHAPTER)
    return build(root, Parameters(profile="smoke"), say=lambda _: None).parent / "notebooks" / "01_chapter.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Visit:
    """The page, opened with the network off, and all that went wrong since."""

    def __init__(self, browser: Browser, path: Path, width: int) -> None:
        self.faults: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda m: self.faults.append(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))
        self.page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else self.faults.append(r.url))
        self.page.goto(path.as_uri(), wait_until="load")
        self.explorers = self.page.locator(".hessnb-explorer")

    def explorer(self, title: str) -> Locator:
        return self.page.get_by_role("group", name=title)


@pytest.fixture(params=[390, 1280], ids=["phone", "desk"])
def visit(browser: Browser, page_on_disk: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    opened = Visit(browser, page_on_disk, request.param)
    yield opened
    assert opened.faults == []
    opened.context.close()


def said(explorer: Locator) -> str:
    return explorer.get_by_role("status").inner_text().replace("\N{NO-BREAK SPACE}", " ")


def drawing(explorer: Locator) -> str:
    return str(explorer.locator(".hessnb-picture").inner_html())


def test_page_holds_no_widget_manager(page_on_disk: Path) -> None:
    text = page_on_disk.read_text()
    for trace in ("require.js", "html-manager", "vnd.jupyter.widget"):
        assert trace not in text
    assert text.count('class="hessnb-explorer"') == 2


def test_landscape_explorer_moves(visit: Visit) -> None:
    explorer = visit.explorer("Landscape explorer")
    slider, mark = explorer.get_by_label("t", exact=True), explorer.locator("circle")
    assert "t = 0:" in said(explorer)
    at_start = drawing(explorer), mark.get_attribute("cx"), mark.get_attribute("cy"), said(explorer)

    slider.focus()
    visit.page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "0.25" == explorer.locator(".hessnb-value").inner_text()
    assert "t = 0.25:" in said(explorer)
    assert float(mark.get_attribute("cx") or 0) > float(at_start[1] or 0)
    assert mark.get_attribute("cy") != at_start[2]
    visit.page.keyboard.press("ArrowLeft")
    assert (drawing(explorer), said(explorer)) == (at_start[0], at_start[3])

    visit.page.keyboard.press("End")
    assert "t = 1:" in said(explorer)
    told = re.search(r"test set: loss (\S+), (\S+) % right", said(explorer))
    assert told is not None
    cells = explorer.locator("tbody tr").nth(1).locator("td")
    assert [cells.nth(0).inner_text(), cells.nth(1).inner_text()] == [told[1], f"{told[2]} %"]
    answers = explorer.locator(".hessnb-row small").all_inner_texts()
    assert len(answers) == 6
    assert all(re.fullmatch(r"[✓✗] \d \(\d+ %\)", answer) for answer in answers)


def test_landscape_explorer_changes_network_and_direction(visit: Visit) -> None:
    explorer = visit.explorer("Landscape explorer")
    curves = {explorer.locator("svg path[stroke='var(--first)']").first.get_attribute("d")}
    explorer.get_by_label("direction", exact=True).select_option("random, filter-normalised")
    assert "random, filter-normalised" in said(explorer)
    curves.add(explorer.locator("svg path[stroke='var(--first)']").first.get_attribute("d"))
    explorer.get_by_label("batch size").select_option("100")
    assert said(explorer).startswith("batch size 100")
    curves.add(explorer.locator("svg path[stroke='var(--first)']").first.get_attribute("d"))
    assert len(curves) == 3


def test_attack_explorer_moves(visit: Visit) -> None:
    explorer = visit.explorer("Attack explorer")
    sources = explorer.locator("img").evaluate_all("images => images.map(image => image.src)")
    before, start = explorer.locator("tbody td").all_inner_texts(), said(explorer)
    slider = explorer.get_by_label("ε")
    slider.focus()
    visit.page.keyboard.press("End")
    assert "FGSM, ε = 0.3:" in said(explorer)
    assert said(explorer) != start
    moved = explorer.locator("img").evaluate_all("images => images.map(image => image.src)")
    assert moved[0] == sources[0]
    assert moved[2] != sources[2]
    after = explorer.locator("tbody td").all_inner_texts()
    assert after[::2] == before[::2], "the picture before is the same"
    assert after[1::2] != before[1::2]
    assert sum(float(text.split()[0]) for text in after[1::2]) == pytest.approx(100, abs=0.6)

    select = explorer.get_by_label("attack")
    assert select.locator("option").all_inner_texts() == [
        "FGSM", "FGSM-10", "L2GRAD", "FHSM", "L2HESS", "PGD", "DAMPED", "NEAREST",
    ]  # fmt: skip
    select.focus()
    visit.page.keyboard.press("ArrowDown")
    assert said(explorer).startswith("FGSM-10, ε = 0.3:")
    explorer.get_by_label("image").select_option(index=1)
    assert explorer.locator("img").first.get_attribute("src") != sources[0]


def test_two_explorers_do_not_move_each_other(visit: Visit) -> None:
    landscape, attack = visit.explorer("Landscape explorer"), visit.explorer("Attack explorer")
    others = said(attack), drawing(attack)
    landscape.get_by_label("t", exact=True).fill("0")
    assert "t = −1:" in said(landscape)
    assert (said(attack), drawing(attack)) == others


def test_controls_are_labelled_and_the_page_stays_in_its_width(visit: Visit) -> None:
    ids = visit.page.evaluate(
        "[...document.querySelectorAll('.hessnb-explorer [id], .hessnb-explorer')].map(e => e.id)"
    )
    assert len(ids) == len(set(ids)) == 2 + 6
    controls = visit.page.locator(".hessnb-explorer select, .hessnb-explorer input")
    assert controls.count() == 6
    assert controls.evaluate_all(
        "controls => controls.every(c => c.labels.length == 1 && c.labels[0].innerText.trim())"
    )
    images = visit.page.locator(".hessnb-explorer img")
    assert images.evaluate_all("images => images.every(image => image.alt.length > 10 && image.naturalWidth >= 28)")
    assert visit.page.locator(".hessnb-explorer svg[role=img]").get_attribute("aria-label")
    assert visit.page.locator(".hessnb-explorer [role=status]").count() == 2
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert visit.page.evaluate(overflow) <= 0
    inside = "boxes => boxes.every(box => box.scrollWidth <= box.clientWidth + 1)"
    assert visit.page.locator(".hessnb-explorer").evaluate_all(inside)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_curves_stand_out_in_both_themes(visit: Visit, theme: str) -> None:
    visit.page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
    contrasts = visit.page.evaluate(CONTRASTS)
    assert len(contrasts) > 10
    for what, contrast in contrasts:
        assert contrast >= (3 if what in ("circle", "rect", "i") else 4.5), (what, contrast)


# The contrast (WCAG 2) of each text, mark and bar with the nearest background that is not transparent.
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const kinds = "label, select, .hessnb-value, p, th, td, small, svg text, circle, rect, i";
  return [...document.querySelectorAll(".hessnb-explorer")].flatMap((root) => [...root.querySelectorAll(kinds)])
    .filter((e) => e.tagName !== "I" || e.getBoundingClientRect().width > 1)
    .map((e) => {
      const style = getComputedStyle(e), drawn = e instanceof SVGElement;
      const colour = drawn ? style.fill : e.tagName === "I" ? style.backgroundColor : style.color;
      const [a, b] = [light(colour), light(behind(e.tagName === "I" ? e.parentElement : e))].sort((x, y) => y - x);
      return [e.tagName.toLowerCase(), (a + 0.05) / (b + 0.05)];
    });
}"""

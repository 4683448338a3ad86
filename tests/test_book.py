"""The pipeline on a small book of its own: what runs again, what is gated, and that the last good HTML survives."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from hessnb import book, notebooks, staging
from hessnb.book import Parameters, build
from hessnb.errors import InputError, RunFailed

ROOT = Path(__file__).parents[1]
SMOKE = Parameters(profile="smoke")
CHAPTER = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Chapter {number}

Some prose.

```{{code-cell}} ipython3
:tags: [parameters]

profile = "quick"
seeds = None
device = "cpu"
store = None
```

```{{code-cell}} ipython3
{code}
```
"""


def chapter(root: Path, number: str, code: str = 'print("the profile is", profile)') -> Path:
    path = root / "notebooks" / f"{number}_chapter.md"
    path.write_text(CHAPTER.format(number=number, code=code))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A book of an intro and two chapters."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "book").mkdir()
    (tmp_path / "_config.yml").write_text(
        "title: small\nonly_build_toc_files: true\nexecute: {execute_notebooks: 'off'}\n"
        "repository:\n  url: https://github.com/hessnb/small\n  branch: main\n"
    )
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nchapters:\n"
        "- file: notebooks/01_chapter.ipynb\n- file: notebooks/02_chapter.ipynb\n"
    )
    (tmp_path / "book" / "intro.md").write_text("# A small book\n\nSee {doc}`/notebooks/01_chapter`.\n")
    chapter(tmp_path, "01")
    chapter(tmp_path, "02")
    return tmp_path


def test_small_book_from_first_build_to_failure_and_back(project: Path) -> None:
    said: list[str] = []

    def run() -> list[str]:
        said.clear()
        build(project, SMOKE, say=said.append)
        return sorted(line.split(":")[0] for line in said if "executing" in line)

    assert run() == ["01_chapter", "02_chapter"]
    html = project / "book" / "_build" / "html"
    page = (html / "notebooks" / "01_chapter.html").read_text()
    assert "the profile is smoke" in page
    assert "seeds = None" not in page, "the parameter cell is hidden"
    assert "# Parameters" not in page, "the injected cell is hidden"

    assert run() == []
    assert any("nothing changed" in line for line in said)

    source = project / "notebooks" / "02_chapter.md"
    source.write_text(source.read_text().replace("Some prose", "Other prose"))
    assert run() == ["02_chapter"]
    assert "Other prose" in (html / "notebooks" / "02_chapter.html").read_text()

    before = {path: path.read_bytes() for path in html.rglob("*.html")}
    chapter(project, "01", "x = {}\nx['absent']")
    with pytest.raises(RunFailed, match=r"01_chapter.*KeyError.*last good HTML is unchanged"):
        run()
    assert {path: path.read_bytes() for path in html.rglob("*.html")} == before
    assert (project / "book" / "_build" / "failed" / "01_chapter.ipynb").exists()

    chapter(project, "01")
    intro = project / "book" / "intro.md"
    intro.write_text("# A small book\n\nSee {doc}`/notebooks/07_absent`.\n")
    with pytest.raises(RunFailed, match="07_absent"):
        run()
    assert {path: path.read_bytes() for path in html.rglob("*.html")} == before

    intro.write_text("# A small book, mended\n")
    html.rename(html.with_name("html.old"))  # as a kill between the two renames would leave it
    assert run() == []
    assert "mended" in (html / "book" / "intro.html").read_text()


def test_fingerprint_of_a_chapter_covers_data_sets_and_versions(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HESSNB_DATA", str(tmp_path / "data"))
    source = project / "notebooks" / "01_chapter.md"
    seen = [book._fingerprint(project, source, SMOKE)]

    def changed() -> bool:
        seen.append(book._fingerprint(project, source, SMOKE))
        return seen[-1] not in seen[:-1]

    assert not changed()
    unpacked = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    unpacked.parent.mkdir(parents=True)
    unpacked.touch()
    assert changed(), "what torchvision left is a data set, too"
    npz = tmp_path / "data" / "mnist.npz"
    npz.touch()
    assert changed()
    npz.write_bytes(b"more")
    assert changed()
    os.utime(npz, (0, 0))
    assert changed()
    monkeypatch.setattr(book, "version", lambda package: "99" if package == "numpy" else version(package))
    assert changed()


def test_chapters_run_at_once_and_a_failure_costs_no_other(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    wait = "import os, pathlib, time\n\npathlib.Path(f'here_{number}').touch()\n"
    wait += "while not pathlib.Path(f'here_{other}').exists():\n    time.sleep(0.05)\n"  # for ever, unless both run
    chapter(project, "01", f"number, other = 1, 2\n{wait}raise KeyError('absent')")
    chapter(project, "02", f"number, other = 2, 1\n{wait}time.sleep(1)\nprint(os.environ['OMP_NUM_THREADS'], 'each')")
    here = Path.cwd()
    with pytest.raises(RunFailed, match="01_chapter"):
        build(project, SMOKE, say=lambda _: None)
    kept = project / "book" / "_build" / "executed" / "smoke" / "02_chapter.ipynb"
    assert "2 each" in kept.read_text(), "four cores, two chapters: two threads each"
    assert (project / "notebooks" / "here_1").exists(), "a kernel runs where its notebook lies"
    assert Path.cwd() == here
    assert "OMP_NUM_THREADS" not in os.environ


def test_only_the_chapters_asked_for_run_again(project: Path) -> None:
    said: list[str] = []
    build(project, SMOKE, say=said.append)
    for number in ("01", "02"):
        chapter(project, number, 'print("new")')
    said.clear()
    build(project, SMOKE, chapters=("2",), say=said.append)
    assert [line for line in said if "executing" in line] == ["02_chapter: executing with profile smoke"]
    assert "01_chapter: as last executed" in said
    with pytest.raises(InputError, match="unknown chapter '9'"):
        build(project, SMOKE, chapters=("9",), say=said.append)


def test_a_store_that_is_none_is_refused_before_a_chapter_runs(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    said: list[str] = []
    with pytest.raises(InputError, match="file is neither a store nor an empty folder"):
        build(project, replace(SMOKE, store=str(path)), say=said.append)
    assert said == []


def test_captions_of_an_executed_notebook_are_compared(project: Path) -> None:
    figure = "---\nmystnb:\n  figure: {name: fig-x, caption: %s}\n---\nx = 1"
    source = chapter(project, "01", figure % "A caption")
    executed = notebooks.to_notebook(source)
    assert notebooks.comes_from(executed, source)
    executed.cells.insert(3, nbformat.v4.new_code_cell("profile = 'x'", metadata={"tags": ["injected-parameters"]}))
    assert notebooks.comes_from(executed, source)
    assert not notebooks.comes_from(executed, chapter(project, "01", figure % "Another caption"))


def test_notebooks_executed_elsewhere_are_gated_and_published(project: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    notebooks.sync(project)
    for source in notebooks.sources(project):
        papermill.execute_notebook(
            str(source.with_suffix(".ipynb")),
            str(away / f"{source.stem}.ipynb"),
            {"profile": "paper"},
            progress_bar=False,
        )
    build(project, SMOKE, executed=away, say=lambda text: None)
    page = (project / "book" / "_build" / "html" / "notebooks" / "02_chapter.html").read_text()
    assert "the profile is paper" in page

    last_good = (project / "book" / "_build" / "html" / "index.html").read_bytes()
    for old, new in (("the profile is", "profile:"), ("Some prose", "Other prose")):
        source = project / "notebooks" / "02_chapter.md"
        as_executed = source.read_text()
        source.write_text(as_executed.replace(old, new))
        with pytest.raises(InputError, match=r"away/02_chapter.ipynb was executed from another version.* execute"):
            build(project, SMOKE, executed=away, say=lambda text: None)
        source.write_text(as_executed)
    assert (project / "book" / "_build" / "html" / "index.html").read_bytes() == last_good

    path = away / "02_chapter.ipynb"
    good = nbformat.read(path, as_version=4)
    failed = nbformat.from_dict(good)
    failed.metadata.papermill.exception = True
    nbformat.write(failed, path)
    with pytest.raises(RunFailed, match="exception"):
        build(project, SMOKE, executed=away, say=lambda text: None)
    failed.metadata.papermill.exception = None
    failed.cells[-1].execution_count = None
    nbformat.write(failed, path)
    with pytest.raises(RunFailed, match="not executed"):
        build(project, SMOKE, executed=away, say=lambda text: None)
    path.unlink()
    with pytest.raises(InputError, match="02_chapter.ipynb is not there"):
        build(project, SMOKE, executed=away, say=lambda text: None)


def test_sync_is_deterministic_and_check_finds_what_differs(project: Path) -> None:
    assert len(notebooks.sync(project)) == 2
    first = {path: path.read_bytes() for path in project.glob("notebooks/*.ipynb")}
    assert notebooks.sync(project) == []
    assert notebooks.check(project) == []
    for path in first:
        path.unlink()
    notebooks.sync(project)
    assert {path: path.read_bytes() for path in first} == first
    path = next(iter(first))
    path.write_bytes(first[path].replace(b"prose", b"words"))
    assert [re.search("differs from", fault) is not None for fault in notebooks.check(project)] == [True]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("\n".join(f"x{i} = {i}" for i in range(26)), "more than 25 lines"),
        ("def f():\n    return 1", "belongs into"),
        ("class A:\n    pass", "belongs into"),
        ("async def f():\n    return 1", "belongs into"),
        ("f = lambda: 1", "belongs into"),
        ("f: object = lambda: 1", "belongs into"),
        ("print((f := lambda: 1)())", "belongs into"),
        ("%matplotlib inline", "not plain Python (invalid syntax in its line 1: %matplotlib inline)"),
        ("x = 1\n!ls", "not plain Python (invalid syntax in its line 2: !ls)"),
        ("x = (", "not plain Python ('(' was never closed in its line 1: x = ()"),
        ('caption = "Compare {numref}`tab-x`."', "refers to another place"),
        ("---\nmystnb:\n  figure: {caption: A caption}\n---\nx = 1", "has no name and caption"),
        (
            "---\nmystnb:\n  figure: {name: fig-x, caption: A caption}\n  image: {alt: a picture}\n---\nx = 1",
            "has no alternative text of at least 20",
        ),
    ],
)
def test_check_finds_what_does_not_belong_into_a_cell(project: Path, code: str, fault: str) -> None:
    chapter(project, "01", code)
    notebooks.sync(project)
    (found,) = notebooks.check(project)
    assert found.startswith("01_chapter.md: ")
    assert fault in found


def test_check_lets_a_key_for_sorting_pass(project: Path) -> None:
    chapter(project, "01", "print(sorted([-1, 2], key=lambda x: x * x))")
    notebooks.sync(project)
    assert notebooks.check(project) == []


def test_check_finds_a_notebook_without_a_source(project: Path) -> None:
    notebooks.sync(project)
    (project / "notebooks" / "scratch.ipynb").touch()
    (project / "notebooks" / "99_gone.ipynb").touch()
    (fault,) = notebooks.check(project)
    assert fault.startswith("99_gone.ipynb has no source 99_gone.md; remove it")


def test_check_finds_parameters_that_are_not_plain_python(project: Path) -> None:
    path = project / "notebooks" / "01_chapter.md"
    path.write_text(path.read_text().replace("seeds = None", "%time seeds = None"))
    notebooks.sync(project)
    python, parameters = notebooks.check(project)
    assert "not plain Python" in python
    assert "must set profile, seeds, device, store" in parameters


def test_code_that_is_not_plain_python_is_staged_as_it_is(project: Path, tmp_path: Path) -> None:
    chapter(project, "01", "%%time\nx = 1")
    executed = [source.with_suffix(".ipynb") for source in notebooks.sources(project)]
    notebooks.sync(project)
    staging.stage(project, executed, tmp_path / "site")
    cell = nbformat.read(tmp_path / "site" / "notebooks" / "01_chapter.ipynb", as_version=4).cells[-1]
    assert cell.source == "%%time\nx = 1"
    assert "hide-input" not in cell.metadata.get("tags", [])


def test_figures_of_an_executed_notebook_need_a_name_a_caption_and_an_alternative_text() -> None:
    figure = {"name": "fig-x", "caption": "A caption"}

    def faults(metadata: dict[str, Any]) -> list[str]:
        output = nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})
        cell = nbformat.v4.new_code_cell("x", metadata=metadata, outputs=[output])
        return notebooks.undescribed(nbformat.v4.new_notebook(cells=[cell]))

    assert faults({"mystnb": {"figure": figure, "image": {"alt": "A curve that falls from left to right"}}}) == []
    (unnamed,) = faults({})
    assert "has no name and caption" in unnamed
    (brief,) = faults({"mystnb": {"figure": figure, "image": {"alt": "a picture"}}})
    assert "has no alternative text of at least 20" in brief


def undescribed_in(mime: str, text: str) -> list[str]:
    output = nbformat.v4.new_output("display_data", data={mime: text})
    return notebooks.undescribed(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])]))


@pytest.mark.parametrize(
    ("attributes", "described"),
    [
        *(
            (told, False)
            for told in ("", "alt", "title='A digit'", 'alt=""', "alt=' '", "data-alt='A digit'", "title=\"alt='x'\"")
        ),
        *((told, True) for told in ('alt="A digit"', "alt='A digit'", "alt = ' A digit'", "ALT=digit")),
    ],
)
def test_pictures_need_an_alternative_text_that_is_not_empty(attributes: str, described: bool) -> None:
    tag = f"<IMG src='x' {attributes}>"
    script = '<script type="application/json">' + json.dumps({"a": ["b", tag]}).replace("</", "<\\/") + "</script>"
    for html in (tag, f"<p>&amp;</p>{script}", f"<script>f(1 < 2)</script>{tag}"):
        assert bool(undescribed_in("text/html", html)) is not described
    assert bool(undescribed_in("text/markdown", f"for $a<b$ {tag}, $c>d$")) is not described


@pytest.mark.parametrize(
    ("svg", "described"),
    [
        ("<svg></svg>", False),
        ("<svg>", False),
        ('<svg aria-label=" "><path d="M0 0"/></svg>', False),
        ("<svg><title> </title></svg>", False),
        ("<svg><g><title>of a part</title></g></svg>", False),
        ("<svg><svg><title>of a part</title></svg></svg>", False),
        ("<svg></svg><svg aria-label='A curve'><title>A curve</title></svg>", False),
        ('<svg role="img" aria-label="A curve that falls"></svg>', True),
        ("<svg>\n <title>A curve that falls</title><path d='M0 0'/></svg>", True),
        ('<svg aria-hidden="true"></svg> falls', True),
    ],
)
def test_drawings_in_html_need_a_label_unless_they_are_hidden(svg: str, described: bool) -> None:
    for mime in ("text/html", "text/markdown"):
        assert bool(undescribed_in(mime, svg)) is not described


def test_html_that_cannot_be_read_is_no_crash() -> None:
    (found, *_) = undescribed_in("text/html", "<img src='x'><![x[ ]>")
    assert "<img> without an alternative text" in found


def test_a_drawing_inside_another_is_a_part_of_it() -> None:
    assert undescribed_in("text/html", '<svg aria-label="Two curves"><svg></svg></svg>') == []


@pytest.mark.parametrize(
    ("text", "described"),
    [("![](x.png)", False), ("![ ][x]", False), ("![A digit](x.png)", True), ("A link [](x), a list ![]", True)],
)
def test_pictures_in_markdown_need_an_alternative_text(text: str, described: bool) -> None:
    assert bool(undescribed_in("text/markdown", text)) is not described


def test_check_finds_wrong_parameters(project: Path) -> None:
    path = project / "notebooks" / "01_chapter.md"
    path.write_text(path.read_text().replace("seeds = None\n", ""))
    notebooks.sync(project)
    assert any("must set profile, seeds, device, store" in line for line in notebooks.check(project))


def test_committed_notebooks_agree_with_their_sources_and_have_no_outputs() -> None:
    assert notebooks.check(ROOT) == []
    for source in notebooks.sources(ROOT):
        notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        nbformat.validate(notebook)
        assert all(not cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("source", notebooks.sources(ROOT), ids=lambda source: source.stem)
def test_each_chapter_runs_alone_under_papermill(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    given = {"profile": "smoke", "store": str(tmp_path / "store")}
    papermill.execute_notebook(
        str(source.with_suffix(".ipynb")), str(out), given, cwd=str(source.parent), progress_bar=False
    )
    executed = nbformat.read(out, as_version=4)
    assert executed.metadata.papermill.exception is None

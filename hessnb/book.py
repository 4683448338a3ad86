"""Build the book: execute the notebooks, gate on failure, let Jupyter Book make the HTML, replace the last good one.

    book/_build/executed/<profile>/NN_slug.ipynb    executed notebooks, with the fingerprint of what they came from
    book/_build/failed/NN_slug.ipynb                the notebook that stopped the last build, for a look
    book/_build/site/                               staging folder: what Jupyter Book saw last
    book/_build/html/                               the last good HTML

A chapter runs again when its source, the package, its parameters, the record, the data sets that are there, or the
versions of Python and of what it computes with have changed; the HTML is made again when anything that the pages are
made from has. On a CPU as many chapters run at once as it has cores: their networks are small, and one thread each
wastes least. The store's locks keep two from doing the same work.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue

import nbformat
import torch
from filelock import FileLock, Timeout

import hessnb
from hessnb import data, notebooks, staging
from hessnb.data import check_device
from hessnb.errors import InputError, RunFailed, whole_number
from hessnb.experiments.files import write_whole
from hessnb.experiments.profile import load_profile
from hessnb.experiments.provenance import device_name
from hessnb.experiments.store import Store, store_root

Say = Callable[[str], None]

# Beside torch, the packages whose versions can change what a chapter prints or draws.
_COMPUTE = ("numpy", "scipy", "pandas", "scikit-learn", "mlxtend", "torchvision", "pyautoattack")
_DRAW = ("matplotlib", "pillow", "ipywidgets")

# Chapters at once, whatever the number of cores: each may want gigabytes.
_AT_MOST = 4


@dataclass(frozen=True)
class Parameters:
    """What is injected into each notebook; the names are those of its cell tagged ``parameters``."""

    profile: str = "quick"
    seeds: int | None = None
    device: str = "cpu"
    store: str | None = None


def build(
    root: Path,
    parameters: Parameters,
    *,
    chapters: tuple[str, ...] = (),
    executed: Path | None = None,
    say: Say = print,
) -> Path:
    """Build the book of the project at ``root`` and return the path of its first page.

    ``chapters`` limits which notebooks may run; those never executed run all the same. ``executed`` is a folder of
    notebooks that were executed elsewhere, which are published as they are.

    Raises InputError for an unknown chapter or profile, less than one seed, a folder that is no store, a notebook that
    was executed from another version of its source, or a build that is already going on, and RunFailed, leaving the
    last good HTML as it is, when a notebook raises or Jupyter Book warns.
    """
    load_profile(parameters.profile)
    if parameters.seeds is not None:
        whole_number("seeds", parameters.seeds)
    if not executed:
        Store(parameters.store)  # a kernel would refuse it no sooner than a chapter needs it
    may_run = notebooks.select(root, chapters)
    work = root / "book" / "_build"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / ".lock", timeout=0):
            if executed:
                sources = [_executed_elsewhere(source, executed) for source in notebooks.sources(root)]
            else:
                sources = _executed_here(root, parameters, may_run, say)
            return _publish(root, sources, say)
    except Timeout:
        raise InputError(f"another build is going on in {work}; wait for it to end") from None


# -- executing -----------------------------------------------------------------------------------------------------


def _executed_here(root: Path, parameters: Parameters, may_run: Sequence[Path], say: Say) -> list[Path]:
    """Return the executed notebook of each source, after executing those that need it and may be."""
    targets, missing = [], []
    for source in notebooks.sources(root):
        target = root / "book" / "_build" / "executed" / Path(parameters.profile).stem / f"{source.stem}.ipynb"
        fingerprint, may = _fingerprint(root, source, parameters), source in may_run
        targets.append(target)
        if target.exists() and (not may or _fingerprint_of(target) == fingerprint):
            say(f"{source.stem}: unchanged" if may else f"{source.stem}: as last executed")
        else:
            missing.append((source, target, fingerprint))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(cores, _AT_MOST, max(1, len(missing))) if parameters.device == "cpu" else 1

    def executing(source: Path, target: Path, fingerprint: str) -> Callable[[], None]:
        return lambda: _execute_into(target, root, source, parameters, fingerprint, say)

    with _threads_of_kernels(max(1, cores // at_once)):
        _carry_out([executing(*one) for one in missing], at_once)
    return targets


@contextmanager
def _threads_of_kernels(n: int) -> Iterator[None]:
    """Let kernels started meanwhile compute with ``n`` threads each, unless the user has said how many."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        os.environ["OMP_NUM_THREADS"] = str(n)
    try:
        yield
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


def _carry_out(jobs: Sequence[Callable[[], None]], at_once: int) -> None:
    """Do jobs, some at once; when one raises start no further one, let those under way end, and raise what it raised.

    Every second worker begins with the last job: the last chapters are the longest, and started last each would end
    alone. The threads do not keep the interpreter alive, so that an interrupt ends everything.
    """
    waiting, ended = deque(jobs), SimpleQueue[BaseException | None]()

    def work(take: Callable[[], Callable[[], None]]) -> None:
        fault: BaseException | None = None
        while fault is None:
            try:
                job = take()
            except IndexError:
                break
            try:
                job()
            except BaseException as error:
                waiting.clear()
                fault = error
        ended.put(fault)

    for number in range(at_once):
        take = waiting.pop if number % 2 else waiting.popleft
        threading.Thread(target=work, args=(take,), daemon=True).start()
    faults = [ended.get() for _ in range(at_once)]
    for fault in faults:
        if fault is not None:
            raise fault


def _execute_into(target: Path, root: Path, source: Path, parameters: Parameters, fingerprint: str, say: Say) -> None:
    """Execute a chapter and keep the notebook, with what it came from."""
    say(f"{source.stem}: executing with profile {parameters.profile}")
    started = time.perf_counter()
    notebook = _execute(root, source, parameters)
    notebook.metadata["hessnb"] = {
        "fingerprint": fingerprint,
        "parameters": asdict(parameters),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{device_name(check_device(parameters.device))}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, nbformat.writes(notebook).encode())
    say(f"{source.stem}: done in {time.perf_counter() - started:.0f} s")


def _execute(root: Path, source: Path, parameters: Parameters) -> nbformat.NotebookNode:
    """Execute a notebook with papermill and return it; raise RunFailed, naming the cell, when one raises."""
    import papermill

    failed = root / "book" / "_build" / "failed" / f"{source.stem}.ipynb"
    failed.parent.mkdir(parents=True, exist_ok=True)
    plain = failed.with_suffix(".source.ipynb")
    nbformat.write(notebooks.to_notebook(source), plain)
    given = {name: value for name, value in asdict(parameters).items() if value is not None}
    try:
        papermill.execute_notebook(
            str(plain),
            str(failed),
            given,
            kernel_name="python3",
            # Where the kernel runs; papermill's own cwd changes the folder of this whole process.
            resources={"metadata": {"path": str(source.parent.resolve())}},
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],  # the kernel would warn of its own loopback socket
        )
    except papermill.PapermillExecutionError as error:
        raise RunFailed(
            f"{source.name}: cell {error.exec_count} raised {error.ename}: {error.evalue.strip()}; the notebook as far "
            f"as it came is {failed}, the last good HTML is unchanged"
        ) from error
    finally:
        plain.unlink(missing_ok=True)
    notebook: nbformat.NotebookNode = nbformat.read(failed, as_version=4)
    failed.unlink()
    _gate(notebook, source.stem)
    return notebook


def _executed_elsewhere(source: Path, folder: Path) -> Path:
    path = folder / f"{source.stem}.ipynb"
    if not path.exists():
        raise InputError(f"{path} is not there: the folder given with --executed must hold every chapter")
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises what JSON and its schemas raise
        raise InputError(f"{path} cannot be read as a notebook: {error}") from error
    if not notebooks.comes_from(notebook, source):
        raise InputError(
            f"{path} was executed from another version of {source.name}; execute {source.stem}.ipynb as it is now, "
            "with parameters given to papermill, or publish from the checkout that it was executed in"
        )
    _gate(notebook, source.stem)
    return path


def _gate(notebook: nbformat.NotebookNode, name: str) -> None:
    """Raise RunFailed unless every code cell ran, none raised, and every picture is described.

    A failed notebook looks whole to Jupyter Book, and so does a page with pictures that say nothing to those who do
    not see them.
    """
    if notebook.metadata.get("papermill", {}).get("exception"):
        raise RunFailed(f"{name}: papermill recorded an exception in it")
    for cell in notebook.cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if any(output.output_type == "error" for output in cell.outputs):
            raise RunFailed(f"{name}: cell {cell.id} holds an error")
        if cell.execution_count is None:
            raise RunFailed(f"{name}: cell {cell.id} was not executed")
    if faults := notebooks.undescribed(notebook):
        raise RunFailed(f"{name}: {'; '.join(faults)}")


def _fingerprint(root: Path, source: Path, parameters: Parameters) -> str:
    """Return a digest of all that a chapter's outputs depend on."""
    files = [source, *_package(), *_files(root / "book" / "record", ("*.json",))]
    if parameters.profile.endswith(".toml"):
        files.append(Path(parameters.profile))
    told = asdict(parameters) | {"store": str(store_root(parameters.store).resolve())}
    return _digest(files, json.dumps([told, _versions(), _data_sets()], sort_keys=True))


def _data_sets() -> list[tuple[str, str | None, int, int]]:
    """Return of each data set where it would be read from, and the size and time of its file, if it is in one."""
    found = []
    for name in data.NAMES:
        file = data.data_root() / f"{name}.npz"
        told = file.stat() if file.is_file() else None
        found.append((name, data.where(name), told.st_size if told else 0, told.st_mtime_ns if told else 0))
    return found


def _fingerprint_of(executed: Path) -> str | None:
    try:
        told: dict[str, str] = json.loads(executed.read_text())["metadata"].get("hessnb", {})
    except (OSError, ValueError, KeyError):
        return None
    return told.get("fingerprint")


# -- publishing ----------------------------------------------------------------------------------------------------


def _publish(root: Path, executed: list[Path], say: Say) -> Path:
    """Stage the pages, build the HTML, and put it in the place of the last one; nothing if nothing changed."""
    work = root / "book" / "_build"
    site, html, fresh = work / "site", work / "html", work / "html.new"
    _recover(html, work / "html.old")
    fingerprint = _fingerprint_of_pages(root, executed)
    marker = html / ".fingerprint"
    if marker.exists() and marker.read_text() == fingerprint:
        say(f"nothing changed: {html / 'index.html'}")
        return html / "index.html"
    say("building the HTML")
    shutil.rmtree(site, ignore_errors=True)
    shutil.rmtree(fresh, ignore_errors=True)
    staging.stage(root, executed, site)
    log = work / "sphinx.log"
    command = [
        *(sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(site)),
        *("--path-output", str(fresh), "--all", "-W", "-n", "--keep-going"),
    ]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"})
    built = fresh / "_build" / "html"
    if done.returncode != 0 or not (built / "index.html").exists():
        lines = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
        told = "\n".join(lines) or log.read_text()[-2000:]
        raise RunFailed(
            f"Jupyter Book warned or failed; the last good HTML is unchanged; all of it is in {log}:\n{told}"
        )
    staging.offer_sources(root, built)
    (built / ".fingerprint").write_text(fingerprint)
    shutil.rmtree(work / "html.old", ignore_errors=True)
    if html.exists():
        html.rename(work / "html.old")
    built.rename(html)
    shutil.rmtree(work / "html.old", ignore_errors=True)
    shutil.rmtree(fresh, ignore_errors=True)
    return html / "index.html"


def _recover(html: Path, old: Path) -> None:
    """Bring the last good HTML back if a build was killed between taking it away and putting the new one there."""
    if old.exists() and not html.exists():
        old.rename(html)


# -- digests -------------------------------------------------------------------------------------------------------


def _fingerprint_of_pages(root: Path, executed: list[Path]) -> str:
    """Return a digest of all that the pages are made from."""
    prose = [path for path in _files(root / "book", ("*",)) if (root / "book" / "_build") not in path.parents]
    files = [root / "_config.yml", root / "_toc.yml", *prose, *notebooks.sources(root)]
    return _digest(files, _digest([*executed, *_package()], json.dumps(_versions())), base=root)


def _package() -> list[Path]:
    return _files(Path(hessnb.__file__).parent, ("*.py", "*.toml", "*.csv", "*.js", "*.css"))


def _versions() -> list[str | None]:
    return [platform.python_version(), str(torch.__version__), *map(_version, _COMPUTE + _DRAW)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # of an attack that a chapter can do without
        return None


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _digest(files: Iterable[Path], more: str, *, base: Path | None = None) -> str:
    """Return a digest of the files' names (relative to ``base``, else bare) and contents, and of ``more``."""
    digest = hashlib.sha256(more.encode())
    for path in files:
        digest.update(str(path.relative_to(base) if base else path.name).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

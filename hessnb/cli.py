"""The command line: run the paper's artefacts, see what is there, publish the record, build the book."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import hessnb
from hessnb import data
from hessnb.errors import InputError, RunFailed
from hessnb.experiments import archive, campaign, grid, record, status
from hessnb.experiments.estimate import Estimates, seconds_of
from hessnb.experiments.measure import Report
from hessnb.experiments.profile import load_profile, profile_names
from hessnb.experiments.results import ended
from hessnb.experiments.store import Store

# A path may hold :x: or [/b]: it is shown as it is.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


class _Place(click.Path):
    """A path that is named: an empty one would be the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; raise InputError for an empty one."""
        if param and value == "":
            raise InputError(f"{param.opts[0]} is empty (an unset variable?): name a folder, or leave the option out")
        return super().convert(value, param, ctx)


@contextmanager
def _extra_of_the_book() -> Iterator[None]:
    """Raise InputError, naming what to install, for a package that the body imports and that is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"this command needs the package {error.name}: pip install 'hessnb[book]'") from error


store_option = click.option(
    "--store",
    type=_Place(),
    help="Folder of results. Default: $HESSNB_STORE, else the user's data folder.",
)
profile_option = click.option(
    "--profile",
    default="quick",
    show_default=True,
    help="Scale: smoke, quick, laptop, paper, or a TOML file of your own.",
)
device_option = click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
root_option = click.option("--root", type=_Place(), help="Data folder. Default: $HESSNB_DATA, else the user's cache.")
seeds_option = click.option("--seeds", type=int, help="How many seeds, from 0. Default: what the profile says.")


class Commands(click.Group):
    """A group that turns hessnb's own errors into one line and an exit code: 2 bad input, 1 failed, 130 stopped."""

    def invoke(self, context: click.Context) -> Any:
        """Carry out a command; see the class."""
        try:
            return super().invoke(context)
        except InputError as error:
            self._stop(error, 2)
        except RunFailed as error:
            self._stop(error, 1)
        except KeyboardInterrupt:
            self._stop("stopped; what was finished is kept, and the same command goes on from there", 130)

    @staticmethod
    def _stop(message: object, code: int) -> None:
        click.echo(f"hessnb: {message}", err=True)
        sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(hessnb.__version__, prog_name="hessnb")
def main() -> None:
    """Re-do "Hessian-based Analysis of Large Batch Training and Robustness to Adversaries" (Yao et al., 2018).

    \b
    To begin:
        hessnb run table7                       Table 7 on real digits, minutes
        hessnb status                           what is there, what is missing
        hessnb data fetch mnist                 the published data
        hessnb run table7 --profile laptop      the same on all of MNIST, hours
        hessnb run all --profile paper --time-budget 9m --device cuda
                                                all of the paper, nine minutes of it at a time
        hessnb store export DEST                finished runs, to be imported elsewhere
        hessnb record --check                   whether every published number says where it came from
        hessnb book                             execute the notebooks, build the HTML

    Exit codes: 0 done, 1 a training or a notebook failed, 2 bad input, 130 interrupted.
    Whatever is interrupted goes on from where it stopped when the same command is given again.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have what its encoding lacks: as on the standard error
        sys.stdout.reconfigure(errors="backslashreplace")


@main.command()
@click.argument("artefacts", nargs=-1)
@profile_option
@seeds_option
@click.option(
    "--time-budget",
    help="Stop in time: 90s, 9m, 2h30m, counted from when hessnb has loaded. Default: when all is done.",
)
@device_option
@store_option
def run(
    artefacts: tuple[str, ...],
    profile: str,
    seeds: int | None,
    time_budget: str | None,
    device: str,
    store: Path | None,
) -> None:
    """Compute what ARTEFACTS (table7, fig1; "all" or none: all) need and the store lacks.

    One seed is finished for all of its batch sizes before the next one starts, and what costs little before what costs
    much. Finished epochs and results are kept: interrupt it when you like and give the same command again. With a time
    budget it ends with what was reached, exit code 0, and says what is left. What cannot be computed whatever the time
    (a network was imported without its weights) is said, and the exit code is 2.
    """
    budget = None if time_budget is None else seconds_of(time_budget)
    tasks = grid.plan(grid.chosen(artefacts), load_profile(profile), seeds)
    opened = Store(store)
    with _progress() as report:
        refused = campaign.carry_out(opened, tasks, device=device, budget=budget, report=report)
    estimates = Estimates(opened, data.check_device(device))
    rest = campaign.rest(opened, tasks, estimates)
    failed = [task.spec for task in tasks if task.spec in estimates.failed]
    for refusal in refused:
        _say(refusal.line)
    trained = rest.trainings - rest.trainings_left - rest.trainings_lost
    if rest.left == "nothing":
        _say(f"{trained} of {rest.trainings} networks trained and measured")
    else:
        _say(
            f"{trained} of {rest.trainings} networks trained, {rest.measures - rest.measures_left} of {rest.measures} "
            f"measures taken; left: {rest.left}; the same command goes on from here"
        )
    if impossible := sum(refusal.impossible for refusal in refused):
        raise InputError(f"{impossible} measure(s) cannot be taken here: see above")
    if failed:
        lines = "; ".join(f"{spec.label}: {result.reason}" for spec in failed if (result := opened.result(spec)))
        raise RunFailed(f"{len(failed)} training(s) failed, kept with their history: {lines}")


@main.command("status")
@profile_option
@seeds_option
@click.option("--all", "all_profiles", is_flag=True, help="All profiles, not only one.")
@device_option
@store_option
def status_command(profile: str, seeds: int | None, all_profiles: bool, device: str, store: Path | None) -> None:
    """Say for each artefact what is there, what is missing, and about how long the rest will take on this machine.

    The estimates come from what the store holds that was computed on the same processor, and improve as it fills; "at
    least" where some of the work has none yet. What several artefacts share is counted in each of them, and once in the
    last line.
    """
    names = profile_names() if all_profiles else [profile]
    several = len(names) > 1
    columns = ("Artefact", *(("Profile",) if several else ()), "Seeds", "State", "Networks", "Measures", "Left")
    table = Table(*columns, title=None if several else escape(f"Profile {profile}"), pad_edge=False)
    opened = Store(store)
    estimates = Estimates(opened, data.check_device(device))
    for name in names:
        for line in status.lines(opened, load_profile(name), estimates, seeds):
            table.add_row(
                line.artefact, *((line.profile,) if several else ()), str(line.seeds), line.state,
                f"{line.runs_done}/{line.runs}", f"{line.measures_done}/{line.measures}", line.left,
            )  # fmt: skip
    for column in table.columns:  # no word is cut: where there is no room for them all, the lines are longer
        column.min_width = max(len(word) for cell in (column.header, *column.cells) for word in str(cell).split())
    _print(table, crop=False)


@main.command("record")
@click.argument("artefacts", nargs=-1)
@click.option("--profile", default="paper", show_default=True, help="Which of the package's own profiles.")
@store_option
@click.option("--into", type=_Place(), help="Folder of the record. Default: book/record.")
@click.option("--check", is_flag=True, help="Publish nothing; say what is wrong with the record, exit code 2 if it is.")
def record_command(
    artefacts: tuple[str, ...], profile: str, store: Path | None, into: Path | None, check: bool
) -> None:
    """Publish what the store holds of ARTEFACTS ("all" or none: all): numbers and their provenance, no weights.

    Some batch sizes of a seed are published, too. What was computed by code that was not committed stays out. From the
    book's own record the figure of the README is drawn anew.
    """
    folder = into or record.record_root()
    if folder is None:
        raise InputError("there is no book around this folder; name the record's folder with --into")
    if check:
        if artefacts:
            raise InputError("--check is of the whole record: leave the artefacts out")
        faults = record.check(folder)
        for fault in faults:
            click.echo(fault, err=True)
        if faults:
            raise InputError(f"{len(faults)} fault(s) in {folder}")
        _say(f"{folder}: every number has its place and its provenance")
        return
    published = record.publish(Store(store), folder, profile, artefacts)
    for path in published.changed:
        _say(f"wrote {path}")
    for line in published.refused:
        _say(f"left out {line}")
    _say(f"{len(published.changed)} file(s) changed in {folder}")
    root = record.record_root()
    if root and folder.resolve() == root.resolve():
        from hessnb.figures import cover  # matplotlib takes a second, and is needed here alone

        if drawn := cover.publish(folder):
            _say(f"drew {drawn}")


@main.command("book")
@click.argument("chapters", nargs=-1)
@profile_option
@seeds_option
@device_option
@store_option
@click.option(
    "--executed",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Publish the notebooks of this folder, executed elsewhere with papermill.",
)
def book_command(
    chapters: tuple[str, ...], profile: str, seeds: int | None, device: str, store: Path | None, executed: Path | None
) -> None:
    """Execute the notebooks and build the HTML in book/_build/html.

    CHAPTERS (01, 03, ...) limits which notebooks may run; one that was never executed runs all the same. A notebook
    whose source, package, parameters, data sets and record are unchanged, and the libraries' versions, does not run
    again. When one fails, or Jupyter Book warns, the last good HTML stays.
    """
    with _extra_of_the_book():  # papermill and Sphinx are needed for this command alone
        from hessnb import book

    data.check_device(device)
    # Kernels run in the notebooks' folder.
    profile = str(Path(profile).resolve()) if profile.endswith(".toml") else profile
    for variable in ("HESSNB_STORE", "HESSNB_DATA"):
        if place := os.environ.get(variable):
            os.environ[variable] = str(Path(place).resolve())
    parameters = book.Parameters(profile, seeds, device, str(store.resolve()) if store else None)
    page = book.build(_project(), parameters, chapters=chapters, executed=executed, say=_say)
    _say(f"the book: {page}")


@main.group("notebooks")
def notebooks_group() -> None:
    """Keep the notebooks (.ipynb) equal to their sources (.md)."""


@notebooks_group.command("sync")
def notebooks_sync() -> None:
    """Write each .ipynb anew from its .md, where it differs."""
    with _extra_of_the_book():
        from hessnb import notebooks

    for path in notebooks.sync(_project()):
        _say(f"wrote {path}")


@notebooks_group.command("check")
def notebooks_check() -> None:
    """Exit with 2 when a pair differs, a cell is too long, or a cell holds what belongs into the package."""
    with _extra_of_the_book():
        from hessnb import notebooks

    if faults := notebooks.check(_project()):
        raise InputError("; ".join(faults))
    _say("notebooks and sources agree")


@main.group("store")
def store_group() -> None:
    """Look after the store of results."""


@store_group.command("check")
@store_option
def store_check(store: Path | None) -> None:
    """Read every file of the store and verify its checksum; exit code 2 when one is damaged."""
    opened = Store(store)
    faults = opened.check()
    for fault in faults:
        click.echo(fault, err=True)
    if faults:
        raise InputError(f"{len(faults)} damaged file(s) in {opened.root}")
    _say(f"{opened.root}: every file is whole")


@store_group.command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("artefacts", nargs=-1)
@click.option("--profile", default="paper", show_default=True, help="The scale whose results are exported.")
@click.option("--weights", is_flag=True, help="The trained weights, too: without them nothing more can be measured.")
@click.option("--max-size", default="15MB", show_default=True, help="No archive is larger: 900kB, 15MB, 1GB.")
@store_option
def store_export(
    folder: Path, artefacts: tuple[str, ...], profile: str, weights: bool, max_size: str, store: Path | None
) -> None:
    """Write the finished runs of ARTEFACTS ("all" or none: all) into FOLDER, as archives that `store import` reads.

    Numbers and curves with their provenance, in as many files as their size needs; the same results in the same bytes.
    """
    loaded, opened, limit = load_profile(profile), Store(store), _bytes(max_size)
    outcomes = ended(opened, artefacts, loaded)
    if not outcomes:
        raise InputError(
            f"{opened.root} holds no finished run of these under the profile {loaded.name}; hessnb status --all says "
            "what there is"
        )
    paths = archive.export(opened, folder, loaded.name, outcomes, weights=weights, max_size=limit)
    for path in paths:
        _say(f"wrote {path}")
    _say(f"{len(outcomes)} network(s) in {len(paths)} file(s)")


@store_group.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Take what is imported where the store has another result.")
@store_option
def store_import(files: tuple[Path, ...], replace: bool, store: Path | None) -> None:
    """Merge FILES of `store export` into the store.

    All are verified first. A finished result is not overwritten: the same one stays, a different one is refused, or
    with --replace gives way; a network that gives way takes all that was measured on it with it.
    """
    opened = Store(store)
    done = archive.import_(opened, files, replace=replace)
    _say(f"{len(done.written)} result(s) imported into {opened.root}, {done.there} were there already")


@main.group("data")
def data_group() -> None:
    """See and fetch the data sets."""


@data_group.command("list")
@root_option
def data_list(root: Path | None) -> None:
    """List the data sets, and where each would be read from."""
    table = Table("Set", "Found", title=escape(f"data folder: {data.data_root(root)}"), title_justify="left")
    for name in data.NAMES:
        table.add_row(name, escape(data.where(name, root) or f"missing; get it with: hessnb data fetch {name}"))
    _print(table)


@data_group.command("fetch")
@click.argument("names", nargs=-1, required=True)
@root_option
def data_fetch(names: tuple[str, ...], root: Path | None) -> None:
    """Download published sets (mnist, cifar10, cifar100) with torchvision, or convert what it left here."""
    for name in names:
        _say(f"{name}: {data.fetch(name, root)}")


def _bytes(text: str) -> int:
    """Return the bytes that a size like 15MB stands for."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
    number, unit = text.strip()[:-2], text.strip()[-2:].lower()
    if unit not in units or not number.strip().isdecimal():
        raise InputError(f"size {text!r} cannot be read: write it like 900kB, 15MB or 1GB")
    return int(number) * units[unit]


def _say(text: str) -> None:
    _print(text, soft_wrap=True, highlight=False, markup=False)


def _print(what: str | Table, **how: Any) -> None:
    """Print to standard output; raise InputError where it is a file that cannot be written."""
    try:
        console.print(what, **how)
    except BrokenPipeError:  # who reads has seen enough, as in: hessnb status | head
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python, as it ends, writes what is left again
        raise InputError(
            f"cannot write to the standard output: {error.strerror}; what was done is kept: make room, or write it "
            "elsewhere, and run the same command again"
        ) from error


def _project() -> Path:
    root = record.project_root()
    if root is None:
        raise InputError("there is no book here: change into a checkout of hessnb (the folder with _toc.yml)")
    return root


@contextmanager
def _progress() -> Iterator[Report]:
    """Show one bar for each piece of work on a terminal; elsewhere one line when a piece ends."""
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"), console=errors, disable=not errors.is_terminal,
    )  # fmt: skip
    known: dict[str, TaskID] = {}

    def report(what: str, share: float, detail: str) -> None:
        if bars.disable:
            if share >= 1:
                click.echo(f"{what}: {detail or 'done'}", err=True)
            return
        if what not in known:
            known[what] = bars.add_task(what, total=1.0, detail=detail)
        bars.update(known[what], completed=share, detail=detail)

    with bars:
        yield report


if __name__ == "__main__":
    main()

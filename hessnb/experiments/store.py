"""The store: finished runs and measures on disk, each whole or absent, whatever happens in between.

    <store>/store.json                     the layout's schema
    <store>/locks/<key>.lock               held by the process that works on a run
    <store>/runs/<label>-<key>/
        checkpoint.safetensors             the last epoch that was kept of a training under way
        weights.safetensors, run.json      the trained network; run.json is written last and makes it a result
        <measure>-<key>.json               one thing computed on it
        <measure>-<key>.vectors.safetensors   the eigenvectors that landscapes go along
        <measure>-<key>.partial.safetensors   an eigen-solve under way
        <measure>-<key>.points.txt            the finished points of a landscape under way
        <measure>-<key>.spent, epoch.spent    seconds of work on what was not finished

Every file carries a checksum and is written beside its place, forced to the disk and renamed; finished points are lines
that are added to theirs, each with its checksum. A kill, a full disk or a second process at the same run can cost the
work since the last checkpoint, never a file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from torch import Tensor

from hessnb import points
from hessnb.errors import Held, InputError
from hessnb.experiments.files import (
    clear_errors,
    damaged,
    read_notes,
    read_sealed,
    read_tensors,
    write_sealed,
    write_tensors,
    write_whole,
)
from hessnb.experiments.provenance import device_name
from hessnb.experiments.results import (
    Measurement,
    RunResult,
    measurement_from_json,
    measurement_to_json,
    run_result_from_json,
    run_result_to_json,
)
from hessnb.experiments.spec import Measure, RunSpec
from hessnb.training import Epoch, State

SCHEMA = 1


@dataclass(frozen=True)
class Spent:
    """Seconds of work on what is not finished: all that led to what is kept of it; the longest that led to nothing."""

    kept: float = 0.0
    lost: float = 0.0


def store_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the store's folder: the argument, else ``$HESSNB_STORE``, else the user's data folder."""
    chosen = root or os.environ.get("HESSNB_STORE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("hessnb")) / "store"


class Store:
    """A folder of results. Opening it writes nothing; the first result creates it.

    Methods raise InputError, naming the file and the remedy, for a store of a newer schema, a damaged file, or a
    disk that is full or read-only.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = store_root(root)
        marker = self.root / "store.json"
        if marker.exists():
            schema = read_sealed(marker).get("schema")
            if not isinstance(schema, int) or schema > SCHEMA:
                raise InputError(
                    f"{self.root} was written by a newer hessnb (schema {schema}, this one knows {SCHEMA}); "
                    "update hessnb or choose another folder with --store"
                )
        elif (
            self.root.exists()
            and not (self.root / "locks").is_dir()
            and (self.root.is_file() or any(self.root.iterdir()))
        ):
            raise InputError(f"{self.root} is neither a store nor an empty folder; choose another one with --store")

    def __eq__(self, other: object) -> bool:
        """Whether both are the same folder."""
        return isinstance(other, Store) and other.root == self.root

    def __hash__(self) -> int:
        """Return a hash of the folder, so that what is cached for one is found for the other."""
        return hash(self.root)

    # -- runs ---------------------------------------------------------------------------------------------------

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return the ended training of ``spec``, or None."""
        path = self._folder(spec) / "run.json"
        if not path.exists():
            return None
        return run_result_from_json(read_sealed(path), str(path))

    def save_result(self, result: RunResult, state: State) -> None:
        """Keep an ended training: weights first, then run.json, which makes it a result; then drop the checkpoint.

        Where somebody has removed only the run.json of an earlier training, what was measured on that goes before.
        """
        folder = self._prepare(result.spec)
        if not (folder / "run.json").exists():
            _clear(folder, keep="checkpoint.safetensors")
        if result.status == "done":
            write_tensors(folder / "weights.safetensors", state.model, {"spec": result.spec.canonical()})
        write_sealed(folder / "run.json", run_result_to_json(result))
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def weights(self, spec: RunSpec) -> dict[str, Tensor]:
        """Return the trained weights and buffers by name; raise InputError when there are none."""
        path = self._folder(spec) / "weights.safetensors"
        if not path.exists():
            raise InputError(
                f"{path} is not there: the run has not been trained in this store, or was imported without its weights"
            )
        return read_tensors(path)[0]

    def checkpoint(self, spec: RunSpec) -> State | None:
        """Return the state after the last epoch that was kept of a training under way, or None."""
        path = self._folder(spec) / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, notes = read_tensors(path)
        return state_from_tensors(tensors, [Epoch(**line) for line in notes["history"]])

    def save_checkpoint(self, spec: RunSpec, state: State) -> None:
        """Keep the state after an epoch in the place of the one before."""
        notes = {"spec": spec.canonical(), "epoch": state.epoch, "history": [asdict(line) for line in state.history]}
        notes["device"] = device_name(next(iter(state.model.values())).device)
        write_tensors(self._prepare(spec) / "checkpoint.safetensors", state_to_tensors(state), notes)

    # -- measures -----------------------------------------------------------------------------------------------

    def measurement(self, spec: RunSpec, measure: Measure) -> Measurement | None:
        """Return what ``measure`` gave on the network of ``spec``, or None."""
        path = self._folder(spec) / f"{measure.slug}.json"
        if not path.exists():
            return None
        return measurement_from_json(read_sealed(path), str(path))

    def save_measurement(self, spec: RunSpec, measurement: Measurement) -> None:
        """Keep what a measure gave."""
        folder = self._prepare(spec)
        write_sealed(folder / f"{measurement.measure.slug}.json", measurement_to_json(measurement))
        for under_way in ("partial.safetensors", "points.txt", "spent"):
            (folder / f"{measurement.measure.slug}.{under_way}").unlink(missing_ok=True)

    def partial(self, spec: RunSpec, measure: Measure) -> dict[str, Tensor] | None:
        """Return what is kept of a measure under way, by name, or None."""
        path = self._folder(spec) / f"{measure.slug}.partial.safetensors"
        return read_tensors(path)[0] if path.exists() else None

    def save_partial(self, spec: RunSpec, measure: Measure, tensors: dict[str, Tensor]) -> None:
        """Keep what is there of a measure under way, in the place of what was kept before."""
        path = self._prepare(spec) / f"{measure.slug}.partial.safetensors"
        write_tensors(path, tensors, {"measure": measure.canonical()})

    def points_file(self, spec: RunSpec, measure: Measure) -> Path:
        """Return where the finished points of a landscape under way are kept."""
        return self._prepare(spec) / f"{measure.slug}.points.txt"

    def vectors(self, spec: RunSpec, measure: Measure) -> Tensor | None:
        """Return the eigenvectors (j, n) that are kept of a spectrum, the leading first, or None."""
        path = self._folder(spec) / f"{measure.slug}.vectors.safetensors"
        return read_tensors(path)[0]["vectors"] if path.exists() else None

    def save_vectors(self, spec: RunSpec, measure: Measure, vectors: Tensor) -> None:
        """Keep the leading eigenvectors (j, n) of a spectrum."""
        path = self._prepare(spec) / f"{measure.slug}.vectors.safetensors"
        write_tensors(path, {"vectors": vectors}, {"measure": measure.canonical()})

    def measurements(self, spec: RunSpec) -> Iterator[Measurement]:
        """Go through all that has been measured on the network of ``spec``."""
        for path in sorted(self._folder(spec).glob("*-*.json")):
            yield measurement_from_json(read_sealed(path), str(path))

    def spent(self, spec: RunSpec, measure: Measure | None) -> Spent:
        """Return the work on a measure (None: on an epoch of the training) that is not finished."""
        path = self._spent_file(spec, measure)
        try:
            return Spent(**read_sealed(path)) if path.exists() else Spent()
        except TypeError as error:
            raise damaged(path, str(error)) from error

    def save_spent(self, spec: RunSpec, measure: Measure | None, spent: Spent) -> None:
        """Keep the seconds of work on what is not finished; none forgets them."""
        if spent == Spent():
            self._spent_file(spec, measure).unlink(missing_ok=True)
        else:
            self._prepare(spec)
            write_sealed(self._spent_file(spec, measure), asdict(spent))

    def _spent_file(self, spec: RunSpec, measure: Measure | None) -> Path:
        return self._folder(spec) / f"{measure.slug if measure else 'epoch'}.spent"

    def file(self, spec: RunSpec, name: str) -> Path:
        """Return where a file of a run is, or would be."""
        return self._folder(spec) / name

    def adopt(self, spec: RunSpec, files: Mapping[str, bytes], *, anew: bool = False) -> None:
        """Take over files of a run from another store; ``anew``: in the place of all that is there of the run.

        The order is that of `save_result`: killed at any point, a run is there with weights of its own, or not at all.
        """
        folder = self._prepare(spec)
        if anew:
            _clear(folder)
        first = ("weights.safetensors", "run.json")
        for name in sorted(files, key=lambda name: (first.index(name) if name in first else len(first), name)):
            write_whole(folder / name, files[name])
        if (folder / "run.json").exists() and (folder / "weights.safetensors").exists():
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    # -- the whole ----------------------------------------------------------------------------------------------

    def names(self, spec: RunSpec) -> frozenset[str]:
        """Return what is there of a run, by name: "run", "weights", the slug of each measure; reads no file."""
        try:
            files = os.listdir(self._folder(spec))
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        whole = [name.removesuffix(".json") for name in files if name.endswith(".json")]
        return frozenset([*whole, *(["weights"] if "weights.safetensors" in files else [])])

    def results(self) -> Iterator[RunResult]:
        """Go through all ended trainings."""
        for path in sorted(self.root.glob("runs/*/run.json")):
            yield run_result_from_json(read_sealed(path), str(path))

    def under_way(self) -> Iterator[tuple[RunSpec, list[Epoch], str | None]]:
        """Go through the trainings under way: spec, finished epochs, and the processor's name; reads no tensor."""
        for path in sorted(self.root.glob("runs/*/checkpoint.safetensors")):
            if path.with_name("run.json").exists():  # imported without its weights while it was trained here
                continue
            try:
                notes = read_notes(path)
            except InputError:
                if path.exists():
                    raise
                continue  # another process has just ended it
            spec = RunSpec.parse(json.loads(notes["spec"]), str(path))
            yield spec, [Epoch(**line) for line in notes["history"]], notes.get("device")

    def check(self) -> list[str]:
        """Read every file, and return one line for each that is damaged; raise InputError where there is no store."""
        if not self.root.exists():
            raise InputError(f"{self.root} is not there: nothing has been computed in it, or its name is another")
        return [fault for path in sorted(self.root.glob("runs/*/*")) if (fault := _fault(path))]

    @contextmanager
    def lock(self, spec: RunSpec, *, wait: bool = True) -> Iterator[None]:
        """Hold a run for this process. A killed process lets go by itself.

        While another process holds it, this one waits; without ``wait`` it raises `Held`.
        """
        with clear_errors(self.root):
            self._prepare(spec)
            lock = FileLock(self.root / "locks" / f"{spec.key}.lock")
            try:
                lock.acquire(timeout=-1 if wait else 0)
            except Timeout as error:
                raise Held(f"another process is at work on {spec.slug}; try again when it has ended") from error
        try:
            for leftover in self._folder(spec).glob(".*.part"):  # of a process that was killed while writing
                leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def is_held(self, spec: RunSpec) -> bool:
        """Return whether a process is at work on a run."""
        path = self.root / "locks" / f"{spec.key}.lock"
        if not path.exists():
            return False
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _folder(self, spec: RunSpec) -> Path:
        return self.root / "runs" / spec.slug

    def _prepare(self, spec: RunSpec) -> Path:
        folder = self._folder(spec)
        with clear_errors(self.root):
            # First what tells that the folder is a store: killed in between, it still is one.
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.root / "store.json").exists():
            write_sealed(self.root / "store.json", {"schema": SCHEMA})
        return folder


def _clear(folder: Path, *, keep: str | None = None) -> None:
    """Remove the files of a run, first the one that makes it a result; but for the one named ``keep``."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "run.json"):
        if path.name != keep:
            path.unlink()


# How often a file is read again that another process may have been writing meanwhile, and the seconds in between.
_READS, _BETWEEN = 3, 0.2


def _fault(path: Path) -> str | None:
    """Return what is wrong with a file of a run, or None; a file that another process has removed is no fault."""
    found = None
    for again in range(_READS):
        if again:
            time.sleep(_BETWEEN)
        try:
            if path.suffix in (".json", ".spent"):
                read_sealed(path)
            elif path.suffix == ".safetensors":
                read_tensors(path)
            elif path.name.endswith(".points.txt"):
                points.check(path)
            return None
        except (InputError, FileNotFoundError) as error:
            if not path.exists():
                return None
            found = str(error)
    return found


def state_to_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a training under way by name."""
    momentum = {f"momentum.{i}": t for i, t in enumerate(state.momentum)}
    return {f"model.{name}": t for name, t in state.model.items()} | momentum


def state_from_tensors(tensors: Mapping[str, Tensor], history: list[Epoch]) -> State:
    """Return the training of this history whose tensors `state_to_tensors` named."""
    momentum = [name for name in tensors if name.startswith("momentum.")]
    return State(
        epoch=len(history),
        model={name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")},
        momentum=[tensors[f"momentum.{i}"] for i in range(len(momentum))],
        history=history,
    )

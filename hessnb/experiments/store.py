"""The store: finished runs and measures on disk, each whole or absent, whatever happens in between.

    <store>/store.json                     the layout's schema
    <store>/locks/<key>.lock               held by the process that works on a run
    <store>/runs/<label>-<key>/
        checkpoint.safetensors             the last finished epoch of a training under way
        weights.safetensors, run.json      the trained network; run.json is written last and makes it a result
        <measure>-<key>.json               one thing computed on it
        <measure>-<key>.vectors.safetensors   the eigenvectors that landscapes go along
        <measure>-<key>.partial.safetensors   an eigen-solve under way
        <measure>-<key>.points.txt            the finished points of a landscape under way

Every file carries a checksum, is written beside its place, forced to the disk and renamed: a kill, a full disk or a
second process at the same run can cost the work since the last checkpoint, never a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hessnb.errors import InputError
from hessnb.experiments.spec import Measure, RunSpec, parse_measure
from hessnb.training import Epoch, State

SCHEMA = 1


@dataclass(frozen=True)
class RunResult:
    """A training that has ended: ``done``, or ``failed`` with a reason; its history and where it came from."""

    spec: RunSpec
    status: Literal["done", "failed"]
    reason: str
    history: list[Epoch]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What a measure gave: plain numbers and lists by name, and where they came from."""

    measure: Measure
    values: dict[str, Any]
    provenance: dict[str, Any]


class Results(Protocol):
    """Anything that can be asked for results: the store, or the published record."""

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return the ended training of ``spec``, or None."""
        ...

    def measurement(self, spec: RunSpec, measure: Measure) -> Measurement | None:
        """Return what ``measure`` gave on the network of ``spec``, or None."""
        ...


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
            schema = _read_sealed_json(marker).get("schema")
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

    # -- runs ---------------------------------------------------------------------------------------------------

    def result(self, spec: RunSpec) -> RunResult | None:
        """Return the ended training of ``spec``, or None."""
        path = self._folder(spec) / "run.json"
        if not path.exists():
            return None
        return run_result_from_json(_read_sealed_json(path), str(path))

    def save_result(self, result: RunResult, state: State) -> None:
        """Keep an ended training: weights first, then run.json, which makes it a result; then drop the checkpoint."""
        folder = self._prepare(result.spec)
        if result.status == "done":
            _write_tensors(folder / "weights.safetensors", state.model, {"spec": result.spec.canonical()})
        _write_sealed_json(folder / "run.json", run_result_to_json(result))
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    def weights(self, spec: RunSpec) -> dict[str, Tensor]:
        """Return the trained weights and buffers by name; raise InputError when there are none."""
        path = self._folder(spec) / "weights.safetensors"
        if not path.exists():
            raise InputError(f"{path} is not there: the run has not been trained in this store")
        return _read_tensors(path)[0]

    def checkpoint(self, spec: RunSpec) -> State | None:
        """Return the state after the last finished epoch of a training under way, or None."""
        path = self._folder(spec) / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, notes = _read_tensors(path)
        momentum = [name for name in tensors if name.startswith("momentum.")]
        return State(
            epoch=notes["epoch"],
            model={name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")},
            momentum=[tensors[f"momentum.{i}"] for i in range(len(momentum))],
            history=[Epoch(**line) for line in notes["history"]],
        )

    def save_checkpoint(self, spec: RunSpec, state: State) -> None:
        """Keep the state after an epoch in the place of the one before."""
        tensors = {f"model.{name}": t for name, t in state.model.items()}
        tensors |= {f"momentum.{i}": t for i, t in enumerate(state.momentum)}
        notes = {"spec": spec.canonical(), "epoch": state.epoch, "history": [asdict(line) for line in state.history]}
        _write_tensors(self._prepare(spec) / "checkpoint.safetensors", tensors, notes)

    # -- measures -----------------------------------------------------------------------------------------------

    def measurement(self, spec: RunSpec, measure: Measure) -> Measurement | None:
        """Return what ``measure`` gave on the network of ``spec``, or None."""
        path = self._folder(spec) / f"{measure.slug}.json"
        if not path.exists():
            return None
        return measurement_from_json(_read_sealed_json(path), str(path))

    def save_measurement(self, spec: RunSpec, measurement: Measurement) -> None:
        """Keep what a measure gave."""
        folder = self._prepare(spec)
        _write_sealed_json(folder / f"{measurement.measure.slug}.json", measurement_to_json(measurement))
        for under_way in ("partial.safetensors", "points.txt"):
            (folder / f"{measurement.measure.slug}.{under_way}").unlink(missing_ok=True)

    def partial(self, spec: RunSpec, measure: Measure) -> dict[str, Tensor] | None:
        """Return what is kept of a measure under way, by name, or None."""
        path = self._folder(spec) / f"{measure.slug}.partial.safetensors"
        return _read_tensors(path)[0] if path.exists() else None

    def save_partial(self, spec: RunSpec, measure: Measure, tensors: dict[str, Tensor]) -> None:
        """Keep what is there of a measure under way, in the place of what was kept before."""
        path = self._prepare(spec) / f"{measure.slug}.partial.safetensors"
        _write_tensors(path, tensors, {"measure": measure.canonical()})

    def points_file(self, spec: RunSpec, measure: Measure) -> Path:
        """Return where the finished points of a landscape under way are kept."""
        return self._prepare(spec) / f"{measure.slug}.points.txt"

    def vectors(self, spec: RunSpec, measure: Measure) -> Tensor | None:
        """Return the eigenvectors (j, n) that are kept of a spectrum, the leading first, or None."""
        path = self._folder(spec) / f"{measure.slug}.vectors.safetensors"
        return _read_tensors(path)[0]["vectors"] if path.exists() else None

    def save_vectors(self, spec: RunSpec, measure: Measure, vectors: Tensor) -> None:
        """Keep the leading eigenvectors (j, n) of a spectrum."""
        path = self._prepare(spec) / f"{measure.slug}.vectors.safetensors"
        _write_tensors(path, {"vectors": vectors}, {"measure": measure.canonical()})

    def measurements(self, spec: RunSpec) -> Iterator[Measurement]:
        """Go through all that has been measured on the network of ``spec``."""
        for path in sorted(self._folder(spec).glob("*-*.json")):
            yield measurement_from_json(_read_sealed_json(path), str(path))

    # -- the whole ----------------------------------------------------------------------------------------------

    def results(self) -> Iterator[RunResult]:
        """Go through all ended trainings."""
        for path in sorted(self.root.glob("runs/*/run.json")):
            yield run_result_from_json(_read_sealed_json(path), str(path))

    def check(self) -> list[str]:
        """Read every file, and return one line for each that is damaged."""
        faults = []
        for path in sorted(self.root.glob("runs/*/*")):
            try:
                if path.suffix == ".json":
                    _read_sealed_json(path)
                elif path.suffix == ".safetensors":
                    _read_tensors(path)
            except InputError as error:
                faults.append(str(error))
        return faults

    @contextmanager
    def lock(self, spec: RunSpec) -> Iterator[None]:
        """Hold a run for this process; waits while another process holds it. A killed process lets go by itself."""
        with _clear_errors(self.root):
            self._prepare(spec)
            lock = FileLock(self.root / "locks" / f"{spec.key}.lock")
            lock.acquire()
        try:
            for leftover in self._folder(spec).glob(".*.part"):  # of a process that was killed while writing
                leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def _folder(self, spec: RunSpec) -> Path:
        return self.root / "runs" / spec.slug

    def _prepare(self, spec: RunSpec) -> Path:
        folder = self._folder(spec)
        with _clear_errors(self.root):
            folder.mkdir(parents=True, exist_ok=True)
            (self.root / "locks").mkdir(exist_ok=True)
        if not (self.root / "store.json").exists():
            _write_sealed_json(self.root / "store.json", {"schema": SCHEMA})
        return folder


def run_result_to_json(result: RunResult) -> dict[str, Any]:
    """Return a run result as plain JSON content."""
    return {
        "spec": json.loads(result.spec.canonical()),
        "status": result.status,
        "reason": result.reason,
        "history": [asdict(line) for line in result.history],
        "provenance": result.provenance,
    }


def run_result_from_json(body: dict[str, Any], where: str) -> RunResult:
    """Return the run result that `run_result_to_json` wrote; raise InputError naming ``where`` if it is not one."""
    try:
        return RunResult(
            spec=RunSpec.parse(body["spec"], where),
            status=body["status"],
            reason=body["reason"],
            history=[Epoch(**line) for line in body["history"]],
            provenance=body["provenance"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} does not hold a run ({error!r}); remove it") from error


def measurement_to_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as plain JSON content."""
    return {
        "measure": json.loads(measurement.measure.canonical()),
        "values": measurement.values,
        "provenance": measurement.provenance,
    }


def measurement_from_json(body: dict[str, Any], where: str) -> Measurement:
    """Return the measurement that `measurement_to_json` wrote; raise InputError naming ``where`` if it is not one."""
    try:
        return Measurement(parse_measure(body["measure"], where), body["values"], body["provenance"])
    except KeyError as error:
        raise InputError(f"{where} does not hold a measurement (no {error}); remove it") from error


# -- files: sealed with a checksum, written whole or not at all ----------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that ``path`` is either as before or wholly new, also after a power cut.

    Raises InputError when the disk is full, read-only, or the folder cannot be written.
    """
    with _clear_errors(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; nothing that was there is lost: make room or rights, or choose another "
            "folder with --store, and run the same command again"
        ) from error


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}); remove it, and what it held is computed again")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_sealed_json(path: Path, body: dict[str, Any]) -> None:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    sealed = json.dumps({"sha256": _digest(text.encode()), "body": body}, indent=1, sort_keys=True)
    write_whole(path, sealed.encode() + b"\n")


def _read_sealed_json(path: Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_bytes())
        body, digest = sealed["body"], sealed["sha256"]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "not a sealed JSON file") from error
    if _digest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()) != digest:
        raise _damaged(path, "its checksum does not match")
    return dict(body)


def _tensor_digest(tensors: dict[str, Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    text = json.dumps(notes, sort_keys=True)
    write_whole(path, save(plain, {"notes": text, "sha256": _tensor_digest(plain, text)}))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if _tensor_digest(tensors, header.get("notes", "")) != header.get("sha256"):
        raise _damaged(path, "its checksum does not match")
    return tensors, json.loads(header["notes"])

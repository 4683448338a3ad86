"""Files that carry a checksum and are written whole or not at all: JSON and tensors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hessnb.errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that ``path`` is either as before or wholly new, also after a power cut.

    Raises InputError when the disk is full, read-only, or the folder cannot be written.
    """
    with clear_errors(path):
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
def clear_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one InputError line that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; nothing that was there is lost: make room or rights, or choose another "
            "folder, and run the same command again"
        ) from error


def damaged(path: Path | str, why: str) -> InputError:
    """Return the error to raise for a damaged file."""
    remedy = "remove it, and what it held is computed again"
    if Path(path).name == "weights.safetensors":
        remedy = f"remove {Path(path).parent}, and its network is trained and measured anew"
    return InputError(f"{path} is damaged ({why}); {remedy}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def seal(body: dict[str, Any]) -> bytes:
    """Return JSON content with its checksum, as the bytes of a file."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({"sha256": _digest(text.encode()), "body": body}, indent=1, sort_keys=True).encode() + b"\n"


def unseal(content: bytes, where: Path | str) -> dict[str, Any]:
    """Return what `seal` sealed; raise InputError naming ``where`` if the checksum does not match."""
    try:
        sealed = json.loads(content)
        body, digest = sealed["body"], sealed["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(where, "not a sealed JSON file") from error
    if _digest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()) != digest:
        raise damaged(where, "its checksum does not match")
    return dict(body)


def write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Write JSON content with its checksum."""
    write_whole(path, seal(body))


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote; raise InputError if it is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return unseal(content, path)


def _tensor_digest(tensors: dict[str, Tensor], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)  # its bytes, without a copy of them
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write tensors by name, and notes, with their checksum."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    text = json.dumps(notes, sort_keys=True)
    write_whole(path, save(plain, {"notes": text, "sha256": _tensor_digest(plain, text)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and notes that `write_tensors` wrote; raise InputError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if _tensor_digest(tensors, header.get("notes", "")) != header.get("sha256"):
        raise damaged(path, "its checksum does not match")
    return tensors, json.loads(header["notes"])


def read_notes(path: Path) -> dict[str, Any]:
    """Return the notes of a file of tensors, without reading and verifying these; raise InputError if it has none."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})["notes"]))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from error

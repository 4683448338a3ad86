"""hessnb.data: the packaged sets, the npz and torchvision sources of the published ones, fetching, and the errors."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError

import numpy as np
import platformdirs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hessnb import data
from hessnb.data import PUBLISHED, Split, Splits, check_device, data_root, fetch, load, where
from hessnb.errors import InputError

Arrays = dict[str, np.ndarray]


def synthetic(name: str) -> Arrays:
    """Return random arrays with the types, shapes and counts that PUBLISHED asks for."""
    facts, rng = PUBLISHED[name], np.random.default_rng(0)
    names = [str(i) if name == "mnist" else f"class {i}" for i in range(facts.n_classes)]
    arrays = {"classes": np.array(names)}
    for split, n in (("train", facts.n_train), ("test", facts.n_test)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, *facts.shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, facts.n_classes, n, dtype=np.uint8)
    return arrays


def write_torchvision(name: str, folder: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write ``arrays`` as torchvision unpacks a download, tell it their checksums, and return one of the files."""
    if name == "mnist":
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for split, stem in (("train", "train"), ("test", "t10k")):
            for kind, array in (
                ("images-idx3", arrays[f"{split}_images"][..., 0]),
                ("labels-idx1", arrays[f"{split}_labels"]),
            ):
                head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
                (raw / f"{stem}-{kind}-ubyte").write_bytes(head + array.tobytes())
        return raw / "train-images-idx3-ubyte"

    dataset = data._torchvision_class(name)
    batches = folder / dataset.base_folder
    batches.mkdir(parents=True)

    def write(file: str, content: dict[str, Any]) -> str:
        pickled = pickle.dumps(content)
        (batches / file).write_bytes(pickled)
        return hashlib.md5(pickled).hexdigest()

    for split in ("train", "test"):
        files = [file for file, _ in getattr(dataset, f"{split}_list")]
        rows = np.ascontiguousarray(arrays[f"{split}_images"].transpose(0, 3, 1, 2)).reshape(-1, 3 * 32 * 32)
        sums = [
            write(file, {"data": part, "labels" if name == "cifar10" else "fine_labels": labels.tolist()})
            for file, part, labels in zip(
                files, np.split(rows, len(files)), np.split(arrays[f"{split}_labels"], len(files)), strict=True
            )
        ]
        monkeypatch.setattr(dataset, f"{split}_list", [list(pair) for pair in zip(files, sums, strict=True)])
    checksum = write(dataset.meta["filename"], {dataset.meta["key"]: arrays["classes"].tolist()})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": checksum})
    written: Path = batches / str(dataset.train_list[0][0])
    return written


def assert_same(found: Splits, arrays: Arrays) -> None:
    """Assert that ``found`` holds ``arrays``, as floats in [0, 1]."""
    for split in ("train", "test"):
        part = getattr(found, split)
        expected = torch.from_numpy(arrays[f"{split}_images"]).permute(0, 3, 1, 2)
        assert torch.equal((part.images * 255).round().to(torch.uint8), expected)
        assert torch.equal(part.labels, torch.from_numpy(arrays[f"{split}_labels"]).long())
    assert found.classes == tuple(arrays["classes"])


def assert_clear(error: pytest.ExceptionInfo[InputError], name: str, folder: Path) -> None:
    """Assert that the message is one line with the set, the folder and the command that mends it."""
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert str(folder) in message
    assert f"hessnb data fetch {name}" in message
    assert "\n" not in message


@pytest.fixture
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the published sets 50 training and 20 test images, so that writing one costs nothing."""
    for name, facts in PUBLISHED.items():
        monkeypatch.setitem(PUBLISHED, name, replace(facts, n_train=50, n_test=20))


# The packaged sets


@pytest.mark.parametrize(("name", "shape"), [("mnist5k", (1, 28, 28)), ("mnistm5k", (3, 32, 32))])
def test_a_packaged_set_has_4000_and_1000_balanced_images_in_0_1(name: str, shape: tuple[int, ...]) -> None:
    splits = load(name)
    for split, n in ((splits.train, 4000), (splits.test, 1000)):
        assert split.images.shape == (n, *shape)
        assert split.images.dtype == torch.float32
        assert split.images.is_contiguous()
        assert (split.images.min().item(), split.images.max().item()) == (0, 1)
        assert split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [n // 10] * 10
        assert len(split) == n
    assert splits.classes == tuple("0123456789")


@pytest.mark.parametrize("name", ["mnist5k", "mnistm5k"])
def test_a_packaged_set_is_the_same_when_it_is_made_anew(name: str, untouched: Callable[..., Any]) -> None:
    first = load(name)
    data._mnist5k.cache_clear()
    data._mnistm5k.cache_clear()
    with untouched():
        again = load(name)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.images, again.test.images)
    assert torch.equal(first.train.labels, again.train.labels)


def test_what_was_loaded_belongs_to_the_caller(digits: Splits) -> None:
    load("mnist5k", n_train=300).train.images.zero_()
    assert torch.equal(load("mnist5k", n_train=300).train.images, digits.train.images)


def test_no_mnist5k_digit_is_in_both_training_and_test_set() -> None:
    splits = load("mnist5k")
    images = torch.cat([splits.train.images, splits.test.images]).flatten(1)
    assert len(images.unique(dim=0)) == 5000


def test_each_prefix_of_mnist5k_has_all_classes() -> None:
    splits = load("mnist5k", n_train=100, n_test=100)
    assert splits.train.labels.unique().tolist() == splits.test.labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnistm5k_is_the_distance_between_a_patch_of_the_split_and_a_digit(split: str) -> None:
    from sklearn.datasets import load_sample_images

    photos = [np.asarray(photo, dtype=np.int16) for photo in load_sample_images().images]
    digits, blended = (getattr(load(name), split).head(30) for name in ("mnist5k", "mnistm5k"))
    assert torch.equal(digits.labels, blended.labels)
    for small, image in zip(digits.images, blended.images, strict=True):
        digit = np.pad((small[0].numpy() * 255).round().astype(np.int16), 2)[..., None]
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.int16)
        # The digit does not reach the first row: the patch is where the photograph has the same 32 pixels.
        found = [
            column
            for photo in photos
            for row, column in np.argwhere(
                (np.lib.stride_tricks.sliding_window_view(photo, 32, axis=1)[:-31] == pixels[0].T).all((2, 3))
            )
            if np.array_equal(np.abs(photo[row : row + 32, column : column + 32] - digit), pixels)
        ]
        border = int(0.7 * photos[0].shape[1])
        assert any(column + 32 <= border if split == "train" else column >= border for column in found)


def test_a_packaged_set_is_inside_the_packages_and_cannot_be_fetched(tmp_path: Path) -> None:
    assert where("mnist5k", tmp_path) == "inside the installed packages"
    with pytest.raises(InputError, match="mnistm5k needs no download"):
        fetch("mnistm5k", tmp_path)


# Prefixes, batches, devices, folders


def test_a_prefix_is_the_head_of_the_whole_set(digits: Splits) -> None:
    whole = load("mnist5k")
    assert torch.equal(digits.train.images, whole.train.images[:300])
    assert torch.equal(digits.test.labels, whole.test.labels[:100])
    assert len(load("mnist5k", n_train=4000, n_test=1).train) == 4000


@pytest.mark.parametrize(
    ("counts", "there"), [({"n_train": 0}, 4000), ({"n_train": 4001}, 4000), ({"n_test": -1}, 1000)]
)
def test_a_count_out_of_range_is_an_error_that_says_the_range(counts: dict[str, int], there: int) -> None:
    with pytest.raises(InputError, match=f"choose 1 to {there}$"):
        load("mnist5k", **counts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda: load("mnist5k", n_train=True),
        lambda: load("mnist5k", n_test=2.5),  # type: ignore[arg-type]
        lambda: Split(torch.rand(10, 1), torch.zeros(4, dtype=torch.int64)),
        lambda: Split(torch.rand(10, 1), torch.zeros(10)),
        lambda: Split(torch.zeros(10, 1, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)),
        lambda: Split(torch.rand(10, 1), torch.zeros(10, dtype=torch.int64)).head(-3),
        lambda: Split(torch.rand(10, 1), torch.zeros(10, dtype=torch.int64)).batches(0),
    ],
)
def test_samples_without_their_labels_and_counts_that_are_none_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="whole number|give floating-point images"):
        call()


def test_batches_are_in_order_and_the_last_one_is_ragged(digits: Splits) -> None:
    batches = digits.train.head(10).batches(4)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), digits.train.images[:10])
    assert digits.train.head(None) is digits.train


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InputError, match="device 'cuda' cannot be used here .*; use device 'cpu'"):
        load("mnist5k", device="cuda")


def test_a_device_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(InputError, match="device 'abacus' cannot be used here"):
        check_device("abacus")


def test_the_data_root_is_the_argument_then_the_variable_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HESSNB_DATA", str(tmp_path / "variable"))
    assert data_root(tmp_path / "argument") == tmp_path / "argument"
    assert data_root() == tmp_path / "variable"
    monkeypatch.delenv("HESSNB_DATA")
    assert data_root() == Path(platformdirs.user_cache_dir("hessnb")) / "data"
    assert data_root("~/sets") == Path.home() / "sets"


# The published sets themselves

MNIST_COUNTS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}


@pytest.mark.parametrize(
    ("name", "counts", "mean", "first_class"),
    [
        ("mnist", MNIST_COUNTS, [0.1307], "0"),
        ("cifar10", {"train": [5000] * 10, "test": [1000] * 10}, [0.4914, 0.4822, 0.4465], "airplane"),
        ("cifar100", {"train": [500] * 100, "test": [100] * 100}, [0.5071, 0.4865, 0.4409], "apple"),
    ],
)
def test_a_published_set_has_its_known_shape_counts_and_mean(
    published: Callable[[str], Splits], name: str, counts: dict[str, list[int]], mean: list[float], first_class: str
) -> None:
    splits = published(name)
    height, width, channels = PUBLISHED[name].shape
    for split in ("train", "test"):
        part = getattr(splits, split)
        assert part.images.shape == (sum(counts[split]), channels, height, width)
        assert part.labels.bincount().tolist() == counts[split]
    assert splits.train.images.mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=1e-4)
    assert (splits.classes[0], len(splits.classes)) == (first_class, PUBLISHED[name].n_classes)


def test_the_digits_of_mnist5k_are_digits_of_mnist(published: Callable[[str], Splits]) -> None:
    def key(image: torch.Tensor) -> bytes:
        return (image * 255).round().to(torch.uint8).numpy().tobytes()

    mnist = published("mnist")
    known = {key(i): int(y) for i, y in zip(mnist.train.images, mnist.train.labels, strict=True)}
    few = load("mnist5k", n_test=200).test
    assert [known.get(key(image)) for image in few.images] == few.labels.tolist()


# Sources of a published set


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_npz_is_read_as_it_is(small_sets: None, tmp_path: Path, name: str) -> None:
    arrays = synthetic(name)
    np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    assert_same(load(name, root=tmp_path), arrays)
    assert where(name, tmp_path) == str(tmp_path / f"{name}.npz")
    assert fetch(name, tmp_path) == tmp_path / f"{name}.npz"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_files_are_read_and_fetched_into_an_equal_npz(
    small_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arrays = synthetic(name)
    write_torchvision(name, tmp_path, arrays, monkeypatch)
    check_both_sources(name, tmp_path, arrays)


@pytest.fixture
def big_folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is emptied after the test, because pytest keeps its temporary folders."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_torchvision_files_of_the_size_of_mnist_are_read_and_fetched_into_an_equal_npz(
    big_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = synthetic("mnist")
    assert len(arrays["train_labels"]) == 60_000
    write_torchvision("mnist", big_folder, arrays, monkeypatch)
    check_both_sources("mnist", big_folder, arrays)


def test_a_fetched_npz_can_be_read_by_whom_the_umask_lets(
    small_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchvision("mnist", tmp_path, synthetic("mnist"), monkeypatch)
    before = os.umask(0o022)
    try:
        assert fetch("mnist", tmp_path).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def check_both_sources(name: str, folder: Path, arrays: Arrays) -> None:
    assert where(name, folder) == f"torchvision's files in {folder}"
    assert_same(load(name, root=folder), arrays)
    path = fetch(name, folder)
    assert where(name, folder) == str(path)
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive.files) == set(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(archive[key], array)


def test_the_npz_comes_before_the_files_of_torchvision(
    small_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = synthetic("mnist")
    write_torchvision("mnist", tmp_path, {**arrays, "train_images": 255 - arrays["train_images"]}, monkeypatch)
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    assert_same(load("mnist", root=tmp_path), arrays)


# Fetching that fails


@pytest.mark.parametrize("error", [URLError("Name or service not known"), RuntimeError("File not\nfound or corrupted")])
@pytest.mark.parametrize("name", PUBLISHED)
def test_fetch_without_a_network_is_one_clear_error_and_leaves_no_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    module = sys.modules[data._torchvision_class(name).__module__]
    monkeypatch.setattr(module, "download_and_extract_archive", fail)
    folder = tmp_path / "sets"
    with pytest.raises(InputError, match=f"^could not fetch {name} into {folder}: ") as caught:
        fetch(name, folder)
    assert str(error.args[0]).split()[-1] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert where(name, folder) is None
    with pytest.raises(InputError) as missing:
        load(name, root=folder)
    assert_clear(missing, name, folder)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_fetch_leaves_nothing_half_written(
    small_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    arrays = synthetic("mnist")
    write_torchvision("mnist", tmp_path, arrays, monkeypatch)

    def stop_midway(file: IO[bytes], **kwargs: np.ndarray) -> None:
        file.write(b"PK" * 1000)
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stop_midway)
        expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            fetch("mnist", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]
    assert_same(load("mnist", root=fetch("mnist", tmp_path).parent), arrays)


def test_fetch_into_a_place_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="could not fetch mnist into"):
        fetch("mnist", tmp_path / "file")


def test_fetch_says_that_the_npz_which_is_there_is_damaged(small_sets: None, tmp_path: Path) -> None:
    (tmp_path / "mnist.npz").write_bytes(b"PK")
    with pytest.raises(InputError) as caught:
        fetch("mnist", tmp_path)
    assert_clear(caught, "mnist", tmp_path)


# Sets that are missing or damaged


@pytest.mark.parametrize("use", [load, where, fetch])
def test_an_unknown_set_is_an_error_that_lists_the_known_ones(use: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match="^unknown data set 'svhn'; there is: mnist, cifar10, .*mnistm5k$"):
        use("svhn")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_set_is_an_error(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert where(name, folder) is None
        with pytest.raises(InputError) as caught:
            load(name, root=folder)
        assert_clear(caught, name, folder)


@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.5, 0.99, 1])
def test_a_truncated_npz_is_an_error(small_sets: None, tmp_path: Path, share: float) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, **synthetic("mnist"))  # type: ignore[arg-type]
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(share * len(whole)), len(whole) - 1)])
    with pytest.raises(InputError) as caught:
        load("mnist", root=tmp_path)
    assert_clear(caught, "mnist", tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(-1, 1, exclude_max=True), bit=st.integers(0, 7), packed=st.booleans())
def test_a_flipped_bit_in_an_npz_is_found_or_harmless(
    small_sets: None, tmp_path: Path, position: float, bit: int, packed: bool
) -> None:
    path, arrays = tmp_path / "mnist.npz", synthetic("mnist")
    (np.savez_compressed if packed else np.savez)(path, **arrays)  # type: ignore[arg-type]
    content = bytearray(path.read_bytes())
    # Half of the flips in the last 1,000 bytes, where the archive has its table of contents.
    content[int(position * (len(content) if position >= 0 else 1000))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = load("mnist", root=tmp_path)
    except InputError as error:
        assert "is damaged" in str(error)
    else:
        assert_same(found, arrays)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: {"train_images": a["train_images"][..., 0]}, "shapes"),
        (lambda a: {"test_images": a["test_images"].transpose(0, 3, 1, 2)}, "shapes"),
        (lambda a: {"train_images": a["train_images"][1:], "train_labels": a["train_labels"][1:]}, "shapes"),
        (lambda a: {"test_labels": a["test_labels"][:0]}, "shapes"),
        (lambda a: {"train_images": a["train_images"] / np.float32(255)}, "float32"),
        (lambda a: {"test_labels": a["test_labels"].astype(np.int64)}, "int64"),
        (lambda a: {"test_labels": a["test_labels"] + np.uint8(1)}, "label is 10"),
        (lambda a: {"classes": a["classes"][:9]}, "9 classes"),
        (lambda a: {"classes": a["classes"].astype(object)}, "not a readable npz"),
        (lambda a: {"train_labels": None}, "has no train_labels"),
        (lambda a: {"classes": None}, "has no classes"),
    ],
)
def test_an_npz_that_is_not_the_published_set_is_an_error_that_says_why(
    small_sets: None, tmp_path: Path, change: Callable[[Arrays], dict[str, Any]], why: str
) -> None:
    arrays: dict[str, Any] = synthetic("mnist")
    arrays["test_labels"][0] = 9
    kept = {key: array for key, array in (arrays | change(arrays)).items() if array is not None}
    np.savez(tmp_path / "mnist.npz", **kept)
    with pytest.raises(InputError, match=why) as caught:
        load("mnist", root=tmp_path)
    assert_clear(caught, "mnist", tmp_path)


def test_a_file_that_is_no_npz_is_an_error(small_sets: None, tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError) as caught:
        load("mnist", root=tmp_path)
    assert_clear(caught, "mnist", tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError) as caught:
        load("mnist", root=tmp_path)
    assert_clear(caught, "mnist", tmp_path)


@pytest.mark.parametrize("use", [lambda name, root: load(name, root=root), fetch], ids=["load", "fetch"])
@pytest.mark.parametrize("size", [0, 3, 10, 20_000])
@pytest.mark.parametrize("name", PUBLISHED)
def test_damaged_torchvision_files_are_an_error_that_names_their_folder(
    small_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, use: Callable[..., object]
) -> None:
    path = write_torchvision(name, tmp_path, synthetic(name), monkeypatch)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError) as caught:
        use(name, tmp_path)
    assert_clear(caught, name, path.parent)
    assert not (tmp_path / f"{name}.npz").exists()


def test_torchvision_files_of_another_count_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(PUBLISHED, "mnist", replace(PUBLISHED["mnist"], n_train=50, n_test=20))
        write_torchvision("mnist", tmp_path, synthetic("mnist"), monkeypatch)
    with pytest.raises(InputError, match="shapes are .50, 28, 28, 1.") as caught:
        load("mnist", root=tmp_path)
    assert_clear(caught, "mnist", tmp_path / "MNIST" / "raw")

"""The figure of the README: it shows what the record holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from hessnb.experiments import record
from hessnb.figures import cover
from hessnb.paper.recorded import from_record


def committed() -> Path:
    """Return the folder of the committed record."""
    folder = record.record_root()
    assert folder is not None
    return folder


def test_committed_figure_shows_the_committed_record() -> None:
    folder = committed()
    numbers = cover.described(from_record("table7", folder=folder))
    assert numbers.startswith("batch size 64, seed 0: train 0.6968, test 3.209; batch size 64, seed 1: ")
    shown = (folder.parent / cover.PLACE).read_text()
    assert numbers in shown, "draw it anew: hessnb record"


def test_figure_follows_the_record_and_is_left_alone_where_nothing_changed(tmp_path: Path) -> None:
    folder = tmp_path / "record"
    for run in committed().glob("paper/M1-mnist-b64-s*"):
        shutil.copytree(run, folder / "paper" / run.name)
    path = tmp_path / cover.PLACE
    path.parent.mkdir()
    assert cover.publish(folder) == path
    first = path.read_bytes()
    assert cover.publish(folder) is None
    for run in folder.glob("paper/M1-mnist-b64-s2-*"):
        shutil.rmtree(run)
    assert cover.publish(folder) == path
    assert path.read_bytes() != first
    assert b"seed 2" in first
    assert b"seed 2" not in path.read_bytes()

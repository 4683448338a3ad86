"""How often long work is saved."""

from __future__ import annotations

import time

import pytest

from hessnb.pace import Pace


def test_saving_takes_at_most_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace, saves = Pace(60.0), list[float]()
    for second in range(1000):
        now = float(second)
        if pace.is_due():
            saves.append(second)
            now += 1.0 if len(saves) < 3 else 10.0
            pace.saved()
    assert saves == [61, 123, 185, 396, 607, 818]


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_no_seconds_between_two_saves_is_each_time(seconds: float) -> None:
    pace = Pace(seconds)
    for _ in range(3):
        assert pace.is_due()
        pace.saved()

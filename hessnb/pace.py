"""How often the state of long work is saved."""

from __future__ import annotations

import time

# Saving takes at most this part of the time.
_SHARE = 1 / 20


class Pace:
    """Says when to save: every ``seconds``, more rarely where a save takes long, and at once for ``seconds`` <= 0."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked = time.monotonic()
        self._due = self._asked + seconds

    def is_due(self) -> bool:
        """Return whether it is time to save; if so, save and then call `saved`."""
        self._asked = time.monotonic()
        return self._seconds <= 0 or self._asked > self._due

    def saved(self) -> None:
        """Note that what was due has been saved."""
        now = time.monotonic()
        self._due = now + max(self._seconds, (now - self._asked) / _SHARE)

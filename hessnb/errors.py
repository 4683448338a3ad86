"""The errors that a user of hessnb is meant to read: each message says what is wrong, where, and what to do."""

import math
from numbers import Integral, Real


class InputError(ValueError):
    """Something given to hessnb (a name, a file, a number, a device) cannot be used; the command line exits with 2."""


class Held(InputError):
    """Another process is at work on what was asked for."""


class RunFailed(RuntimeError):
    """A computation was carried out and did not succeed (a training failed, a notebook raised); exits with 1."""


def unknown(kind: str, name: object, known: list[str]) -> InputError:
    """Return the error for a name that is not among ``known``, listing what there is to choose from."""
    return InputError(f"unknown {kind} {name!r}; there is: {', '.join(known)}")


def real_number(name: str, value: float) -> float:
    """Return a number as it is; raise InputError for what is none, such as its text."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} = {value!r}: it must be a number")
    return value


def not_negative(name: str, value: float) -> float:
    """Return a number; raise InputError unless it is finite and not negative."""
    if not (real_number(name, value) >= 0 and math.isfinite(value)):
        raise InputError(f"{name} = {value}: it must be 0 or positive, and finite")
    return value


def tolerance(tol: float) -> float:
    """Return a relative tolerance; raise InputError unless it is a number between 0 and 1."""
    if not 0 < real_number("tol", tol) < 1:
        raise InputError(f"tol = {tol}: a relative tolerance is between 0 and 1")
    return tol


def whole_number(name: str, value: int, least: int | None = 1) -> int:
    """Return a count; raise InputError unless it is a whole number, not below ``least`` if there is such a bound."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f", at least {least}"
        raise InputError(f"{name} = {value!r}: it must be a whole number{bound}")
    return value

"""Errors that speak to the user: they name the setting at fault and the remedy."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from numbers import Integral, Real

DIVERGED = (
    "continue from the last good checkpoint with a smaller optimizer.lr, with trainer.gradient_clip_val=1 or "
    "with trainer.precision=32-true"
)


class SettingError(ValueError):
    """A setting or an input that can't be used.

    The message is one or two sentences: what is wrong, which setting it is, what to do. The scripts print it
    without a traceback.
    """


class RunError(RuntimeError):
    """A run can't continue; the message says what stands and what to try. Printed without a traceback."""


class Stopped(BaseException):
    """A run was asked to stop and has saved itself; not an error, so that nothing handles it as one.

    Args:
        number: The signal.
        message: What to tell the user.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class ConstraintError(RuntimeError):
    """An attack returned images outside its threat model; the message states the measured distance."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on to the first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def cause(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The first error of some kinds in the chain that led to an error, this one included; None if there is none."""
    return next((found for found in chain(error) if isinstance(found, kinds)), None)


def quoted(key: str, value: object) -> str:
    """A setting as it must be typed in a shell where its value has characters that Hydra or the shell take apart.

    Args:
        key: Such as `"model.checkpoint"`.
        value: Such as the path `epoch=3.ckpt`.

    Returns:
        One word for the shell, such as `"model.checkpoint='epoch=3.ckpt'"`.

    Example:
        >>> print(quoted("model.checkpoint", "epoch=3-step=100.ckpt"))
        "model.checkpoint='epoch=3-step=100.ckpt'"
        >>> print(quoted("model.checkpoint", "best.ckpt"))
        model.checkpoint=best.ckpt
    """
    text = str(value)
    words = ("null", "true", "false", "nan", "inf")
    if re.fullmatch(r"[a-z_/][\w./-]*", text, re.I | re.A) and text.lower() not in words:
        return f"{key}={text}"
    # Backslashes before a quote or the end count twice.
    inner = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text))
    setting = f"{key}='{inner}'"
    return shlex.quote(setting) if re.search(r"[\"$`\\!]", setting) else f'"{setting}"'


def unknown(kind: str, name: object, valid: Iterable[str], setting: str) -> SettingError:
    """The error for a name that is not in a registry, with the nearest valid ones.

    Args:
        kind: What the name stands for, such as `"attack"`.
        name: The name as given.
        valid: The names that would have worked.
        setting: The key on the command line, such as `"attack.name"`.
    """
    names = sorted(valid)
    folded = {n.lower(): n for n in names}
    near = [folded[n] for n in difflib.get_close_matches(str(name).lower(), folded, n=4, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:12])}"
    more = f" ({len(names)} in all)" if not near and len(names) > 12 else ""
    return SettingError(f"unknown {kind} '{name}' ({setting}): {hint}{more}")


def check_whole(setting: str, value: object, least: int = 1, hint: str = "") -> None:
    """Refuse what isn't a whole number: neither 10.5 nor 10.0 nor `true` is one.

    Args:
        setting: The key on the command line, such as `"attack.steps"`.
        value: As given.
        least: The smallest that will do.
        hint: What else can be said, such as `"null for none"`.

    Raises:
        SettingError: If it is something else, or smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        bound = f"of at least {least}" if least else "and not negative"
        raise SettingError(f"{setting}={value!r} must be a whole number {bound}{f'; {hint}' if hint else ''}")


def check_real(setting: str, value: object, interval: str, hint: str = "") -> None:
    """Refuse what isn't a number in an interval.

    Args:
        setting: The key on the command line.
        value: As given.
        interval: As it is written in mathematics, such as `"[0, 1)"` or `"(0, inf)"`.
        hint: What else can be said, such as `"in units of the radius"`.

    Raises:
        SettingError: If it is something else, or lies outside.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    if not isinstance(value, bool) and isinstance(value, Real):
        number = float(value)
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if above and below:
            return
    raise SettingError(f"{setting}={value} must be a number in {interval}{f'; {hint}' if hint else ''}")

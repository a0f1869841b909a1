"""Which tensors a pattern means: one answer for every option and recipe."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern fits one of the names: `re:` starts a regular expression (searched), anything else is a glob.

    A glob fits a whole name, with or without its trailing `.weight`, or any run of its dotted parts' end.
    Raises ValueError for a malformed expression.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        return any(expression.search(name) for name in names)
    for name in names:
        bare = name.removesuffix(".weight")
        for candidate in (name, bare):
            if fnmatch.fnmatchcase(candidate, pattern) or fnmatch.fnmatchcase(candidate, f"*.{pattern}"):
                return True
    return False


def select(patterns: Iterable[str], spellings: Mapping[str, Iterable[str]], what: str) -> set[str]:
    """The names that any pattern fits; `spellings` gives, per name, all the names it goes by (on disk, in the module).

    Raises ValueError for a pattern that fits nothing, with the nearest names; `what` names the option.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name, spelled in spellings.items() if matches(pattern, spelled)}
        if not found:
            raise ValueError(
                f"{what} {pattern!r} matches no tensor; nearest: {', '.join(_nearest(pattern, spellings))}"
            )
        chosen |= found
    return chosen


def _nearest(pattern: str, spellings: Mapping[str, Iterable[str]], count: int = 5) -> list[str]:
    word = re.sub(r"[^\w.]+", "", pattern.removeprefix("re:"))
    tails: dict[str, str] = {}
    for name in spellings:
        parts = name.removesuffix(".weight").split(".")
        for start in range(len(parts)):
            tails.setdefault(".".join(parts[start:]), name)
    near = difflib.get_close_matches(word, tails, n=count, cutoff=0.3)
    return list(dict.fromkeys(tails[t] for t in near)) or sorted(spellings)[:count]

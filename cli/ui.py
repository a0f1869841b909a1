"""What a person sees: tables of 80 columns, progress with the time that is left, and JSON for machines."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 80


class Missed(Exception):
    """A bound on quality, or a check of an artifact, was missed: exit code 3."""


def quiet() -> None:
    """Silences what libraries would print between our own lines; to be called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Threads that wait should sleep: on two busy cores spinning ones made sampling from the demo 6 to 25 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("once", message="acc: ")  # our own
    warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
    logging.disable(logging.WARNING)


class Screen:
    """Prints for people, or keeps silent and prints one JSON document at the end."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        terminal = sys.stdout.isatty()
        width = min(WIDTH, Console().width) if terminal else WIDTH
        self.console = Console(width=width, highlight=False, emoji=False, soft_wrap=not terminal, quiet=as_json)

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    def field(self, label: str, text: str) -> None:
        """A label and what it says, wrapped beside it."""
        start = f"{label:<10}" if len(label) < 10 else f"{label}  "
        self.line(textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * 10))

    def prose(self, text: str) -> None:
        """Paragraphs, wrapped anew; one that is indented somewhere stays as it is."""
        parts = text.split("\n\n")
        kept = [any(line.startswith(" ") for line in part.splitlines()) for part in parts]
        self.line("\n\n".join(p if keep else textwrap.fill(p, WIDTH) for p, keep in zip(parts, kept)))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """The first column is text and may be cut, the others are figures."""
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right", overflow="ellipsis", no_wrap=True)
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.console.print(table)

    def next(self, command: str) -> None:
        self.line(f"\nNext: {command}")

    def result(self, value: Any) -> None:
        """The one document of `--json`."""
        if self.as_json:
            print(json.dumps(_plain(value), indent=1, default=str, allow_nan=False))


class Meter:
    """Progress from fractions done: a bar on a terminal, else a line every ten seconds.

    A fraction that is smaller than the last begins another step; what is left is what is left of the step."""

    def __init__(self, screen: Screen, of: str = ""):
        self.started = self.said = self.began = time.monotonic()
        self.before, self.of = 0.0, of  # `of`: what the time left is said of
        self.live: Progress | None = None
        self.silent = screen.as_json
        if not self.silent and sys.stderr.isatty():
            self.live = Progress(
                TextColumn("{task.description:<18.18}"),
                BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True, width=WIDTH),
                transient=True,
            )

    def __enter__(self) -> Meter:
        if self.live is not None:
            self.live.start()
            self.task = self.live.add_task("", total=1.0, left="")
        return self

    def __exit__(self, *unused: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, fraction: float, what: str) -> None:
        now = time.monotonic()
        if fraction < self.before:
            self.began = now
        self.before = fraction
        left = (now - self.began) * (1 - fraction) / fraction if fraction > 0.005 else None
        text = f"{clock(left)} left{self.of}" if left is not None else "estimating"
        if self.live is not None:
            self.live.update(self.task, completed=fraction, description=what, left=text)
        elif not self.silent and now - self.said >= 10:
            self.said = now
            gone = clock(now - self.started)
            print(f"{100 * fraction:3.0f}%  {what}, {gone} gone, {text}", file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def count(number: float) -> str:
    """A number of weights or tokens."""
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.1f}{unit}"
    return str(round(number))


def percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value >= 0.1 else f"{100 * value:.2f}%"


def shorten(text: str, width: int) -> str:
    """The text without line breaks, cut in the middle to `width` characters."""
    text = " ".join(text.split())
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-(width - 3 - half) :]}"

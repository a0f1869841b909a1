"""A recipe: which rewrites and methods, for which tensors, on what text. Written resolved beside what it made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from ..calibrate.stream import DTYPES
from ..formats.source import Source
from ..kernels.base import computed_in
from ..registry import listing, lookup, spelled
from .base import Method, Rewrite


class Calibration(BaseModel):
    """The text that statistics are collected on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = Field(None, description="file, folder, hf:dataset or self; None: what suits the model")
    nsamples: int = Field(128, ge=1, description="sequences")
    seqlen: int = Field(2048, ge=2, description="tokens per sequence")
    seed: int = Field(0, ge=0, description="order of documents, and of what is sampled")


class Step(BaseModel):
    """One method and the tensors it is for. The method's own fields stand beside `method` in YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    settings: SerializeAsAny[Method]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "settings" in data:
            return data
        own = {k: v for k, v in data.items() if k in ("method", "targets", "ignore")}
        if "method" not in own:
            raise ValueError("a step needs a `method`")
        rest = {k: v for k, v in data.items() if k not in own}
        settings = configure(own["method"], rest, beside=("targets", "ignore"))
        return own | {"method": spelled(own["method"]), "settings": settings}

    def flat(self) -> dict[str, Any]:
        return {
            "method": self.method,
            **self.settings.model_dump(mode="json"),
            "targets": list(self.targets),
            "ignore": list(self.ignore),
        }


class Recipe(BaseModel):
    """All that decides the output besides the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(1, ge=1, le=1)
    dtype: str = Field("auto", pattern=f"^(auto|{'|'.join(DTYPES)})$", description="type that the blocks are run in")
    calibration: Calibration = Field(default_factory=lambda: Calibration.model_validate({}))
    refine: int = Field(0, ge=0, description="steps of learned rounding on each block's output, after the methods")
    rewrites: tuple[SerializeAsAny[Rewrite], ...] = ()  # in YAML the first of the steps
    steps: tuple[Step, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _part(cls, data: Any) -> Any:
        """Takes the rewrites out of the steps, where they stand before all methods."""
        if not isinstance(data, dict) or not isinstance(steps := data.get("steps", ()), list | tuple):
            return data
        if not steps and data.keys() <= cls.model_fields.keys():  # else the key that is wrong is named
            raise ValueError("steps: a recipe needs one or more")
        if "rewrites" in data:
            raise ValueError("rewrites: write them as the first of the steps")
        rewrites, methods = [], []
        for number, step in enumerate(steps):
            name = step.get("method") if isinstance(step, dict) else None
            if name not in listing("compress", Rewrite.__name__):
                methods.append(step)
            elif methods:
                raise ValueError(f"steps.{number}: {name} changes the whole model, so it stands before every method")
            else:
                rewrites.append(configure(name, {key: value for key, value in step.items() if key != "method"}))
        return data | {"rewrites": tuple(rewrites), "steps": methods}

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> Recipe:
        """Raises ValueError with one line per wrong field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error, cls)}") from None

    @classmethod
    def read(cls, path: Path, changes: Iterable[str] = ()) -> Recipe:
        """A recipe's file, with `changes` as `override` takes them.

        Raises ValueError when the file is missing, is not YAML, or is not a recipe, and for a change to what it lacks.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"recipe {path} does not exist") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {path} is not YAML: {str(error).splitlines()[0]}") from None
        return cls.from_dict(override(data, changes), path.name)

    def settled(self, dtype: torch.dtype, device: str) -> Recipe:
        """With the type that blocks of a model of type `dtype` are run in: what `auto` is depends on the machine."""
        name = str(computed_in(dtype, device)).removeprefix("torch.")
        return self.model_copy(update={"dtype": name}) if self.dtype == "auto" and name in DTYPES else self

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "dtype": self.dtype,
            "calibration": self.calibration.model_dump(mode="json"),
            "refine": self.refine,
            "steps": [
                *({"method": one.name, **one.model_dump(mode="json")} for one in self.rewrites),
                *(step.flat() for step in self.steps),
            ],
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that any step asks for."""
        return tuple(dict.fromkeys(n for step in self.steps for n in step.settings.needs))

    def rewrite(self, source: Source) -> Source:
        """The source that the methods see. Raises ValueError naming a family that a rewrite is not exact for."""
        for one in self.rewrites:
            source = one.rewrite(source)
        return source

    def prove(self, source: Source, device: str = "cpu") -> None:
        """Raises ValueError when a rewrite does not leave what the model computes as it is."""
        for one in self.rewrites:
            one.prove(source, device)
            source = one.rewrite(source)


def override(data: Any, changes: Iterable[str]) -> Any:
    """What a recipe's file holds, changed by `path=value`: dotted paths such as `steps.0.bits=4`, values in YAML.

    Raises ValueError for a malformed change and for a path that leads nowhere; what a recipe has no place for is found
    when it is validated.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        if not (path and equals):
            raise ValueError(f"--set {change}: expected path=value, for instance steps.0.bits=4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {change}: the value is not YAML: {str(error).splitlines()[0]}") from None
        data = _put(data, path.split("."), value, change)
    return data


def _put(data: Any, path: list[str], value: Any, change: str) -> Any:
    """A copy of `data` with another value at the end of `path`."""
    if not path:
        return value
    key, *rest = path
    if isinstance(data, list):
        if not (key.isdecimal() and int(key) < len(data)):
            raise ValueError(f"--set {change}: there is no {key!r} in a list of {len(data)}; the first is 0")
        return [_put(item, rest, value, change) if n == int(key) else item for n, item in enumerate(data)]
    if isinstance(data, dict) or data is None:
        known = data or {}
        return known | {key: _put(known.get(key), rest, value, change)}
    raise ValueError(f"--set {change}: there is no {key!r} in {data!r}")


def configure(method: str, settings: dict[str, Any], beside: Sequence[str] = ()) -> Any:
    """A method or rewrite with its settings; `beside` are keys that may stand beside them.

    Raises ValueError naming each wrong field and what is allowed."""
    cls = lookup("compress", method)
    try:
        return cls(**settings)
    except ValidationError as error:
        raise ValueError(f"{method}: {explain(error, cls, beside)}") from None


def explain(error: ValidationError, cls: type[BaseModel], beside: Sequence[str] = ()) -> str:
    """A validation error of `cls` in one line; an unknown field comes with the nearest known ones."""
    parts = []
    for item in error.errors():
        field = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            *inside, name = map(str, item["loc"])
            known = [*_inside(cls, inside), *beside]
            near = difflib.get_close_matches(name, known, n=2) or sorted(known)
            where = f" in {'.'.join(inside)}" if inside else ""
            parts.append(f"there is no option {name!r}{where}; there is {', '.join(near)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = f" (given {given!r})" if isinstance(given, str | int | float) and repr(given) not in message else ""
            parts.append(f"{field}: {message}{shown}" if field else message)
    return "; ".join(parts)


def _inside(cls: type[BaseModel], path: list[str]) -> list[str]:
    """The fields of the model that lies at `path` in `cls`."""
    for part in path:
        cls = cls.model_fields[part].annotation  # pyright: ignore[reportAssignmentType] - pydantic went there too
    return [name for name in cls.model_fields if name != "rewrites"]  # which stand among the steps

"""Pictures of a calibration: PNG files that say at a glance what the tables say in figures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .learned import KINDS, domains, opened, recall_curves, sink_mass

if TYPE_CHECKING:
    from torch import Tensor

    from ..formats.calibration import Calibration

# Okabe and Ito's colours, which people who see few colours tell apart
KIND_COLOURS = ("#4d4d4d", "#56b4e9", "#e69f00", "#009e73")
OWN, OTHERS = "#0072b2", ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SHADES = "cividis"
DPI = 150


def draw(calibration: Calibration) -> tuple[dict[str, bytes], str]:
    """PNG files by name, one for each pass that there is a picture of; and why there is none, or ""."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}, "none, as matplotlib is not installed"
    found = {}
    for name in calibration.passes:
        figure = PICTURES[name](calibration) if name in PICTURES else None
        if figure is not None:
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
            found[f"{name}.png"] = file.getvalue()
    return found, ""


def _figure(calibration: Calibration, width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{calibration.facts['model']['name']}: {title}", fontsize=11)
    return figure


def _map_size(calibration: Calibration, heads: int) -> tuple[float, float]:
    """Width and height in inches of a map with layers from left to right and heads from top to bottom."""
    return min(max(0.2 * len(calibration.facts["layers"]), 4.5), 12.0), min(max(0.2 * heads, 1.2), 6.0)


def _show_map(axes: Any, values: Tensor, calibration: Calibration, rows: str, colours: Any, limits: tuple) -> Any:
    """`values [L, heads]`; layers left alone are white."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    shown = np.full(tuple(values.shape), np.nan)
    layers = opened(calibration)
    shown[layers] = values[layers].double().numpy()
    image = axes.imshow(shown.T, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    axes.set_xlabel("layer")
    axes.set_ylabel(rows)
    for axis, count in ((axes.xaxis, shown.shape[0]), (axes.yaxis, shown.shape[1])):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
        axis.set_minor_locator(_between(count))
    axes.set_xlim(-0.5, shown.shape[0] - 0.5)
    axes.set_ylim(shown.shape[1] - 0.5, -0.5)
    if max(shown.shape) <= 64:
        axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _between(count: int) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator([index + 0.5 for index in range(count - 1)])


def _heads(calibration: Calibration) -> Any:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    found = calibration.of("heads")
    kind, recall = found["kind"], found.get("recall")
    width, height = _map_size(calibration, kind.shape[1])
    panels = 1 if recall is None else 2
    figure = _figure(calibration, width + 1.5, panels * (height + 0.9) + 0.6, "sparse pattern of each query head")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    _show_map(axes[0], kind, calibration, "query head", ListedColormap(KIND_COLOURS), (-0.5, 3.5))
    layers = opened(calibration)
    counts = kind[layers].long().flatten().bincount(minlength=len(KINDS)).tolist()
    labels = [
        Patch(color=colour, label=f"{name} ({count})") for name, colour, count in zip(KINDS, KIND_COLOURS, counts)
    ]
    axes[0].legend(
        handles=labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(labels),
        frameon=False,
        fontsize=8,
        handlelength=1,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    if recall is not None:
        last = recall[..., -1].float()
        low = min(0.9, math.floor(10 * float(last[layers].min())) / 10)
        image = _show_map(axes[1], last, calibration, "query head", SHADES, (low, 1.0))
        length = f" at {found['length'][-1].item():,} tokens" if "length" in found else ""
        figure.colorbar(image, ax=axes[1], label=f"recall{length}", pad=0.01)
    return figure


def _retrieval(calibration: Calibration) -> Any:
    found = calibration.of("retrieval")
    gate = found["gate"].float()
    width, height = _map_size(calibration, gate.shape[1])
    curve = {key.removeprefix("pareto_"): t for key, t in found.items() if key.startswith("pareto_") and t.dim() == 1}
    lines = [(own, other, label) for own, other, label in CURVES if own in curve and "sparsity" in curve]
    width, curves = max(width, 3.6 * len(lines)), 2.9 if lines else 0.0
    figure = _figure(calibration, width + 1.5, height + 0.9 + curves + 0.4, "which KV heads retrieve")
    top, *below = figure.subfigures(
        2 if lines else 1, 1, height_ratios=[height + 0.9, curves] if lines else [1], squeeze=False
    )[:, 0]
    axes = top.subplots()
    image = _show_map(axes, gate, calibration, "KV head", SHADES, (0.0, 1.0))
    top.colorbar(image, ax=axes, label="gate (1 retrieves)", pad=0.01)
    if lines:
        share = 100 * curve["sparsity"].numpy()
        panels = below[0].subplots(1, len(lines), squeeze=False)[0]
        for panel, (own, other, label) in zip(panels, lines):
            scale = 100 if own == "accuracy" else 1
            panel.plot(share, scale * curve[own].numpy(), color=OWN, marker="o", markersize=4, label="calibrated")
            if other in curve:
                panel.plot(
                    share,
                    scale * curve[other].numpy(),
                    color=OTHERS[0],
                    marker="s",
                    markersize=4,
                    linestyle="--",
                    label="random heads",
                )
            panel.set_ylim(bottom=0)
            if own == "accuracy":
                panel.set_ylim(0, 104)
            _plain(panel, "KV heads that stream, %", label)
    return figure


# tensors `pareto_*` of `retrieval`: of the calibrated choice, of random ones, and what they are
CURVES = (("loss", "random", "distance from dense"), ("accuracy", "random_accuracy", "answers right, %"))


def _channels(calibration: Calibration) -> Any:
    counts, recall, others = recall_curves(calibration)
    if recall is None:
        return None
    figure = _figure(calibration, 7.5, 4.0, "recall of attention by 1/16 of the tokens")
    axes = figure.subplots()
    flat = recall.flatten(0, 1)
    low, high = (flat.quantile(share, 0).numpy() for share in (0.05, 0.95))
    axes.fill_between(counts, low, high, color=OWN, alpha=0.15, linewidth=0, label="chosen, 90% of KV heads")
    axes.plot(counts, flat.mean(0).numpy(), color=OWN, marker="o", markersize=4, label="chosen", zorder=3)
    for (name, values), colour, marker in zip(others.items(), cycle(OTHERS), cycle("s^Dvx")):
        axes.plot(counts, values, color=colour, marker=marker, markersize=4, linestyle="--", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(number) for number in counts])
    axes.set_ylim(top=1.02)
    _plain(axes, "channels", "recall, mean over KV heads")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _sinks(calibration: Calibration) -> Any:
    mass = sink_mass(calibration)
    if mass is None:
        return None
    width, height = _map_size(calibration, mass.shape[2])
    figure = _figure(calibration, width + 1.5, len(mass) * (height + 0.9) + 0.5, "attention on the first token")
    axes = figure.subplots(len(mass), 1, squeeze=False)[:, 0]
    image = None
    for panel, label, of in zip(axes, domains(calibration, len(mass)), mass):
        image = _show_map(panel, of, calibration, "query head", SHADES, (0.0, 1.0))
        panel.set_title(label, fontsize=9, loc="left")
    figure.colorbar(image, ax=list(axes), label="share of attention", pad=0.01)
    return figure


def _plain(axes: Any, across: str, upward: str) -> None:
    """Labels, a light grid, and no box."""
    axes.set_xlabel(across)
    axes.set_ylabel(upward)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


PICTURES: dict[str, Callable[[Calibration], Any]] = {
    "heads": _heads,
    "retrieval": _retrieval,
    "channels": _channels,
    "sinks": _sinks,
}

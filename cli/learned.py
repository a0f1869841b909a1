"""What a calibration learned, told in 80 columns: tables for each pass, and maps with a letter for every head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .ui import WIDTH

if TYPE_CHECKING:
    from torch import Tensor

    from ..formats.calibration import Calibration
    from .ui import Screen

SHORT = {"official heads mixed": "mixed", "chosen 4 bits": "4 bits"}  # what a narrow column calls it
KINDS = ("dense", "A-shape", "vertical-slash", "blocks")  # of `heads.kind`
LETTERS = "DAVB"
PLACES = (("",), ("left", "right"), ("left", "middle", "right"))  # of maps that stand side by side
FEW = 5  # notes, or names, that are shown
Table = tuple[list[str], list[list[str]]]


@dataclass
class Told:
    """What is said of one pass."""

    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    maps: list[tuple[str, list[str | None]]] = field(default_factory=list)  # what it shows; a row per layer


def brief(screen: Screen, calibration: Calibration) -> None:
    """A few lines and a table for every pass."""
    for name in calibration.passes:
        screen.line()
        _tell(screen, calibration, name)


def whole(screen: Screen, calibration: Calibration) -> None:
    """Everything: of which model, from what text, with which settings, and a map of the heads for every pass."""
    facts = calibration.facts
    layers, model = facts["layers"], facts["model"]
    opened = [layer for layer in layers if layer["refused"] is None]
    screen.field("Model", f"{model['name']}: {model['family']}")
    said = f"{len(opened)} of {len(layers)}"
    if opened:
        one = opened[0]
        said += f"; {one['heads']} query heads on {one['kv_heads']} of {one['head_dim']}"
    screen.field("Layers", said)
    for reason in dict.fromkeys(layer["refused"] for layer in layers if layer["refused"] is not None):
        which = [str(index) for index, layer in enumerate(layers) if layer["refused"] == reason]
        screen.field("", f"left alone: {', '.join(which)}: {reason}")
    for label, text in of_data(facts.get("data")):
        screen.field(label, text)
    made = facts.get("libraries") or {}
    screen.field("Made by", ", ".join(f"{name} {version}" for name, version in made.items()))
    for name in calibration.passes:
        settings = facts["passes"][name].get("settings") or {}
        screen.line(f"\n{name}")
        if settings:
            screen.field("  with", ", ".join(f"{key} {_short(value)}" for key, value in settings.items()))
        _tell(screen, calibration, name, maps=True)


def of_data(data: Any) -> list[tuple[str, str]]:
    """What is said of the text that was used: labels and lines."""
    if not isinstance(data, dict):
        return []
    if "from" in data:
        return [("Read from", f"{data['file']}, of {data['from']}")]
    texts = [
        ("Text", f"{text['data']}: {text['tokens']:,} tokens, sha256 {text['sha256'][:16]}")
        for text in data.get("texts", ())
    ]
    lengths = sorted(data.get("lengths", ()))
    if not lengths:
        return texts
    span = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(lengths[0])
    return [*texts, ("Prompts", f"{data['prompts']} of {span} tokens, {data['tokens']:,} in all, seed {data['seed']}")]


def tensors_of(calibration: Calibration) -> dict[str, dict[str, Any]]:
    """For machines: shape, type and range of every tensor, and the values of small ones."""
    found = {}
    for name, tensor in calibration.tensors.items():
        found[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if tensor.numel():
            found[name] |= {
                "min": tensor.min().item(),
                "max": tensor.max().item(),
                "mean": tensor.double().mean().item(),
            }
        if tensor.numel() <= 64:
            found[name]["values"] = tensor.tolist()
    return found


def map_lines(rows: Sequence[str | None], group: int = 1) -> list[str]:
    """A map of 80 columns: a row of letters per layer, a gap between groups of heads; None is a layer left alone."""
    heads = max((len(row) for row in rows if row is not None), default=0)
    gap = int(group > 1)
    room = WIDTH - 8
    per_group = group + gap
    fit = max(1, (room + gap) // per_group) * group if group <= room else room
    lines = [_ruler(min(heads, fit), group, gap)]
    for index, row in enumerate(rows):
        if row is None:
            lines.append(f"{index:>6}  left alone")
        for start in range(0, len(row or ""), fit):
            label = f"{index:>6}  " if start == 0 else " " * 8
            lines.append(label + _spaced((row or "")[start : start + fit], group, gap))
    return lines


def _ruler(heads: int, group: int, gap: int) -> str:
    """Numbers of heads, above the first of a group, where there is room."""
    line = " layer  "
    for head in range(0, heads, group):
        at = 8 + head + gap * (head // group)
        if len(line) <= at and (head == 0 or at > len(line.rstrip()) or head % 4 == 0):
            line = line.ljust(at) + str(head) + " "
    return line.rstrip()


def _spaced(row: str, group: int, gap: int) -> str:
    return (" " * gap).join(row[i : i + group] for i in range(0, len(row), group)) if gap else row


def _tell(screen: Screen, calibration: Calibration, name: str, maps: bool = False) -> None:
    about = calibration.facts["passes"][name]
    told = PASSES.get(name, _summary)(calibration, name)
    label = "" if maps else name
    for line in told.lines:
        screen.field(f"  {label}" if maps else label, line)
        label = ""
    for columns, rows in told.tables:
        screen.line()
        screen.table("", columns, rows)
    if maps:
        _show_maps(screen, [(title, map_lines(rows, _group(calibration, rows))) for title, rows in told.maps])
    events = about.get("events") or []
    for event in events[:FEW]:
        screen.field("", f"note: {event}")
    if len(events) > FEW:
        screen.field("", f"and {len(events) - FEW} more notes, see acc inspect --json")


def _show_maps(screen: Screen, maps: list[tuple[str, list[str]]]) -> None:
    """Maps below their titles; side by side where they fit."""
    while maps:
        count, width = 1, _wide(maps[0])
        while count < len(maps) and width + 4 + _wide(maps[count]) <= WIDTH:
            width += 4 + _wide(maps[count])
            count += 1
        abreast, maps = maps[:count], maps[count:]
        screen.line()
        for place, (title, _) in zip(PLACES[count - 1] if count <= len(PLACES) else range(1, count + 1), abreast):
            screen.line(f"{place}: {title}" if count > 1 else title)
        widths = [_wide(one) for one in abreast]
        for lines in zip_longest(*(lines for _, lines in abreast), fillvalue=""):
            screen.line((" " * 4).join(line.ljust(wide) for line, wide in zip(lines, widths)).rstrip())


def _wide(one: tuple[str, list[str]]) -> int:
    return max(len(line) for line in one[1])


def _group(calibration: Calibration, rows: Sequence[str | None]) -> int:
    """How many letters of a row share a KV head."""
    wide = max((len(row) for row in rows if row is not None), default=1)
    kv_heads = max(layer["kv_heads"] for layer in calibration.facts["layers"])
    return max(1, wide // kv_heads)


def _summary(calibration: Calibration, name: str) -> Told:
    """For a pass that nothing is known of here: its own summary."""
    lines = []
    for key, value in (calibration.facts["passes"][name].get("summary") or {}).items():
        lines.append(f"{key.replace('_', ' ')}: {_short(value)}")
    return Told(lines or ["no summary"])


def opened(calibration: Calibration) -> list[int]:
    """The layers that were calibrated."""
    return [index for index, layer in enumerate(calibration.facts["layers"]) if layer["refused"] is None]


def sink_mass(calibration: Calibration) -> Tensor | None:
    """The attention of each head on the first token, by domain `[domains, L, H]`."""
    found = calibration.of("sinks")
    mass = found.get("sink_mass", found.get("mass"))
    return mass[None] if mass is not None and mass.dim() == 2 else mass


def domains(calibration: Calibration, count: int) -> list[str]:
    """Names of that many texts, in the order of the tensors, as short as they can be told apart by."""
    said = (calibration.facts["passes"].get("sinks", {}).get("summary") or {}).get("domains")
    names = [str(name).replace("\\", "/").rstrip("/").rpartition("/")[2] for name in said or ()]
    return names if len(set(names)) == count else [f"text {number}" for number in range(count)]


def recall_curves(calibration: Calibration) -> tuple[list[int], Tensor | None, dict[str, list[float]]]:
    """Numbers of channels, the recall with so many `[open layers, Hkv, C]`, and the mean recall of other ways to choose
    them, by name."""
    found = calibration.of("channels")
    if "count" not in found or "recall" not in found:
        return [], None, {}
    counts = found["count"].tolist()
    said = (calibration.facts["passes"]["channels"].get("summary") or {}).get("recall")
    others = {
        name.replace("_", " "): values
        for name, values in (said.items() if isinstance(said, dict) else ())
        if name != "chosen" and isinstance(values, list) and len(values) == len(counts)
    }
    return counts, found["recall"][opened(calibration)].float(), others


def _heads(calibration: Calibration, name: str) -> Told:
    found, layers = calibration.of(name), opened(calibration)
    kind = found["kind"][layers].long()
    counted = kind.flatten().bincount(minlength=len(KINDS)).tolist()
    told = Told([", ".join(f"{number} {one}" for one, number in zip(KINDS, counted) if number) + " heads"])
    if "margin" in found:
        margin = found["margin"][layers].float().masked_fill(kind == 0, float("inf"))
        order = margin.flatten().abs().argsort(stable=True)[:FEW].tolist()
        close = [(layers[i // kind.shape[1]], i % kind.shape[1], margin.flatten()[i].item()) for i in order]
        close = [call for call in close if call[2] != float("inf")]
        if close:
            calls = ", ".join(f"{layer}.{head} ({value:.2g})" for layer, head, value in close)
            told.lines.append(f"closest calls between kinds, as layer.head (margin): {calls}")
    figures = [key for key in ("recall", "error", "cost") if key in found]
    if "length" in found and figures:
        columns = ["length", *(("recall", "lowest 5%") if "recall" in figures else ())]
        columns += [key for key in ("error", "cost") if key in figures]
        rows = []
        for index, length in enumerate(found["length"].tolist()):
            row = [f"{length:,} tokens"]
            for key in figures:
                values = found[key][layers][..., index].float().flatten()
                row.append(f"{values.mean():.3f}" if key != "error" else f"{values.mean():.2g}")
                if key == "recall":
                    row.append(f"{values.quantile(0.05):.3f}")
            rows.append(row)
        told.tables.append((columns, rows))
    if "budget" in found and "recall" in found:
        told.tables.append(_budgets(found, layers))
    letters = ["".join(LETTERS[k] for k in row) for row in found["kind"].long().tolist()]
    legend = ", ".join(f"{letter} {one}" for letter, one in zip(LETTERS, KINDS))
    told.maps.append((f"kinds: {legend}", _rows(letters, layers)))
    worst = found["recall"][..., -1].float() if "recall" in found else None
    if worst is not None:
        told.maps.append(("recall at the longest length, in tenths (9: 0.9 and more)", _rows(_digits(worst), layers)))
    return told


def _budgets(found: dict[str, Tensor], layers: list[int]) -> Table:
    """What heads of each kind keep of the longest context, in the middle of them."""
    kind, budget = found["kind"][layers], found["budget"][layers][..., -1, :].float()
    parts = {1: ("sink", "recent"), 2: ("columns", "diagonals"), 3: ("blocks", "")}
    rows = []
    for number, (first, second) in parts.items():
        which = kind == number
        if which.any():
            kept = budget[which].median(0).values.tolist()
            said = [f"{first} {100 * kept[0]:.1f}%", f"{second} {100 * kept[1]:.1f}%" if second else ""]
            recall = found["recall"][layers][..., -1][which].float().mean()
            rows.append([KINDS[number], str(int(which.sum())), *said, f"{recall:.3f}"])
    return ["kind, at the longest", "heads", "keeps", "and", "recall"], rows


def _retrieval(calibration: Calibration, name: str) -> Told:
    found, layers = calibration.of(name), opened(calibration)
    about = calibration.facts["passes"][name]
    rank = found["rank"][layers] if "rank" in found else None
    told = Told()
    heads = int((rank >= 0).sum()) if rank is not None else found["gate"][layers].numel()
    sparsity = (about.get("settings") or {}).get("sparsity", (about.get("summary") or {}).get("sparsity"))
    if isinstance(sparsity, int | float):
        told.lines.append(f"{round(sparsity * heads)} of {heads} KV heads stream at sparsity {sparsity:g}")
    else:
        told.lines.append(f"{heads} KV heads")
    if "sink" in found and "recent" in found:
        spans = [f"{found[key][layers].min()} to {found[key][layers].max()}" for key in ("sink", "recent")]
        told.lines.append(f"a streaming head keeps {spans[0]} first and {spans[1]} recent tokens")
    curve = {key.removeprefix("pareto_"): t for key, t in found.items() if key.startswith("pareto_") and t.dim() == 1}
    if "sparsity" in curve and "loss" in curve:
        titles = {"loss": "loss", "random": "of random", "accuracy": "right", "random_accuracy": "of random"}
        there = [key for key in titles if key in curve and len(curve[key]) == len(curve["sparsity"])]
        rows = []
        for index, share in enumerate(curve["sparsity"].tolist()):
            values = [curve[key][index].item() for key in there]
            said = [f"{100 * x:.1f}%" if "accuracy" in key else f"{x:.3g}" for key, x in zip(there, values)]
            rows.append([f"{100 * share:.1f}% stream", *said])
        told.tables.append((["KV heads", *(titles[key] for key in there)], rows))
    title = "gates in tenths: 9 retrieves, 0 streams"
    told.maps.append((title, _rows(_digits(found["gate"].float()), layers)))
    return told


def _channels(calibration: Calibration, name: str) -> Told:
    found, layers = calibration.of(name), opened(calibration)
    told = Told()
    if "dense" in found:
        dense = [str(index) for index in layers if found["dense"][index]]
        shown = ", ".join(dense[:12]) + (f" and {len(dense) - 12} more" if len(dense) > 12 else "")
        told.lines.append(f"layers that stay dense: {shown or 'none'}")
    counts, recall, others = recall_curves(calibration)
    if recall is not None:
        told.lines.append("recall of attention by the 1/16 of tokens that so many channels rank highest")
        if "official heads mixed" in others:
            told.lines.append("official: by Double Sparsity's statistic; mixed: as its code computes that")
        columns = ["channels", "recall", "lowest 5%", *(SHORT.get(name, name) for name in others)]
        rows = []
        for index, number in enumerate(counts):
            own = recall[..., index].flatten()
            rest = [f"{values[index]:.3f}" for values in others.values()]
            rows.append([str(number), f"{own.mean():.3f}", f"{own.quantile(0.05):.3f}", *rest])
        told.tables.append((columns, rows))
        middle = len(counts) // 2
        title = f"recall with {counts[middle]} channels, in tenths (9: 0.9 and more)"
        told.maps.append((title, _rows(_digits(found["recall"][..., middle].float()), layers)))
    return told


def _sinks(calibration: Calibration, name: str) -> Told:
    found, layers, mass = calibration.of(name), opened(calibration), sink_mass(calibration)
    summary = calibration.facts["passes"][name].get("summary") or {}
    if mass is None:
        return _summary(calibration, name)
    told, names, kinds = Told(), domains(calibration, len(mass)), found.get("class")
    classes = [str(one) for one in summary.get("classes", ())]
    columns = ["text", "mean share", "largest", *classes]
    rows = []
    for index, (label, of) in enumerate(zip(names, mass[:, layers].float())):
        counted = []
        if kinds is not None:
            counted = kinds[index][layers].long().flatten().bincount(minlength=len(classes)).tolist()
        rows.append([label, f"{of.mean():.3f}", f"{of.max():.3f}", *map(str, counted)])
    told.lines.append("attention on the first token, and what heads are by it")
    if "flips" in found and len(mass) > 1:
        told.lines.append(f"{int(found['flips'].sum())} heads change between these texts")
    peak = summary.get("residual_of_token_0")
    if isinstance(peak, dict):
        told.lines.append(
            f"the first token's residual is {peak['times_the_median']:g} times the median, at layer {peak['layer']}"
        )
    told.tables.append((columns, rows))
    for index, (label, of) in enumerate(zip(names, mass.float())):
        if kinds is not None and classes:
            letters = ["".join(classes[k][0] for k in row) for row in kinds[index].long().tolist()]
            legend = ", ".join(f"{one[0]} {one}" for one in classes)
            told.maps.append((f"{label}: {legend}", _rows(letters, layers)))
        told.maps.append((f"{label}: share in tenths", _rows(_digits(of), layers)))
    return told


def _digits(values: Tensor) -> list[str]:
    """`[L, H]` of numbers from 0 to 1 -> rows of one digit each."""
    return ["".join(str(d) for d in row) for row in (10 * values).floor().clamp(0, 9).int().tolist()]


def _rows(letters: list[str], layers: list[int]) -> list[str | None]:
    """The rows of layers that were calibrated."""
    return [row if index in layers else None for index, row in enumerate(letters)]


def _short(value: Any) -> str:
    """A value of a summary in a few words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = ", ".join(_short(item) for item in value[:FEW])
        return f"[{shown}{', ...' if len(value) > FEW else ''}]"
    return str(value)


PASSES: dict[str, Callable[[Calibration, str], Told]] = {
    "heads": _heads,
    "retrieval": _retrieval,
    "channels": _channels,
    "sinks": _sinks,
}

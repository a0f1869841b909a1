"""The one loop that applies a recipe to a model: stream, collect, compress, write, go on with what was written."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..calibrate.base import Statistic, squares
from ..calibrate.evaluate import fingerprint_of
from ..calibrate.stream import Block, Outside, Statistics, Stream
from ..formats.base import Entry, PackedWeight, Scheme, format_of, quantization_config
from ..formats.ledger import Ledger
from ..formats.model import Matrix
from ..formats.names import select
from ..formats.source import Source, all_finite, finite
from ..formats.store import Store
from .card import card
from .plan import sizes
from .recipe import Recipe, Step
from .refine import Rounding, refine

Record = dict[str, Any]
Report = Callable[[float, str], None]  # told the fraction done and what is being done

# Statistics of one pass are kept below this, or below what the block's weights take if that is more; experts beyond it
# wait for another pass over the same block. 64 experts of 2048 and 1024 inputs fit.
STATISTICS_BYTES = 3 << 29
# Solving for one weight takes about as long as passing so many tokens through it. Only the estimate of time depends
# on it.
SOLVE = 8000.0
SMALL = 16 << 20  # weights of a call that one core solves
LARGE = 128 << 20  # bytes of a block from which freed memory is given back to the system
TOGETHER = 8 << 20  # weights that are solved in one call, or a core's share if less; a matrix stays whole


@dataclass(frozen=True)
class Outcome:
    """What a run made: its folder, the lines of its report, and how long it took, in all and by phase."""

    folder: Path
    records: list[Record]
    events: list[Record]
    seconds: float
    phases: dict[str, float]


def apply(
    recipe: Recipe,
    source: Source,
    out: Path,
    batches: Sequence[Tensor],
    *,
    text_record: Record | None = None,
    device: str = "cpu",
    spill: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    papers: Mapping[str, str] | None = None,
    report: Report = lambda fraction, what: None,
) -> Outcome:
    """Runs `recipe` over the model and writes `out`, one shard per block, so that a killed run can go on.

    `batches` are token ids `[B, T]`, empty when no step needs statistics. Raises ValueError for input that cannot be
    compressed, OSError when the disk cannot take the output; what was finished by then stays for `resume`. `papers` are
    texts to be kept beside the weights, by file name.
    """
    started = time.monotonic()
    original, source = source, recipe.rewrite(source)
    recipe = recipe.settled(source.dtype, device)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    stream = Stream(source, dtype=dtype, device=device, spill=spill)
    chosen = assign(recipe, stream)
    if max(stream.block_bytes) >= LARGE:
        _give_back_memory()
    if (recipe.needs or recipe.refine) and not batches:
        wants = recipe.steps[0].method if recipe.needs else "refine"
        raise ValueError(f"{wants} needs calibration text: name one with --data")
    if recipe.rewrites:
        report(0.0, "comparing with the rewritten model")
        recipe.prove(original, device)
    units = [*(f"block {index}" for index in range(len(stream.skeleton.layers))), Outside.name]
    identity = {"acc": __version__, "recipe": recipe.to_dict(), "source": source.identity(), "data": text_record}
    size = sum(sizes(chosen, stream).values())
    store = Store.create(out, identity, units, resume=resume, overwrite=overwrite, needed_bytes=size)
    if store.complete:
        report(1.0, "nothing left to do")
        return Outcome(store.out, [], [], time.monotonic() - started, {})
    for name, text in (papers or {}).items():
        store.keep(name, text)
    work = _Work(recipe, stream, chosen, batches, report)
    entries: dict[str, Entry] = {}

    def pack(block: Block) -> dict[str, tuple[Entry, list[PackedWeight]]]:
        work.enter(block)
        if store.done(block.name):
            work.skip(block, chosen)
            return _reload(block, store)
        return _compress_block(block, chosen, store, work)

    for block in stream.blocks(batches):
        packed = pack(block)
        entries |= {name: entry for name, (entry, _) in packed.items()}
        block.replace({name: partial(entry.dense, parts, source.dtype) for name, (entry, parts) in packed.items()})
        del block, packed
    entries |= {name: entry for name, (entry, _) in pack(Outside(stream)).items()}
    stream.close()
    records = list(store.records())
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if entries:
        config["quantization_config"] = quantization_config(
            {name: (entry.shape, entry.full_scheme()) for name, entry in entries.items()}
        )
    folder = store.close(
        config,
        source.side_files(),
        {"recipe.yaml": recipe.to_yaml(), "README.md": card(source, recipe, records, text_record), **(papers or {})},
        expected=_settle(source, entries),
        fingerprint=fingerprint_of(_Written(source, store, entries)),
        root=source.folder,
    )
    report(1.0, "done")
    events = [{"tensor": r["tensor"], **event} for r in records for event in r.get("events", [])]
    events = [*({"event": e} for e in store.events), *events]
    work.take_phases()
    return Outcome(folder, records, events, time.monotonic() - started, dict(work.phases))


def _give_back_memory() -> None:
    """Makes glibc return freed tensors of 8 MiB and more to the system.

    It would raise that limit to 32 MiB by itself, and matrices of experts, freed between others that live, leave holes
    that stay resident: measured 0.6 GiB while 64 experts of 2M weights are fused, and more from block to block. Where
    blocks are small it saves little, and each activation's fresh pages take time: a quarter more on SmolLM2-135M.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 8 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD: what is smaller is reused, not given back and taken each time


def assign(recipe: Recipe, stream: Stream) -> dict[str, Step]:
    """Which step compresses which stored tensor; a later step overrides an earlier one.

    `*` means every matrix of every block. The output head is compressed when a pattern names it.

    Raises ValueError for a pattern that fits nothing, with the nearest names.
    """
    spellings: dict[str, set[str]] = {}
    head = {matrix.tensor: {matrix.tensor, f"{matrix.module}.weight"} for matrix in stream.skeleton.outer_matrices()}
    for index in range(len(stream.skeleton.layers)):
        for matrix in stream.skeleton.matrices(index):
            leaf = matrix.tensor.removesuffix(".weight").rpartition(".")[2]
            module = matrix.module if matrix.role == "linear" else f"{matrix.module}.{matrix.expert}.{leaf}"
            spellings.setdefault(matrix.tensor, {matrix.tensor}).add(f"{module}.weight")
    if recipe.steps and not spellings:
        raise ValueError(f"{stream.source.spec}: no block has a matrix that could be compressed")
    chosen: dict[str, Step] = {}
    for step in recipe.steps:
        everywhere = [pattern for pattern in step.targets if pattern == "*"]
        named = [pattern for pattern in step.targets if pattern != "*"]
        targets = select(everywhere, spellings, "--targets") | select(named, spellings | head, "--targets")
        for name in targets - select(step.ignore, spellings | head, "--ignore"):
            chosen[name] = step
    if recipe.steps and not chosen:
        raise ValueError("nothing is left to compress: every target is ignored")
    return chosen


def _compress_block(
    block: Block, chosen: dict[str, Step], store: Store, work: _Work
) -> dict[str, tuple[Entry, list[PackedWeight]]]:
    """Compresses what the recipe chose of a block and writes the whole block."""
    for name, tensor in block.tensors.items():
        finite(tensor, name)
    wanted = [matrix for matrix in block.matrices if matrix.tensor in chosen]
    made: dict[Matrix, PackedWeight] = {}
    records: dict[Matrix, Record] = {}
    phase = work.stream.clock.phase
    learning = work.refine > 0 and not isinstance(block, Outside)
    roundings: dict[Matrix, Rounding | None] = {}
    for group in passes(wanted, chosen, max(STATISTICS_BYTES, block.nbytes)):
        needs = tuple(dict.fromkeys(n for m in group for n in chosen[m.tensor].settings.needs))
        seen = [m for m in group if chosen[m.tensor].settings.needs]
        statistics = block.observe(seen, needs, outputs=learning and block.outputs is None) if needs else None
        with phase("solve"):
            for matrix, packed, record in solve(block, group, chosen, statistics):
                made[matrix], records[matrix] = packed, record
                if learning:
                    known = statistics.of(matrix).values() if statistics is not None else ()
                    roundings[matrix] = Rounding.of(packed, block.weight(matrix), known)
                work.solved(packed.shape)
        del statistics
    if learning:
        with phase("refine"):
            _refine(block, roundings, made, records, work)
    parts: dict[str, list[PackedWeight]] = {}
    for matrix in sorted(made, key=lambda m: (m.tensor, m.part or 0)):
        parts.setdefault(matrix.tensor, []).append(made[matrix])
    entries = _entries(block, {name: (pieces[0].shape, pieces[0].scheme) for name, pieces in parts.items()})
    stored = {name: block.tensors[name] for name in block.names if name not in parts}
    lines = [*records.values(), *(_kept(name, tensor) for name, tensor in stored.items())]
    with phase("pack"):
        for name, pieces in parts.items():
            stored |= {name + suffix: tensor for suffix, tensor in entries[name].pack(pieces).items()}
    remarks = work.stream.source.remarks
    lines = [
        r | ({"events": remarks[r["tensor"]] + r.get("events", [])} if r["tensor"] in remarks else {}) for r in lines
    ]
    with phase("write"):
        lines.sort(key=lambda r: (r["tensor"], r.get("part") or 0))
        store.write(block.name, stored, lines, work.take_phases())
    return {name: (entries[name], pieces) for name, pieces in parts.items()}


def solve(
    block: Block, group: list[Matrix], chosen: dict[str, Step], statistics: Statistics | None
) -> Iterator[tuple[Matrix, PackedWeight, Record]]:
    """Yields every matrix, packed, and its record; batches that leave a core idle are solved side by side."""
    threads = torch.get_num_threads() if block.device.type == "cpu" else 1
    share = -(-sum(math.prod(m.shape) for m in group) // threads)
    batches = _together(group, chosen, min(TOGETHER, share))
    small = all(sum(math.prod(m.shape) for m in batch) < SMALL for batch in batches)
    if not small or threads == 1:
        for batch in batches:
            yield from _solve_batch(block, batch, chosen, statistics)
        return
    # One thread a batch: a column is too little work to share, and on a busy machine each of thousands of barriers
    # waits for a core (measured on 1536 x 576, two cores: 0.3 s alone, 17 s and more together).
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        for results in pool.map(lambda batch: _solve_batch(block, batch, chosen, statistics), batches):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _solve_batch(
    block: Block, batch: list[Matrix], chosen: dict[str, Step], statistics: Statistics | None
) -> list[tuple[Matrix, PackedWeight, Record]]:
    """Compresses matrices of one step with equally many inputs; what shares an input is prepared once."""
    step, started = chosen[batch[0].tensor], time.monotonic()
    prepared: dict[Any, tuple[Any, list[Record]]] = {}
    own: list[dict[str, Statistic]] = []
    keys = [statistics.key(matrix) if statistics is not None else None for matrix in batch]
    for matrix, key in zip(batch, keys):
        known = statistics.of(matrix) if statistics is not None else {}
        own.append({name: known[name] for name in step.settings.needs})
        if key not in prepared:
            said: list[Record] = []
            ready = step.settings.prepare(_supported(matrix, own[-1], statistics, said), _event(said))
            prepared[key] = ready, said
    weights = [block.weight(matrix).float() for matrix in batch]
    events: list[list[Record]] = [[] for _ in batch]
    made = step.settings.compress_all(weights, [prepared[key][0] for key in keys], [_event(e) for e in events])
    share = (time.monotonic() - started) / sum(weight.numel() for weight in weights)
    return [
        (matrix, packed, _record(matrix, step, weight, packed, its, [*prepared[key][1], *said], share * weight.numel()))
        for matrix, key, weight, packed, its, said in zip(batch, keys, weights, made, own, events, strict=True)
    ]


def _together(group: list[Matrix], chosen: dict[str, Step], limit: int) -> list[list[Matrix]]:
    """Matrices that one call compresses: same step, as many inputs, at most `limit` weights."""
    batches: list[list[Matrix]] = []
    growing: dict[tuple[int, int], tuple[list[Matrix], int]] = {}
    for matrix in group:
        key, size = (id(chosen[matrix.tensor]), matrix.shape[1]), math.prod(matrix.shape)
        members, used = growing.get(key, ([], 0))
        if not members or used + size > limit:
            members, used = [], 0
            batches.append(members)
        members.append(matrix)
        growing[key] = members, used + size
    return batches


def _supported(
    matrix: Matrix, own: dict[str, Statistic], statistics: Statistics | None, said: list[Record]
) -> dict[str, Statistic]:
    """An expert's statistics, leant on its layer's mean where it saw too few tokens; each such case is an event."""
    if matrix.expert is None or statistics is None:
        return own
    siblings = statistics.siblings(matrix)
    supported = {name: s.towards([sibling[name] for sibling in siblings]) for name, s in own.items()}
    for name, statistic in own.items():
        if supported[name] is not statistic:
            said.append(
                {"event": "few_tokens", "statistic": name, "tokens": statistic.tokens, "features": matrix.shape[1]}
            )
    return supported


def _refine(
    block: Block,
    roundings: dict[Matrix, Rounding | None],
    made: dict[Matrix, PackedWeight],
    records: dict[Matrix, Record],
    work: _Work,
) -> None:
    """Learns the rounding of what was made of a block; brings that and its records up to date."""
    learnt = {matrix: rounding for matrix, rounding in roundings.items() if rounding is not None}
    for matrix in made.keys() - learnt.keys():
        records[matrix]["events"].append({"event": "not_refined", "reason": "it has no codes to choose"})
    if not learnt:
        return
    targets = block.outputs if block.outputs is not None else block.run()
    gain = refine(block, learnt, targets, work.refine, work.seed + block.index, work.refined)
    for matrix, rounding in learnt.items():
        records[matrix]["refined"] = gain
        if gain["after"] < gain["before"]:
            weight, made[matrix] = block.weight(matrix).float(), rounding.pack()
            delta = made[matrix].dequantize() - weight
            records[matrix] |= {"relative_error": _relative(delta, weight, squares), "error_of": "weight"}


def _event(into: list[Record]) -> Callable[..., None]:
    def event(kind: str, **figures: Any) -> None:
        into.append({"event": kind, **figures})

    return event


def _record(
    matrix: Matrix,
    step: Step,
    weight: Tensor,
    packed: PackedWeight,
    own: dict[str, Statistic],
    events: list[Record],
    seconds: float,
) -> Record:
    """A matrix' line of the report. Its error is relative: of the output where the input is known, else of the
    weight."""
    delta = packed.dequantize() - weight
    if not all_finite(delta):
        raise ValueError(f"{matrix.name}: {step.method} gave values that are not finite; try a larger damp_percent")
    known = next((s for s in own.values() if s.tokens), None)
    record: Record = {
        "tensor": matrix.tensor,
        "part": matrix.part,
        "method": step.method,
        "scheme": packed.scheme,
        "shape": list(packed.shape),
        "parameters": weight.numel(),
        "bits": packed.scheme.get("bits"),
        "nominal_bits": round(packed.nominal, 4),
        "stored_bits": round(packed.stored_bits, 4),
        "relative_error": _relative(delta, weight, known.error if known is not None else squares),
        "error_of": "output" if known is not None else "weight",
        "tokens": next((s.tokens for s in own.values()), None),
        "events": events,
        "seconds": seconds,
    }
    return record


def _relative(delta: Tensor, weight: Tensor, of: Callable[[Tensor], float]) -> float:
    """An error `[O, I]` of a weight relative to the weight itself, both measured with `of`."""
    scale = of(weight)
    return of(delta) / scale if scale > 0 else 0.0


def _kept(name: str, tensor: Tensor) -> Record:
    return {
        "tensor": name,
        "method": "kept",
        "shape": list(tensor.shape),
        "parameters": tensor.numel(),
        "stored_bits": 8.0 * tensor.element_size(),
    }


def passes(wanted: list[Matrix], chosen: dict[str, Step], limit: int) -> list[list[Matrix]]:
    """Cuts a block's matrices into groups whose statistics take at most `limit` bytes together; siblings of a layer
    stay together as long as they can. An expert's matrices with the same input count once; which linears share theirs
    is not known before they run."""
    groups: list[list[Matrix]] = [[]]
    sizes: dict[Any, int] = {}
    for matrix in wanted:
        key = matrix.tensor if matrix.role == "linear" else (matrix.module, matrix.expert, matrix.role)
        size = 4 * matrix.shape[1] ** 2 if chosen[matrix.tensor].settings.needs else 0
        if groups[-1] and sum((sizes | {key: size}).values()) > limit:
            groups.append([])
            sizes = {}
        groups[-1].append(matrix)
        sizes[key] = size
    return groups


def _entries(block: Block, first: dict[str, tuple[tuple[int, int], Scheme]]) -> dict[str, Entry]:
    """How each packed tensor of the block is described; `first` holds shape and scheme of its first matrix."""
    stacks = Counter(m.tensor for m in block.matrices if m.part is not None)
    turned = {m.tensor for m in block.matrices if m.transposed}
    return {
        name: Entry(format_of(scheme), shape, scheme, stacks.get(name), name in turned)
        for name, (shape, scheme) in first.items()
    }


def _reload(block: Block, store: Store) -> dict[str, tuple[Entry, list[PackedWeight]]]:
    """What an earlier run packed of a block, from its shard."""
    unit = block.name
    first = {r["tensor"]: r for r in reversed(store.lines[unit]["records"]) if r["method"] != "kept"}
    stored = store.read(unit)
    found = {}
    for name, entry in _entries(block, {n: (tuple(r["shape"]), r["scheme"]) for n, r in first.items()}).items():
        found[name] = (entry, entry.unpack({suffix: stored[name + suffix] for suffix in entry.layout()}))
    return found


class _Written:
    """The finished model as it lies in the shards, before its folder is published: what a `Stream` needs of a
    source."""

    def __init__(self, source: Source, store: Store, entries: dict[str, Entry]):
        self.spec, self.folder, self.dtype, self.changes = source.spec, source.folder, source.dtype, source.changes
        self.names, self.info = source.names, source.info
        self._shards, self._entries = store.shards(store.units), entries

    def tensor(self, name: str) -> Tensor:
        read, entry = self._shards.read, self._entries.get(name)
        if entry is None:
            return read(name)
        return entry.dense(entry.unpack({suffix: read(name + suffix) for suffix in entry.layout()}), self.dtype)


def _settle(source: Source, entries: dict[str, Entry]) -> set[str]:
    """Balances the ledger; returns every tensor name that the output must hold."""
    ledger = Ledger(source.names(), [path.name for path in source.side_files()])
    expected: set[str] = set()
    for name in source.names():
        ledger.fate(name, "packed" if name in entries else "copied")
        expected |= {name + suffix for suffix in (entries[name].layout() if name in entries else [""])}
    for path in source.side_files():
        ledger.fate(path.name, "copied")
    ledger.settle()
    return expected


class _Work:
    """How far a run is, in units of what takes time: weights solved for, and tokens through weights."""

    def __init__(
        self, recipe: Recipe, stream: Stream, chosen: dict[str, Step], batches: Sequence[Tensor], report: Report
    ):
        tokens = sum(batch.numel() for batch in batches)
        passes = 2 if any(step.settings.needs for step in chosen.values()) else 1
        self.report, self.done, self.what = report, 0.0, ""
        self.stream = stream
        self.phases: Counter[str] = Counter()  # seconds of this run
        self.total = 0.0
        self.refine, self.seed = recipe.refine, recipe.calibration.seed
        self._step = tokens / max(len(batches), 1) * 3  # a backward takes twice a forward
        last = len(stream.skeleton.layers) - 1
        for index, names in enumerate(stream.skeleton.block_names):
            weights = {name: math.prod(stream.skeleton.shapes[name]) for name in names}
            runs = passes - (index == last)
            self.total += runs * tokens * sum(weights.values())
            self.total += SOLVE * sum(n for name, n in weights.items() if name in chosen)
            self.total += self.refine * self._step * sum(weights.values())

    def enter(self, block: Block) -> None:
        self.what = block.name
        weights = block.weights
        self.stream.tick = lambda tokens: self.add(tokens * weights)
        self.refined = lambda: self.add(self._step * weights)
        self.add(0)

    def take_phases(self) -> dict[str, float]:
        """Seconds by phase since the last time this was asked."""
        taken = self.stream.clock.take()
        self.phases.update(taken)  # pyright: ignore[reportArgumentType, reportCallIssue] - counts seconds
        return taken

    def solved(self, shape: tuple[int, int]) -> None:
        self.add(SOLVE * shape[0] * shape[1])

    def skip(self, block: Block, chosen: dict[str, Step]) -> None:
        """A block that an earlier run finished: only its forward is left."""
        shapes = self.stream.skeleton.shapes
        self.total -= SOLVE * sum(math.prod(shapes[name]) for name in block.names if name in chosen)
        if not isinstance(block, Outside):
            self.total -= self.refine * self._step * block.weights

    def add(self, amount: float) -> None:
        self.done += amount
        self.report(min(self.done / max(self.total, 1.0), 1.0), self.what)

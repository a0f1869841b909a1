"""What a run would take: memory and time, from shapes and a two-second measurement of this machine. Estimates."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..calibrate.stream import Stream
from ..formats.model import Matrix
from ..registry import lookup
from .apply import STATISTICS_BYTES, TOGETHER
from .base import Method
from .budget import COMPARED, IN_FP64
from .recipe import Recipe, Step
from .refine import STEP_TOKENS

# Memory. Measured with one thread: `acc inspect demo` takes 0.45 GiB; the rest is fitted to tests/bench/results/
# memory.json and smollm2-135m.json, which it meets within 30%; a small model's learned rounding may take twice as much.
PROCESS = 0.45 * 2**30  # bytes of Python with torch and transformers
HEAP = 1.15  # what the C library's heap keeps beside what is used
ACTIVATIONS = 20, 8  # values that a token's forward holds at once, in widths of the stream and of a block's MLP
BACKWARD = 3.5  # as much again as a forward, to keep what a backward needs
SCRATCH = 24  # bytes for each weight that is being solved
REFINE = 10  # bytes for each weight of a block while its rounding is learned
# Time. The share of a large product's speed that blocks and statistics reach, and how much longer a weight takes in a
# run than in the measurement. With them the phases of smollm2-135m.json come out within a third.
EFFICIENCY = 0.9
SOLVING = 1.5
START = 6.0  # seconds until the first block
_LEAVES = re.compile(r"o_|out_|down_|c_proj|dense|fc2|w2")
PARTS = 4  # of a block, that get settings of their own in a mix: q, k, v; o; gate, up; down


@dataclass(frozen=True)
class Speed:
    """This machine, as measured now: whatever else it is doing counts."""

    products: float  # operations per second of a product in the type that blocks are run in
    statistics: float  # the same in fp32
    copy: float  # bytes per second, read and written
    solving: dict[str, tuple[float, float]]  # method -> seconds for each column and, beside, for each weight
    threads: int


@dataclass(frozen=True)
class Work:
    """What has to be done: in operations of products, and in weights."""

    forward: float
    statistics: float
    solve: float
    refine: float
    weights: dict[str, int]  # method -> weights to be solved
    columns: dict[str, int]  # method -> columns that are gone through, of every input of its own
    moved: float  # bytes read and written


class Shapes:
    """A model's blocks as far as cost depends on them."""

    def __init__(self, recipe: Recipe, stream: Stream, chosen: Mapping[str, Step]):
        skeleton = stream.skeleton
        config = skeleton.model.config.get_text_config(decoder=True)
        self.recipe, self.chosen, self.stream = recipe, chosen, stream
        self.hidden: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        self.heads: int = config.num_attention_heads
        width = getattr(config, "head_dim", None)
        self.attention: int = self.heads * width if width else self.hidden
        self.eager = skeleton.model.config._attn_implementation == "eager"
        experts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
        number = next((n for n in experts if n), None)
        self.share = (getattr(config, "num_experts_per_tok", None) or 1) / number if number else 1.0  # of an expert
        self.blocks = [skeleton.matrices(index) for index in range(len(skeleton.layers))]
        self.weights = [sum(math.prod(skeleton.shapes[n]) for n in names) for names in skeleton.block_names]
        self.outer = sum(math.prod(skeleton.shapes[name]) for name in skeleton.outer_names)

    def wanted(self, block: list[Matrix]) -> list[Matrix]:
        return [matrix for matrix in block if matrix.tensor in self.chosen]

    def inputs(self, block: list[Matrix]) -> dict[object, tuple[int, float, str]]:
        """`{input: (features, share of the tokens that it sees, method)}` of what needs statistics. That linears of one
        module share their input, but for the one that leaves it, is a guess: only running tells."""
        found: dict[object, tuple[int, float, str]] = {}
        for matrix in self.wanted(block):
            step = self.chosen[matrix.tensor]
            if step.settings.needs:
                linear = matrix.role == "linear"
                key: object = (matrix.module, matrix.expert, matrix.role)
                if linear:
                    parent, _, leaf = matrix.module.rpartition(".")
                    key = parent, matrix.shape[1], bool(_LEAVES.match(leaf))
                found[key] = matrix.shape[1], 1.0 if linear else self.share, step.method
        return found

    def active(self, index: int) -> float:
        """Weights that a token is multiplied by."""
        idle = sum(math.prod(m.shape) for m in self.blocks[index] if m.role != "linear") * (1 - self.share)
        return self.weights[index] - idle

    def largest(self, index: int) -> int:
        """Weights of the largest matrix that is compressed."""
        return max((math.prod(m.shape) for m in self.wanted(self.blocks[index])), default=0)

    def squares(self, index: int) -> list[float]:
        """Bytes of the statistics of each input."""
        return [4.0 * features**2 for features, *_ in self.inputs(self.blocks[index]).values()]

    def kept(self, index: int, size: int) -> float:
        """Bytes of the statistics that are kept at once, while weights have `size` bytes."""
        squares = self.squares(index)
        return min(sum(squares), max(STATISTICS_BYTES, size * self.weights[index], max(squares, default=0)))

    def activations(self, index: int, tokens: int) -> float:
        """Bytes that a forward of so many tokens at once holds."""
        inner = [m for m in self.wanted(self.blocks[index]) if m.shape[1] != self.hidden]
        wide = sum(m.shape[1] * (1.0 if m.expert is None else self.share) for m in inner)
        act = tokens * 4 * (ACTIVATIONS[0] * self.hidden + ACTIVATIONS[1] * wide)
        return act + (tokens * 12 * self.heads * self.recipe.calibration.seqlen if self.eager else 0)

    def solving(self, index: int) -> float:
        """Bytes that solving a block's matrices takes, beside its statistics and what was packed."""
        largest, square = self.largest(index), max(self.squares(index), default=0.0)
        together = max(largest, min(TOGETHER, sum(math.prod(m.shape) for m in self.wanted(self.blocks[index]))))
        # a square is factorised in five copies; two stay while matrices are solved
        return max(5 * square, 2 * square * together / max(largest, 1) + SCRATCH * together)

    def packed(self, index: int, after: Mapping[str, int]) -> int:
        return sum(after[name] for name in {m.tensor for m in self.wanted(self.blocks[index])})

    def fused(self, index: int) -> int:
        """Weights of the largest parameter that is put together from several tensors."""
        targets, shapes = self.stream.skeleton.targets, self.stream.skeleton.shapes
        together: Counter[str] = Counter()
        for name in self.stream.skeleton.block_names[index]:
            if targets[name].pattern is not None:
                together[targets[name].parameter] += math.prod(shapes[name])
        return max(together.values(), default=0)


def memory(shapes: Shapes, after: Mapping[str, int], tokens: int, batch: int) -> dict[str, float]:
    """Bytes that a run would have at its greatest moments, by moment; `tokens` of calibration in all, `batch` at once,
    `after` as `sizes` gives them. Hidden states are in memory."""
    recipe, stream, seqlen = shapes.recipe, shapes.stream, shapes.recipe.calibration.seqlen
    size, refine = stream.dtype.itemsize, recipe.refine > 0
    once = min(max(min(batch, STEP_TOKENS) if refine else batch, seqlen), tokens)
    carried = (2 if refine else 1) * tokens * shapes.hidden * size
    found = {"observe": 0.0, "solve": 0.0, "refine": 0.0, "check": 4.0 * shapes.outer}
    for index in range(len(shapes.blocks)):
        weights, fused = shapes.weights[index], shapes.fused(index)
        kept, act, packed = shapes.kept(index, size), shapes.activations(index, once), shapes.packed(index, after)
        if tokens:
            found["observe"] = max(found["observe"], carried + size * weights + max(size * fused, kept + act))
        solving = carried + kept + packed + (size * weights if refine else 0) + shapes.solving(index)
        found["solve"] = max(found["solve"], solving)
        if refine:
            found["refine"] = max(found["refine"], carried + (size + REFINE) * weights + BACKWARD * act + packed)
        found["check"] = max(found["check"], 4.0 * (weights + max(fused, 2 * shapes.largest(index))))
    return {moment: PROCESS + HEAP * nbytes for moment, nbytes in found.items() if nbytes}


def memory_of_measuring(
    shapes: Shapes, choices: Sequence[Mapping[str, int]], probe: int, tokens: int, lesson: int
) -> float:
    """Bytes that a run has at its greatest while it measures what a mix loses, in fp32: a block's packed weights at
    every choice, as `sizes` gives them; hidden states of all `tokens` before and after the block; and `probe` tokens of
    every part or, where rounding is learned on `lesson` tokens a step, of every block, carried to the logits."""
    blocks = len(shapes.blocks)
    states = 4.0 * shapes.hidden * (2 * tokens + (1 if lesson else PARTS) * blocks * probe)
    most = 0.0
    for index in range(blocks):
        weights, act = shapes.weights[index], shapes.activations(index, probe)
        packed = sum(shapes.packed(index, after) for after in choices)
        moments = [shapes.kept(index, 4) + max(act, shapes.solving(index))]
        if lesson:  # on a copy of what learning begins with, and with the dense block set aside
            moments.append((REFINE + 8) * weights + max(act, BACKWARD * shapes.activations(index, lesson)))
        most = max(most, 4.0 * weights + packed + max(moments))
    # logits of the dense model, of what is compared and of what was before; what a divergence is summed from
    logits = 4.0 * shapes.outer + (3 * 4.0 * COMPARED + 5 * 8.0 * IN_FP64) * shapes.vocabulary
    return PROCESS + HEAP * (states + max(most, logits))


def work(shapes: Shapes, before: int, after: int, tokens: int) -> Work:
    """`before` and `after` are the model's bytes; `tokens` of calibration in all."""
    recipe, seqlen = shapes.recipe, shapes.recipe.calibration.seqlen
    needs = any(step.settings.needs for step in shapes.chosen.values())
    passes = (2 if needs or recipe.refine else 0) - 1 / len(shapes.blocks)
    forward = statistics = solve = refine = 0.0
    weights: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    for index, block in enumerate(shapes.blocks):
        each = (
            2 * shapes.active(index) + 2 * seqlen * shapes.attention
        )  # operations for a token; half a square of scores
        forward += max(passes, 0) * tokens * each
        steps = recipe.refine * min(STEP_TOKENS, tokens) if tokens else 0
        refine += 3.2 * steps * each  # a backward takes two forwards; before and after, a few batches are measured
        for features, share, method in shapes.inputs(block).values():
            statistics += share * tokens * features**2
            solve += features**3
            columns[method] += features
        for matrix in shapes.wanted(block):
            step, (rows, features) = shapes.chosen[matrix.tensor], matrix.shape
            weights[step.method] += rows * features
            solve += 3 * rows * features**2 if step.settings.needs else 0  # errors passed on, and measured
    return Work(forward, statistics, solve, refine, dict(weights), dict(columns), 3.0 * before + 2.0 * after)


def measure(recipe: Recipe, dtype: torch.dtype, seconds: float = 2.0) -> Speed:
    """Takes about `seconds`; the quickest try counts, as other work on the machine only makes it slower."""
    share, threads = seconds / (3 + len(recipe.steps)), torch.get_num_threads()
    products, statistics = (_product(kind, share) for kind in (dtype, torch.float32))
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    copied = _quickest(lambda: target.copy_(source), share)
    torch.set_num_threads(1)
    try:
        solving = {step.method: _solving(step.settings, share) for step in recipe.steps}
    finally:
        torch.set_num_threads(threads)
    return Speed(products, statistics, 2.0 * 4 * len(source) / copied, solving, threads)


def duration(todo: Work, speed: Speed) -> dict[str, float]:
    """Seconds by phase."""
    found = {
        "forward": todo.forward / (EFFICIENCY * speed.products),
        "statistics": todo.statistics / (EFFICIENCY * speed.statistics),
        "solve": todo.solve / (EFFICIENCY * speed.statistics)
        + sum(
            SOLVING * (number * speed.solving[name][1] + todo.columns.get(name, 0) * speed.solving[name][0])
            for name, number in todo.weights.items()
        )
        / speed.threads,
        "refine": todo.refine / (EFFICIENCY * speed.products),
        "other": START + todo.moved / (speed.copy / 8),  # a disk, checksums
    }
    return {phase: seconds for phase, seconds in found.items() if seconds}


def probing(shapes: Shapes, choices: int, probe: int, tokens: int, learned: int, speed: Speed) -> float:
    """Seconds of forward passes that a budget takes: all `tokens` once; every part at every choice on `probe` tokens
    and one of each carried to the end or, where rounding is learned on so many tokens, each block learned whole and
    with each part dense, and one output of each block carried."""
    blocks = len(shapes.blocks)
    each = sum(2 * shapes.active(index) for index in range(blocks)) / blocks
    tried = (PARTS + 1) * (3 * learned + 2 * probe) if learned else PARTS * choices * probe
    carried = (1 if learned else PARTS) * blocks / 2 * probe
    runs = blocks * (tried + carried + tokens)
    return runs * each / (EFFICIENCY * speed.statistics)  # in fp32


def _product(dtype: torch.dtype, seconds: float) -> float:
    """Operations per second of a product of matrices as large as those of a block."""
    x, weight = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / _quickest(lambda: torch.nn.functional.linear(x, weight), seconds)


def _solving(method: Method, seconds: float) -> tuple[float, float]:
    """Seconds for each column that a call goes through, however few its rows, and for each weight, of a small matrix
    whose products cost nothing."""
    event = lambda kind, **figures: None  # noqa: E731
    drawn = 0.02 * torch.randn(2048, 128, generator=torch.Generator().manual_seed(0))
    statistics = {name: lookup("calibrate", name)(drawn.shape[1]) for name in method.needs}
    prepared = method.prepare(statistics, event)
    few = _quickest(lambda: method.compress(drawn[:16], prepared, event), seconds / 2)
    many = _quickest(lambda: method.compress(drawn, prepared, event), seconds / 2)
    return few / drawn.shape[1], max(many - few, 0.0) / drawn.numel()


def _quickest(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the quickest of as many tries as fit, after one that warms up."""
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() >= end:
            return best

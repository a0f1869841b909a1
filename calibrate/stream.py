"""One loop that walks a model block by block, with one block in memory."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..formats.model import Matrix, Skeleton
from ..formats.source import Source, all_finite
from ..kernels.base import computed_in
from ..registry import lookup
from .base import Statistic

Batch = Tensor | tuple[Tensor, Tensor]  # token ids [B, T], or ids and padding mask [B, T]
Tick = Callable[[int], None]  # told how many tokens went through a block
DTYPES = ("float32", "bfloat16", "float16")  # that blocks can be asked to be run in
Made = Tensor | Callable[[], Tensor]  # a tensor, or what makes it when it is needed


class Clock:
    """Wall seconds by phase; what an inner phase takes counts there and not in its outer one."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._phase, self._since = "other", time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last time this was asked."""
        self._switch(self._phase)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _switch(self, phase: str) -> str:
        """Goes over to `phase`; returns the one before."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before


class Stream:
    """The model of `source`, streamed over batches of token ids.

        stream = Stream(source)
        for block in stream.blocks(batches):
            statistics = block.observe(block.matrices, ("hessian",))
            block.replace({name: smaller_weight})
        for logits in stream.logits():
            ...

    A block runs its batches when somebody asks for what only running tells: once when observed, once more when its
    weights were replaced, never twice for nothing; without batches no weight is loaded but those that are asked for.
    Peak memory is one block, its statistics and the hidden states, which `spill` moves to files in that folder.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        spill: Path | None = None,
        tick: Tick = lambda tokens: None,
    ):
        self.source = source
        self.dtype = dtype or computed_in(source.dtype, device)
        shapes = {name: source.info(name).shape for name in source.names()}
        self.skeleton = Skeleton(str(source.folder), shapes, self.dtype, device, source.changes)
        self.tick = tick
        self.clock = Clock()
        self._spill = tempfile.TemporaryDirectory(prefix="acc-hidden-", dir=spill) if spill else None
        self._batches: list[_Carried] = []
        self._hidden: Hidden = []
        self._pending: Block | None = None

    @property
    def parameters(self) -> int:
        return self.skeleton.parameters

    @property
    def block_bytes(self) -> list[int]:
        """What the weights of each block take in memory."""
        shapes, size = self.skeleton.shapes, self.dtype.itemsize
        return [size * sum(math.prod(shapes[name]) for name in names) for names in self.skeleton.block_names]

    @torch.no_grad()
    def blocks(self, batches: Sequence[Batch]) -> Iterator[Block]:
        """Yields every block in turn, its weights in memory; what it was left with is what the next one sees."""
        for block in self.prepare(batches):
            self._pending = block
            yield block
            if block.index < len(self.skeleton.layers) - 1:
                self._settle()

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch]) -> list[Block]:
        """Every block, for who visits them in an order of his own and says by `Block.forward` what they are given;
        `Block.inputs` are the embedded batches. None is in memory before it runs, nor let go but by `Block.unload`."""
        self._batches = [_Carried.of(batch) for batch in batches]
        self._hidden = _Spilled(Path(self._spill.name)) if self._spill else []
        interned: list[Tensor] = []
        calls: list[list[tuple[tuple, dict]]] = []
        with self.outer() if batches else contextlib.nullcontext():
            for batch in self._batches:
                hidden, of_blocks = self.skeleton.frame(batch.ids, batch.mask)
                self._hidden.append(hidden)
                calls.append(_intern(of_blocks, interned))
        return [Block(self, index, [c[index] for c in calls]) for index in range(len(self.skeleton.layers))]

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """After the last block: logits `[B, T, V]` in fp32 for each batch."""
        self._settle()
        with self.outer():
            for batch, hidden in zip(self._batches, self._hidden):
                yield self.skeleton.logits(batch.ids, hidden, batch.mask).float()

    @torch.no_grad()
    def compared(self, batch: int, others: Sequence[Tensor], tokens: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """After the last block, for so many tokens after another: which of `others`, hidden states `[B, T, H]` beside
        those of a batch, and the logits `[B, t, V]` in fp32 of the batch and of that one."""
        self._settle()
        carried, hidden = self._batches[batch], self._hidden[batch]
        length = max(1, tokens // len(carried.ids))

        def logits(states: Tensor, part: slice) -> Tensor:
            mask = None if carried.mask is None else carried.mask[:, part]
            return self.skeleton.logits(carried.ids[:, part], states[:, part], mask).float()

        with self.outer():
            for first in range(0, carried.ids.shape[1], length):
                part = slice(first, first + length)
                own = logits(hidden, part)
                for at, states in enumerate(others):
                    yield at, own, logits(states, part)

    def _settle(self) -> None:
        """Leaves the pending block: its outputs become the next one's inputs."""
        block, self._pending = self._pending, None
        if block is None:
            return
        if block.outputs is not None:
            self._hidden = block.outputs
        elif self._batches:
            for index, output in enumerate(block._outputs()):
                self._hidden[index] = output
        block.drop()

    def close(self) -> None:
        """Lets go of the last block and the hidden states."""
        if self._pending is not None:
            self._pending.drop()
        self._pending, self._hidden = None, []

    def outer(self) -> contextlib.AbstractContextManager[None]:
        """Inside, everything but the blocks is in memory."""
        return self.skeleton.outer(StoredTensors(self.source, self.skeleton.outer_names))

    def _new_hidden(self) -> Hidden:
        return _Spilled(Path(self._spill.name)) if self._spill else []


class StoredTensors(Mapping[str, Tensor]):
    """Dense tensors by disk name, read each time they are asked for: one weight twice in memory is one too many."""

    def __init__(self, source: Source, names: Sequence[str]):
        self._source, self._names = source, dict.fromkeys(names)
        self._replaced: dict[str, Made] = {}

    def __getitem__(self, name: str) -> Tensor:
        made = self._replaced.get(name)
        if made is None:
            return self._source.tensor(name)
        return made if isinstance(made, Tensor) else made()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def replace(self, tensors: Mapping[str, Made]) -> None:
        self._replaced |= tensors


class Block:
    """One decoder block. Its module is in memory from the first time it runs until its weights are replaced."""

    def __init__(self, stream: Stream, index: int, calls: list[tuple[tuple, dict]]):
        self.index, self.name = index, f"block {index}"
        self.names = stream.skeleton.block_names[index]
        self.tensors = StoredTensors(stream.source, self.names)
        self.matrices = stream.skeleton.matrices(index)
        self.outputs: Hidden | None = None
        self.running = 0  # which batch is being run
        self._stream = stream
        self._calls = calls
        self._module: nn.Module | None = None
        self._stacks: dict[str, Tensor] = {}  # 3-D tensors, which are not read again for each matrix

    def weight(self, matrix: Matrix) -> Tensor:
        """`[O, I]` of a matrix as stored, a view where possible."""
        if matrix.part is None:
            tensor = self.tensors[matrix.tensor]
        else:
            if matrix.tensor not in self._stacks:
                self._stacks[matrix.tensor] = self.tensors[matrix.tensor]
            tensor = self._stacks[matrix.tensor][matrix.part]
        return tensor.T if matrix.transposed else tensor

    def replace(self, tensors: Mapping[str, Made]) -> None:
        """Exchanges stored tensors of the block for others of the same names and dense shapes; what makes a tensor is
        called when the block is run again."""
        if tensors:
            self.unload()
            self.tensors.replace(tensors)
            self.outputs = None

    @property
    def device(self) -> torch.device:
        return self._stream.skeleton.device

    @property
    def weights(self) -> int:
        """How many weights the block has."""
        return sum(math.prod(self._stream.skeleton.shapes[name]) for name in self.names)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return self.weights * self._stream.dtype.itemsize

    @torch.no_grad()
    def run(self) -> Hidden:
        """Runs the batches; keeps and returns the outputs, one `[B, T, H]` per batch."""
        outputs = self._stream._new_hidden()
        for output in self._outputs():
            outputs.append(output)
        self.outputs = outputs
        return outputs

    def forward(self, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The output `[B, T, H]` for one batch, with the weights as they are in the parameters of `places`; for other
        hidden states than the batch's own, where they are given."""
        args, kwargs = self._calls[batch]
        result = self._load()(self._stream._hidden[batch] if hidden is None else hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    def inputs(self, batch: int) -> Tensor:
        """The hidden states `[B, T, H]` with which a batch arrives."""
        return self._stream._hidden[batch]

    def module(self, path: str) -> nn.Module:
        """A module of the block by its path in the model, with its weights."""
        self._load()
        return self._stream.skeleton.model.get_submodule(path)

    def places(self, matrices: list[Matrix]) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
        """Where each matrix is while the block runs, and what cuts it `[O, I]` out of such a tensor."""
        self._load()
        return [self._stream.skeleton.place(matrix) for matrix in matrices]

    def _load(self) -> nn.Module:
        if self._module is None:
            with self._stream.clock.phase("load"):
                self._module = self._stream.skeleton.load_block(self.index, self.tensors)
        return self._module

    def unload(self) -> None:
        """Lets its module go, which is loaded again when it is needed."""
        self._stacks = {}
        if self._module is not None:
            self._stream.skeleton.drop_block(self.index)
            self._module = None

    def _outputs(self) -> Iterator[Tensor]:
        self._load()
        for index, batch in enumerate(self._stream._batches):
            self.running, self._current = index, batch
            output = None
            with self._stream.clock.phase("forward"), contextlib.suppress(_SeenAll):
                output = self.forward(index)
            if output is not None:
                yield output
            self._stream.tick(batch.ids.numel())

    @torch.no_grad()
    def observe(self, matrices: list[Matrix], statistics: tuple[str, ...], outputs: bool = True) -> Statistics:
        """Runs the batches and collects the named statistics of every distinct input of `matrices`.

        Padding is left out. Without `outputs`, for who is about to replace weights, the block runs no further than the
        last input, and its module is let go. Raises ValueError for values that are not finite, naming the module.
        """
        skeleton = self._stream.skeleton
        collected = Statistics(statistics, skeleton.device)
        linears = list(dict.fromkeys(m.module for m in matrices if m.role == "linear"))
        experts = {(m.module, m.expert, m.role): m.shape[1] for m in matrices if m.role != "linear"}

        order: dict[str, None] = {}  # of the linears, as the first batch meets them
        first = next(iter(self._stream._batches), None)

        def see(key: Key, x: Tensor, tokens: Tensor | None = None) -> None:
            with self._stream.clock.phase("statistics"):
                collected.update(key, self._current.valid(x, tokens))

        def see_linear(leader: str, x: Tensor) -> None:
            see((leader, None, "linear"), x.reshape(-1, x.shape[-1]))
            if self._current is first:
                order[leader] = None
            elif not (outputs or experts) and leader == next(reversed(order)):
                raise _SeenAll

        def see_expert(path: str, expert: int, role: str, tokens: Tensor, x: Tensor) -> None:
            if (path, expert, role) in experts:
                see((path, expert, role), x, tokens)

        with (
            skeleton.observe_linears(self._load(), linears, see_linear) as leaders,
            skeleton.observe_experts(see_expert),
        ):
            if outputs:
                self.run()
            else:
                for _ in self._outputs():
                    pass
        if not outputs:
            self.unload()
        collected.leaders = dict(leaders)
        for key, features in experts.items():
            collected.ensure(key, features)
        return collected

    def drop(self) -> None:
        self.unload()
        self.tensors, self.outputs = StoredTensors(self._stream.source, []), None


class Outside(Block):
    """What is in no block: embeddings, final norm, head. Its matrices are observed after the last block."""

    name = "outside the blocks"

    def __init__(self, stream: Stream):
        self.matrices = stream.skeleton.outer_matrices()
        self.names = [*stream.skeleton.outer_names, *stream.skeleton.strays]
        self.tensors = StoredTensors(stream.source, self.names)
        self._stream = stream

    @torch.no_grad()
    def observe(self, matrices: list[Matrix], statistics: tuple[str, ...], outputs: bool = True) -> Statistics:
        """The statistics of the head's input, over the logits of all batches."""
        skeleton = self._stream.skeleton
        collected = Statistics(statistics, skeleton.device)
        batches = iter(self._stream._batches)

        def see(leader: str, x: Tensor) -> None:
            collected.update((leader, None, "linear"), next(batches).valid(x.reshape(-1, x.shape[-1])))

        with skeleton.observe_linears(skeleton.model, [m.module for m in matrices], see) as leaders:
            for _ in self._stream.logits():
                pass
        collected.leaders = dict(leaders)
        return collected


class _SeenAll(Exception):
    """What is left of the forward, nobody asked for."""


Key = tuple[str, int | None, str]


class Statistics:
    """What one pass over a block collected, by distinct input."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names, self.device = names, device
        self.leaders: dict[str, str] = {}
        self.of_input: dict[Key, dict[str, Statistic]] = {}

    def ensure(self, key: Key, features: int) -> dict[str, Statistic]:
        """The statistics of an input, empty ones if nothing reached it."""
        if key not in self.of_input:
            self.of_input[key] = {n: lookup("calibrate", n, "Statistic")(features, self.device) for n in self.names}
        return self.of_input[key]

    def update(self, key: Key, x: Tensor) -> None:
        if not all_finite(x):
            raise ValueError(f"the input of {key[0]} is not finite during calibration; try another --dtype or --data")
        for statistic in self.ensure(key, x.shape[1]).values():
            statistic.update(x)

    def key(self, matrix: Matrix) -> Key:
        if matrix.role == "linear":
            return (self.leaders.get(matrix.module, matrix.module), None, "linear")
        return (matrix.module, matrix.expert, matrix.role)

    def of(self, matrix: Matrix) -> dict[str, Statistic]:
        """The statistics of the matrix' input, by name; shared by all matrices with that input."""
        return self.ensure(self.key(matrix), matrix.shape[1])

    def siblings(self, matrix: Matrix) -> list[dict[str, Statistic]]:
        """The same statistics for every expert of the matrix' layer, in order."""
        found = [(k[1], s) for k, s in self.of_input.items() if k[0] == matrix.module and k[2] == matrix.role]
        return [s for _, s in sorted(found, key=lambda pair: pair[0] or 0)]


@dataclass(frozen=True)
class _Carried:
    """A batch on its way through the blocks."""

    ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T], zero where there is padding

    @classmethod
    def of(cls, batch: Batch) -> _Carried:
        return cls(*batch) if isinstance(batch, tuple) else cls(batch, None)

    def valid(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The rows of `x [N, I]` that are no padding; `tokens [N]` are their places in the flattened batch."""
        if self.mask is None:
            return x
        mask = self.mask.bool().flatten().to(x.device)
        return x[mask if tokens is None else mask[tokens]]


class _Spilled:
    """A list of tensors that lie in files."""

    def __init__(self, folder: Path):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.count = 0

    def append(self, tensor: Tensor) -> None:
        self.count += 1
        self[self.count - 1] = tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        path = self.folder / f"{index:06d}.safetensors"
        work = path.with_suffix(".tmp")  # the old tensor may still be mapped
        save_file({"hidden": tensor.contiguous()}, work)
        work.replace(path)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return load_file(self.folder / f"{index:06d}.safetensors")["hidden"]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self.count))

    def __del__(self) -> None:
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)


def _intern(value: Any, known: list[Tensor]) -> Any:
    """The same structure with equal tensors shared: masks and position embeddings repeat in every batch and block."""
    if isinstance(value, Tensor):
        for tensor in known:
            if tensor is value or (
                tensor.shape == value.shape and tensor.dtype == value.dtype and torch.equal(tensor, value)
            ):
                return tensor
        known.append(value)
        return value
    if isinstance(value, dict):
        return {k: _intern(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_intern(v, known) for v in value)
    return value


Hidden = list[Tensor] | _Spilled  # of every batch

"""Attention between full and streaming: a gate per KV head, what the mixture costs, and the gradient of that cost.

The gradient goes through one block at a time: a first run stores what each block is given; then each block, from the
last to the first, runs again with gradients between its input, its gates and its output alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .base import Subject
from .prompts import Prompt
from .stream import Block, Stream


def streaming(query: Tensor, key: Tensor, value: Tensor, sink: Tensor, recent: Tensor, scaling: float) -> Tensor:
    """Attention to the first `sink` tokens and the last `recent` ones, the row's own among them; causal.

    `query [B, H, T, D]`, `key, value [B, Hkv, T, D]`, `sink, recent` int `[Hkv]` -> `[B, H, T, Dv]`. In tiles of rows,
    each against the sinks and its own band alone.
    """
    tokens, kv_heads = query.shape[2], key.shape[1]
    near, far = int(sink.max()), int(recent.max())
    sink, recent = (x.to(query.device)[:, None, None] for x in (sink, recent))
    key, value = (x.repeat_interleave(query.shape[1] // kv_heads, 1) for x in (key, value))
    outputs = []
    for start in range(0, tokens, max(far, 128)):
        stop = min(start + max(far, 128), tokens)
        first = max(start - far + 1, 0)
        place = torch.arange(stop, device=query.device)
        if first > near:
            place = torch.cat([place[:near], place[first:]])
        distance = torch.arange(start, stop, device=query.device)[:, None] - place
        seen = (distance >= 0) & ((place < sink) | (distance < recent))  # [Hkv, rows, keys]
        seen = seen.repeat_interleave(query.shape[1] // kv_heads, 0)
        part = scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, place], value[:, :, place], attn_mask=seen[None], scale=scaling
        )
        outputs.append(part)
    return torch.cat(outputs, 2)


def answer_rows(prompt: Prompt) -> Tensor:
    """The tokens `[R]` of a passkey prompt that the model predicts an answer's next token from."""
    return torch.cat([torch.arange(first - 1, end - 1) for first, end in prompt.asked])


@dataclass(frozen=True)
class Told:
    """What the model says where it answers."""

    hidden: Tensor  # [R, hidden] fp32 or better, after the final norm
    right: Tensor  # bool [R]: the answer's next token is what the model predicts, with the true past given


class Gated:
    """A model in which KV head `h` of layer `l` gives `gate[l, h] · full + (1 - gate[l, h]) · streaming` attention.

    Both are of the queries, keys and values that the mixed stream itself has. Layers that are left alone stay as they
    are. `gates [n]` are those of the open layers' KV heads, one layer after the other.
    """

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], sink: Tensor, recent: Tensor, keep: bool | None):
        """`sink, recent` int `[n]`: what each head streams over. `keep` says whether all blocks stay in memory; None:
        when half of what is free holds them."""
        self.prompts, self.layers = prompts, {layer.index: layer for layer in subject.open}
        self._stream = Stream(subject.source, dtype=subject.dtype, device=subject.device)
        self._skeleton = self._stream.skeleton
        sizes = [layer.kv_heads for layer in subject.open]
        self._sink, self._recent = (dict(zip(self.layers, x.split(sizes))) for x in (sink, recent))
        self._sizes = sizes
        if keep is None:
            keep = 2 * sum(self._stream.block_bytes) < free_memory(subject.device)
        self.kept = keep
        self._gates: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """The model is there to be run inside."""
        self._blocks = self._stream.prepare([prompt.ids[None] for prompt in self.prompts])
        try:
            with self._stream.outer(), self._skeleton.replace_attention(self._mix):
                yield
        finally:
            for block in self._blocks:
                block.drop()

    @torch.no_grad()
    def tell(self, number: int, gates: Tensor | None = None) -> Told:
        """What the model says to a prompt; without gates, with full attention."""
        self._put(gates)
        hidden = self._blocks[0].inputs(number)
        for block in self._blocks:
            hidden = self._run(block, number, hidden)
        ids, rows = self._answers(number)
        predicted = self._skeleton.logits(ids, hidden[:, rows])[0].argmax(-1)
        wanted = self.prompts[number].ids[rows + 1].to(predicted.device)
        return Told(self._final(number, hidden), predicted == wanted)

    def gradient(self, number: int, gates: Tensor, teacher: Told) -> tuple[float, Tensor]:
        """The loss of a prompt, and its gradient `[n]` by the gates."""
        self._put(gates)
        states = [self._blocks[0].inputs(number)]
        with torch.no_grad():
            for block in self._blocks:
                states.append(self._run(block, number, states[-1]))
        last = states.pop()
        with torch.enable_grad():
            last.requires_grad_()
            loss = distance(self._final(number, last), teacher.hidden)
        (flow,) = torch.autograd.grad(loss, last)
        found: dict[int, Tensor] = {}
        for block in reversed(self._blocks):
            if block.index < min(self.layers):
                break  # no gate lies before
            flow = self._back(block, number, states.pop(), flow, found)
        return float(loss.detach()), torch.cat([found[index] for index in self.layers]).cpu()

    def _back(self, block: Block, number: int, hidden: Tensor, flow: Tensor, found: dict[int, Tensor]) -> Tensor:
        """From the gradient by a block's output to that by its input; that by its gates goes to `found`."""
        inputs = [hidden.detach().requires_grad_()]
        if block.index in self.layers:
            self._gates[block.index] = self._gates[block.index].detach().requires_grad_()
            inputs.append(self._gates[block.index])
        with torch.enable_grad():
            output = self._run(block, number, inputs[0])
        grads = torch.autograd.grad(output, inputs, flow)
        if block.index in self.layers:
            found[block.index] = grads[1]
        return grads[0]

    def _put(self, gates: Tensor | None) -> None:
        """The gates of the run that follows."""
        self._gates = {}
        if gates is not None:
            split = gates.detach().to(self._skeleton.device).split(self._sizes)
            self._gates = dict(zip(self.layers, split))

    def _run(self, block: Block, number: int, hidden: Tensor) -> Tensor:
        output = block.forward(number, hidden)
        if not self.kept:
            block.unload()
        return output

    def _answers(self, number: int) -> tuple[Tensor, Tensor]:
        rows = answer_rows(self.prompts[number])
        return self.prompts[number].ids[rows][None], rows

    def _final(self, number: int, hidden: Tensor) -> Tensor:
        ids, rows = self._answers(number)
        final = self._skeleton.final(ids, hidden[:, rows])[0]
        return final.to(torch.promote_types(final.dtype, torch.float32))

    def _mix(self, dense: Callable, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
        """The attention of one layer, in place of `dense`."""
        gates = self._gates.get(module.layer_idx)
        if gates is None:
            return dense(module, query, key, value, mask, **kwargs)
        sink, recent = self._sink[module.layer_idx], self._recent[module.layer_idx]
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        group = query.shape[1] // key.shape[1]

        def full(heads: Tensor) -> Tensor:
            of = (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
            return dense(module, query[:, of], key[:, heads], value[:, heads], mask, **kwargs)[0]

        def cut(heads: Tensor) -> Tensor:
            of = (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()
            out = streaming(
                query[:, of], key[:, heads], value[:, heads], sink[heads.cpu()], recent[heads.cpu()], scaling
            )
            return out.transpose(1, 2)

        every = torch.arange(len(gates), device=gates.device)
        if gates.requires_grad or ((gates > 0) & (gates < 1)).any():
            gate = gates.repeat_interleave(group)[:, None].to(query.dtype)
            return gate * full(every) + (1 - gate) * cut(every), None
        parts = [make(heads) for make, heads in ((full, every[gates > 0]), (cut, every[gates == 0])) if len(heads)]
        order = torch.cat([every[gates > 0], every[gates == 0]]).argsort()
        mixed = torch.cat(parts, 2).unflatten(2, (-1, group))[:, :, order]
        return mixed.flatten(2, 3), None


def distance(hidden: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of hidden states `[R, hidden]`, relative to the teacher's squares."""
    return (hidden - teacher).square().sum() / teacher.square().sum()


def projected(place: Tensor, sparsity: float, temperature: float) -> Tensor:
    """Gates `[n]` in (0, 1) of mean `1 - sparsity`, from unbounded `place [n]`: a sigmoid whose middle is moved there.

    So the share of streaming heads is a constraint that holds at every step, not a penalty to be tuned."""
    scaled = place.double() / temperature
    low, high = scaled.min() - 40, scaled.max() + 40
    for _ in range(80):
        middle = (low + high) / 2
        if (scaled - middle).sigmoid().mean() > 1 - sparsity:
            low = middle
        else:
            high = middle
    return (scaled - (low + high) / 2).sigmoid().to(place.dtype)


def by_place(gates: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """The gradient by `place` of `projected`, from that by the gates: the part that leaves their mean as it is."""
    slope = gates * (1 - gates) / temperature
    return slope * (gradient - (slope * gradient).sum() / slope.sum())


def hard(place: Tensor, sparsity: float) -> Tensor:
    """Gates `[n]` of zeros and ones: `round(sparsity * n)` zeros, at the lowest places, the earlier of equals."""
    gates = torch.ones_like(place)
    gates[place.sort(stable=True).indices[: round(sparsity * len(place))]] = 0
    return gates


@dataclass(frozen=True)
class Schedule:
    """How gates are optimised."""

    sparsities: Sequence[float]  # each step aims at the next of these, in turn
    steps: int
    rate: float
    hard: float  # share of the steps, at the end, that run with gates of zeros and ones
    warm: float = 1.0  # the first temperature of the sigmoid
    cold: float = 0.25  # and the last


def in_turn(steps: int, prompts: int) -> list[int]:
    """The prompt of each step of `optimise`."""
    return [step % prompts for step in range(steps)]


def optimise(
    model: Gated, place: Tensor, teachers: Sequence[Told], schedule: Schedule, tick: Callable[[int], None]
) -> tuple[Tensor, list[float]]:
    """Adam on the places `[n]` of the gates, over the prompts in turn; returns the places and the loss of each step,
    of which `tick` is told the prompt.

    The temperature falls until the last steps, which run with zeros and ones and take the sigmoid's gradient (a
    straight-through estimate).
    """
    place = place.clone().requires_grad_()
    adam = torch.optim.Adam([place], lr=schedule.rate)
    soft = max(round(schedule.steps * (1 - schedule.hard)), 1)
    losses = []
    for step, number in enumerate(in_turn(schedule.steps, len(teachers))):
        temperature = schedule.warm * (schedule.cold / schedule.warm) ** min(step / soft, 1)
        # another prompt at each step, and each of them at every sparsity
        sparsity = schedule.sparsities[(step + step // len(teachers)) % len(schedule.sparsities)]
        gates = projected(place.detach(), sparsity, temperature)
        used = gates if step < soft else hard(place.detach(), sparsity)
        loss, gradient = model.gradient(number, used, teachers[number])
        place.grad = by_place(gates, gradient.to(gates), temperature)
        for group in adam.param_groups:
            group["lr"] = schedule.rate * min(1.0, 5 * (schedule.steps - step) / schedule.steps)
        adam.step()
        losses.append(loss)
        tick(number)
    return place.detach(), losses


def free_memory(device: str) -> int:
    """Bytes that are free on a device; 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    facts = Path("/proc/meminfo")
    if facts.is_file():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

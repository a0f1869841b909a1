"""One pass of a model over prompts, from which everything that was asked for about its attention is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.calibration import Journal
from ..formats.model import AttentionLayer
from ..formats.source import Source, all_finite
from .base import Attended, Learned, Pass, Subject
from .prompts import Prompt
from .stream import Block, Clock, Stream

Progress = Callable[[float, str], None]  # the share of the present step that is done; each step starts at 0 again
OUTPUTS = ("o_proj", "out_proj", "dense", "wo")  # what families call the projection of the heads' outputs


def name_of(one: Pass) -> str:
    """What a pass is called: the name of its file."""
    return type(one).__module__.rpartition(".")[2]


def open_layers(layers: Sequence[AttentionLayer], family: str) -> list[AttentionLayer]:
    """The layers that can be calibrated. Raises ValueError, with the reason, when there is none."""
    found = [layer for layer in layers if layer.refused is None]
    if not found:
        raise ValueError(f"{family} models cannot be calibrated: every layer has {layers[0].refused}")
    return found


@torch.no_grad()
def learn(
    source: Source,
    passes: Sequence[Pass],
    prompts: Sequence[Prompt],
    journal: Journal,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    spill: Path | None = None,
    progress: Progress = lambda share, what: None,
    clock: Clock | None = None,
) -> dict[str, Learned]:
    """Streams the model over the prompts, each once and by itself, and lets every pass look at every open layer.

    Layers that `journal` has already are run but not looked at again. `clock` learns how long each pass looked and
    concluded, under its name, and how long the model ran, as `stream`. Raises ValueError for a model of which no layer
    can be calibrated, and for values that are not finite, naming the layer.
    """
    clock = clock or Clock()
    steps = _Steps(progress, sum(len(prompt) for prompt in prompts), len(passes))
    stream = Stream(source, dtype=dtype, device=device, spill=spill, tick=steps.tick)
    layers = stream.skeleton.attention_layers()
    open_layers(layers, stream.skeleton.family)
    steps.layers([layer.refused is not None or journal.done(layer.index) for layer in layers])
    with clock.phase("stream"):
        for block in stream.blocks([prompt.ids[None] for prompt in prompts]):
            layer = layers[block.index]
            if layer.refused is not None:
                continue
            if not journal.done(layer.index):
                journal.write(layer.index, _look(stream, block, layer, passes, prompts, clock))
            if all(journal.done(other.index) for other in layers if other.refused is None):
                break
        stream.close()
    found = {layer.index: journal.read(layer.index) for layer in layers if layer.refused is None}
    learned = {}
    for one in passes:
        subject = Subject(source, layers, list(prompts), dtype, device, steps.concludes(name_of(one)))
        with clock.phase(name_of(one)):
            learned[name_of(one)] = one.conclude(subject, {i: of[name_of(one)] for i, of in found.items()})
    return learned


class _Steps:
    """What `progress` is told: layers that are known already pass faster than others, and how long a pass concludes
    only it can say, so each of these is a step with a share of its own."""

    def __init__(self, progress: Progress, tokens: int, passes: int):
        self.progress, self.tokens, self.passes = progress, tokens, passes
        self.done = self.known = self.count = self.step = 0

    def layers(self, known: Sequence[bool]) -> None:
        """Called before the first `tick`; `known` says of each layer whether it is only run."""
        self.count = len(known)
        self.known = 0 if all(known) else list(known).index(False)
        self.steps = bool(self.known) + 1 + self.passes

    def tick(self, tokens: int) -> None:
        self.done += tokens
        layer, known = self.done / self.tokens, self.done < self.known * self.tokens
        self.step = 1 if known or not self.known else 2
        share = layer / self.known if known else (layer - self.known) / (self.count - self.known)
        self._say(share, f"layer {min(int(layer) + 1, self.count)} of {self.count}")

    def concludes(self, name: str) -> Callable[[float], None]:
        """The next step, of the pass of this name."""
        self.step += 1
        self._say(0.0, name)
        return lambda share: self._say(share, name)

    def _say(self, share: float, what: str) -> None:
        self.progress(share, f"{self.step}/{self.steps} {what}")


def _look(
    stream: Stream,
    block: Block,
    layer: AttentionLayer,
    passes: Sequence[Pass],
    prompts: Sequence[Prompt],
    clock: Clock,
) -> dict[str, dict[str, Tensor]]:
    """Runs the block, and has the learner of every pass see what its attention was given."""
    learners = {name_of(one): (one, one.learner(layer)) for one in passes}

    def see(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> None:
        prompt = prompts[block.running]
        if not all(all_finite(x) for x in (query, key, value)):
            raise ValueError(
                f"{layer.path}: its attention is not finite during calibration; try another --dtype or --data"
            )
        attended = Attended(
            layer,
            prompt,
            query[0],
            key[0],
            value[0],
            kwargs.get("scaling") or query.shape[-1] ** -0.5,
            projection(module, query.shape[1] * value.shape[-1]),
            block.inputs(block.running)[0],
        )
        for name, (one, learner) in learners.items():
            if prompt.kind in one.kinds:
                with clock.phase(name):
                    learner.see(attended)

    with stream.skeleton.observe_attention(see):
        block.run()
    return {name: learner.result() for name, (_, learner) in learners.items()}


def projection(module: nn.Module, features: int) -> Tensor | None:
    """The weight `[hidden, H * Dv]` by which the heads' outputs are projected."""
    for name in OUTPUTS:
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear) and linear.in_features == features:
            return linear.weight
    return None


def of_layers(found: Mapping[int, Tensor], layers: int, neutral: float) -> Tensor:
    """One tensor `[L, ...]` from those of the layers that were calibrated, `neutral` in the rows of all others."""
    like = next(iter(found.values()))
    whole = torch.full((layers, *like.shape), neutral, dtype=like.dtype)
    for index, tensor in found.items():
        whole[index] = tensor.cpu()
    return whole

"""acc generate: run a model, packed or dense."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .base import Adaptive, Device, Dtype, Json, Model, Plan, Planes, Seed, Sparsity, Use


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="the text to continue", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="how much to write")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="wrap the prompt in the model's chat template")] = False,
    plan: Plan = None,
    sparsity: Sparsity = None,
    use: Use = None,
    adaptive: Adaptive = False,
    planes: Planes = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text."""
    import torch

    from ..formats.source import open_source
    from .base import check_device, check_dtype, loaded_model, plan_of, tokenizer_of
    from .ui import Screen, size

    screen = Screen(as_json)
    check_device(device)
    source = open_source(model)
    tokenizer = tokenizer_of(source)
    kind = check_dtype(dtype)
    wanted = plan_of(screen, plan, sparsity, use, adaptive)
    loaded = loaded_model(source, kind, planes, device)
    cache: Any = None
    if wanted is not None:
        from ..formats.attention import PlanCache, attach

        cache = PlanCache(attach(loaded, wanted))
    if chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{model}: its tokenizer has no chat template; leave --chat out")
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    ids = ids["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty")
    torch.manual_seed(seed)
    started = time.monotonic()
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = loaded.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            past_key_values=cache,
            **sampling,
        )
    new = whole[0, ids.shape[1] :]
    seconds = time.monotonic() - started
    screen.line(f"\n{len(new)} tokens in {seconds:.1f} s")
    written = tokenizer.decode(new, skip_special_tokens=True)
    result: dict[str, Any] = {"prompt": prompt, "text": written, "tokens": len(new), "seconds": seconds}
    if cache is not None:
        held, dense = cache.nbytes, cache.dense_nbytes
        screen.line(f"{size(held)} of keys and values are kept; without a plan it would be {size(dense)}")
        result |= {"cache_bytes": held, "dense_cache_bytes": dense}
    screen.result(result)

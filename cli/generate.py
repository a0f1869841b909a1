"""acc generate: run a model, packed or dense."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .base import Device, Dtype, Json, Model, Planes, Seed


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="the text to continue", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="how much to write")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="wrap the prompt in the model's chat template")] = False,
    planes: Planes = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..formats.hf import keep_planes
    from ..formats.source import open_source
    from .base import check_device, check_dtype, tokenizer_of
    from .ui import Screen

    screen = Screen(as_json)
    check_device(device)
    source = open_source(model)
    tokenizer = tokenizer_of(source)
    kind = check_dtype(dtype) or source.dtype
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=kind)
    except ImportError as error:  # what another engine packed, its own package runs
        raise ValueError(f"{model}: {error}; or see acc export --to dense") from None
    if planes is not None:
        keep_planes(loaded, planes)
    loaded.to(device).eval()
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
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, streamer=streamer, **sampling
        )
    new = whole[0, ids.shape[1] :]
    seconds = time.monotonic() - started
    screen.line(f"\n{len(new)} tokens in {seconds:.1f} s")
    written = tokenizer.decode(new, skip_special_tokens=True)
    screen.result({"prompt": prompt, "text": written, "tokens": len(new), "seconds": seconds})

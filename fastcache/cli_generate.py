"""Continue prompts with a model, with or without compression of the KV cache; prints the text of each."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from fastcache.cli_compression import add_compression, compression_of
from fastcache.cli_types import count, number, positive_int
from fastcache.config import (
    DEVICES,
    DTYPES,
    KV_DTYPES,
    LOAD_FORMATS,
    SamplingParams,
    require,
)
from fastcache.errors import UnsupportedCombination
from fastcache.models.config import load_model_config

PLACEHOLDER = "<image>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue")
    parser.add_argument("--model", required=True, metavar="PATH", help="a local Hugging Face folder")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture for the next <image> in the prompts; with --chat, for the prompt; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--max-tokens", type=positive_int, default=64, help="stop after so many tokens")
    parser.add_argument("--temperature", type=number, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", type=count, default=0, help="0: off")
    parser.add_argument("--top-p", type=number, default=1.0, help="1: off")
    parser.add_argument("--seed", type=count, default=0, help="of the sampling")
    add_compression(parser)
    parser.add_argument("--load-format", default="auto", help=f"{' or '.join(LOAD_FORMATS)}")
    parser.add_argument("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    parser.add_argument(
        "--kv-dtype", default="auto", help=f"what the KV pool stores: {' or '.join(KV_DTYPES)}"
    )
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))
    parser.add_argument("--max-model-len", type=positive_int, help="tokens per sequence, prompt and output")


def run(args: argparse.Namespace) -> int:
    sampling = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    options = {
        "dtype": args.dtype,
        "kv_dtype": args.kv_dtype,
        "device": args.device,
        "load_format": args.load_format,
        "max_model_len": args.max_model_len,
        "max_num_seqs": len(args.prompts),
        "compression": compression_of(args),
    }
    prompts = _prompts(args)
    from fastcache import LLM  # torch loads here, after the arguments were found to be right

    llm = LLM(args.model, **options)
    try:
        if args.chat:
            prompts = [_chat(llm.tokenizer, text, args.image) for text in args.prompts]
        for output in llm.generate(prompts, sampling):
            sys.stdout.write(f"{output.text.strip() if args.chat else output.text}\n")
    finally:
        llm.close()
    return 0


def _prompts(args: argparse.Namespace) -> list[Any]:
    """What `LLM.generate` is given. Pictures go to the prompts in the order of their placeholders."""
    if not args.image:
        return args.prompts
    if load_model_config(args.model, args.load_format).vision is None:
        raise UnsupportedCombination(f"--image is given, and {args.model} reads text alone; leave it out.")
    if args.chat:
        require(len(args.prompts) == 1, "--chat with --image takes one prompt; give one at a time.")
        return args.prompts
    wanted = [text.count(PLACEHOLDER) for text in args.prompts]
    require(
        sum(wanted) == len(args.image),
        f"the prompts have {sum(wanted)} {PLACEHOLDER} and {len(args.image)} --image were given; each {PLACEHOLDER} "
        'needs one, as in "USER: <image>\\nWhat is this? ASSISTANT:".',
    )
    images = iter(args.image)
    return [
        {"prompt": text, "images": list(itertools.islice(images, count))}
        for text, count in zip(args.prompts, wanted, strict=True)
    ]


def _chat(tokenizer: Any, text: str, images: list[str]) -> Any:
    require(tokenizer is not None, "--chat needs a tokenizer, and the model's folder has none.")
    if not images:
        message = [{"role": "user", "content": text}]
        return tokenizer.encode(tokenizer.apply_chat_template(message), add_special_tokens=False)
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content}])
    # LLaVA's templates leave the first token to the tokenizer, others write it themselves.
    begun = chat.startswith(tokenizer.special_tokens.get("bos_token", "\0"))
    return {"prompt": tokenizer.encode(chat, add_special_tokens=not begun), "images": images}

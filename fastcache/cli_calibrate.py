"""Find out which KV heads of a model need many entries, and write the budgets that `head_budgets` takes.

The model repeats a few plain texts over its own cache (KVzip); what share of the entries each (layer, KV head) keeps
when all heads share one budget is its budget from then on. Known before a request arrives, it lets a cheap method keep
what a replay would. Deterministic: the same model, texts and seed give the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from pathlib import Path
from typing import Any

from fastcache.bench.prompts import prose
from fastcache.bench.provenance import git_commit
from fastcache.bench.row import check_writable, write_json
from fastcache.cli_types import count, positive_int
from fastcache.compression.registry import BUDGET_FORMAT
from fastcache.config import DEVICES, DTYPES, require
from fastcache.device.info import versions
from fastcache.errors import ConfigError, DatasetError

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
ROOM = 512  # positions for the instruction around a repetition; far more than any chat template needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="a local Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the budgets go")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="a UTF-8 text of which the beginning is used; repeatable (default: the prose that ships with Python)",
    )
    parser.add_argument("--texts", type=positive_int, default=4, help="how many windows of that prose")
    parser.add_argument("--length", type=positive_int, default=1024, help="tokens of each text")
    parser.add_argument("--seed", type=count, default=0, help="of the choice of windows")
    parser.add_argument("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))


def run(args: argparse.Namespace) -> int:
    check_writable(args.output)
    texts = [_read(path) for path in args.text or ()]
    from fastcache import LLM  # torch loads here, after the arguments were found to be right

    llm = LLM(
        args.model, dtype=args.dtype, device=args.device, num_pages=2, max_model_len=2 * args.length + ROOM
    )
    try:
        require(llm.tokenizer is not None, "calibration reads text, and the model's folder has no tokenizer.")
        contexts, source = _contexts(args, texts, llm.tokenizer)
        shares = llm.head_shares(contexts, RATIOS)
        facts = llm.describe()
    finally:
        llm.close()
    write_json(args.output, _content(args, shares, source, facts))
    spread = f"{shares.min(axis=(1, 2))[8]:.0%} to {shares.max(axis=(1, 2))[8]:.0%}"
    sys.stderr.write(f"{args.output}: at ratio {RATIOS[8]:g} a head keeps {spread}\n")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"--text {str(path)!r} cannot be read ({error}); give a UTF-8 text file."
        ) from None


def _contexts(
    args: argparse.Namespace, texts: list[str], tokenizer: Any
) -> tuple[list[list[int]], dict[str, Any]]:
    """The token ids of each text, and where they come from."""
    if texts:
        contexts = [tokenizer.encode(text, add_special_tokens=False)[: args.length] for text in texts]
        short = min(map(len, contexts))
        if short < args.length:
            raise ConfigError(f"a --text has {short} tokens; lower --length (now {args.length}).")
        return contexts, {"files": [path.name for path in args.text], "sha256": [_digest(t) for t in texts]}
    text = prose()
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = range(0, len(ids) - args.length + 1, args.length)
    if len(places) < args.texts:
        raise ConfigError(
            f"the prose has {len(places)} windows of {args.length} tokens; lower --texts or --length."
        )
    starts = random.Random(f"calibrate/{args.seed}").sample(places, args.texts)
    source = {"prose": "pydoc_data.topics", "sha256": [_digest(text)], "starts": starts, "seed": args.seed}
    return [ids[start : start + args.length] for start in starts], source


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _content(
    args: argparse.Namespace, shares: Any, source: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": BUDGET_FORMAT,
        "method": "mean share kept by KVzip's selection over all layers and heads (arXiv:2505.23416)",
        "model": Path(args.model).name,
        "weights_sha256": facts["weights"]["sha256"],
        "dtype": facts["dtype"],
        "device": facts["device"],
        "texts": {**source, "tokens": args.length},
        "versions": versions(),
        "git_commit": git_commit(),
        "budgets": [
            {"compression_ratio": ratio, "shares": [[round(x, 6) for x in row] for row in table]}
            for ratio, table in zip(RATIOS, shares.tolist(), strict=True)
        ],
    }

"""Changing the SM split of a running engine: same tokens, flat memory.

    python bench/split_changes.py --output results/split-changes.json

Decodes the same requests twice with a partition, once on one split and once with the next of three splits before
every step, and records the free device memory at each change. Dummy weights in the shape of `--model`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastcache import LLM, SamplingParams
from fastcache.bench.provenance import git_commit, source_digest
from fastcache.device.info import device_info, versions

SPLITS = ((0.25, 0.75), (0.125, 0.875), (0.5, 0.5))
BATCH, CONTEXT = 8, 512


def decode(
    llm: LLM, prompts: list[list[int]], output: int, change: bool
) -> tuple[list[list[int]], list[int]]:
    """(tokens of each request, free bytes after each change of split)."""
    ids = [llm.add_request(prompt, SamplingParams(max_tokens=output, ignore_eos=True)) for prompt in prompts]
    done, free, splits = {}, [], itertools.cycle(SPLITS)
    while llm.has_unfinished():
        if change:
            llm.use_split(*next(splits))
            free.append(torch.cuda.mem_get_info()[0])
        done.update((output.request_id, output.token_ids) for output in llm.step())
    return [done[each] for each in ids], free


def engine(model: str, changes: int) -> LLM:
    compress, main_ratio = SPLITS[0]
    return LLM(
        model,
        load_format="dummy",
        device="cuda",
        max_model_len=CONTEXT + changes,
        max_num_seqs=BATCH,
        compression={"method": "snapkv", "compression_factor": 2},
        partition={
            "enabled": True,
            "compress_ratio": compress,
            "main_ratio": main_ratio,
            "main_stream": True,
            "require": True,
        },
    )


def measure(model: str, changes: int) -> dict[str, Any]:
    llm = engine(model, changes)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, llm.model_config.vocab_size, (BATCH, CONTEXT), generator=generator).tolist()
    want, _ = decode(llm, prompts, changes, change=False)
    got, free = decode(llm, prompts, changes, change=True)
    settled = free[len(free) // 4 :]  # by then every split has its contexts, graphs and workspaces
    return {
        "model": model,
        "splits": SPLITS,
        "changes": len(free),
        "requests": len(want),
        "requests_with_equal_tokens": sum(a == b for a, b in zip(got, want, strict=True)),
        "free_bytes": free,
        "free_bytes_lost_after_a_quarter": settled[0] - min(settled),
        "partition": llm.describe()["partition"],
        "device": device_info("cuda"),
        "versions": versions(),
        "git_commit": git_commit(),
        "source_digest": source_digest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    record = measure(options.model, options.changes)
    options.output.write_text(json.dumps(record) + "\n")
    lost = record["free_bytes_lost_after_a_quarter"]
    sys.stdout.write(
        f"{record['changes']} changes; {record['requests_with_equal_tokens']} of {record['requests']} requests "
        f"with equal tokens; {lost} bytes lost\n"
    )
    return 0 if lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

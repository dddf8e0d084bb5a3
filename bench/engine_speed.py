"""The engine's speed without compression, against the device's own limits: one process, many workloads.

    python bench/engine_speed.py --model qwen3-8b --output rows.jsonl 32x3968+128 64x896+128

Prints the measured ceilings first (device copy, bfloat16 matrix product), then one line per workload; the rows
carry the repeats. Dummy weights, distinct random prompts, greedy, end-of-sequence ignored.
total tok/s = (prompt + generated) / wall, as vLLM's users count.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from pathlib import Path

PROCESS_START = time.perf_counter()

import torch  # noqa: E402  (the clock starts before the imports: start-up time counts them)

from fastcache import LLM, SamplingParams  # noqa: E402
from fastcache.bench.metrics import Round, middle_round  # noqa: E402
from fastcache.bench.provenance import git_commit, source_digest  # noqa: E402
from fastcache.bench.work import utilisation  # noqa: E402
from fastcache.device import ceilings  # noqa: E402
from fastcache.device.info import device_info, versions  # noqa: E402

log = logging.getLogger("engine_speed")
LINE = (
    "{workload:14} {total_tok_s:8.0f} tok/s  prefill {prefill_tok_s:6.0f} tok/s (MFU {prefill_mfu:.2f})  "
    "decode {decode_ms_step:5.2f} ms/step (MBU {decode_mbu:.2f})  running {peak_running}  preempted {preemptions}"
)


def prompts_of(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count, length), generator=generator).tolist()


def measure(llm: LLM, batch: int, context: int, output: int, repeats: int, limits: ceilings.Ceilings) -> dict:
    """One workload: a short warm-up at the same batch size, then `repeats` timed runs on fresh prompts."""
    vocab = llm.model_config.vocab_size
    llm.generate(prompts_of(batch, context, vocab, 10_000), SamplingParams(max_tokens=3, ignore_eos=True))
    runs = [timed_run(llm, prompts_of(batch, context, vocab, repeat), output) for repeat in range(repeats)]
    middle = middle_round(runs)
    requests = [output.metrics for output in middle.outputs]
    return {
        "workload": f"{batch}x{context}+{output}",
        **facts_of(middle),
        **utilisation(llm.model_config, llm.describe(), requests, middle.stats, limits),
        "repeats": [run.throughput for run in runs],
        "weights": "dummy",
    }


def timed_run(llm: LLM, prompts: list[list[int]], output: int) -> Round:
    llm.reset_stats()
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=output, ignore_eos=True))
    wall = time.perf_counter() - start
    assert all(len(o.token_ids) == output for o in outputs)
    return Round(wall, outputs, llm.stats())


def facts_of(run: Round) -> dict:
    stats, first = run.stats, run.outputs[0].metrics
    return {
        "wall_s": run.elapsed_s,
        "total_tok_s": run.throughput,
        "prefill_tok_s": stats.prefill_tokens / stats.prefill_time_s,
        "decode_ms_step": 1e3 * stats.decode_time_s / max(stats.decode_steps, 1),
        "decode_steps": stats.decode_steps,
        "mean_running": stats.decode_tokens / max(stats.decode_steps, 1),
        "peak_running": stats.peak_running,
        "preemptions": stats.preemptions,
        "kept": first.kv_len_after or first.prompt_tokens,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="+", help="BATCHxCONTEXT+OUTPUT")
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--gpu-mem-util", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--compression", type=json.loads, help="a JSON object")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    llm = LLM(
        args.model,
        load_format="dummy",
        device="cuda",
        max_model_len=4096,
        gpu_memory_utilization=args.gpu_mem_util,
        max_num_batched_tokens=args.max_num_batched_tokens,
        compression=args.compression,
    )
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, ignore_eos=True))
    start_up = time.perf_counter() - PROCESS_START
    log.info("start to first token %.1f s; %s", start_up, llm.describe())
    limits = ceilings.measure("cuda")
    log.info("ceilings: %s", limits)
    facts = {
        "model": args.model,
        "compression": args.compression,
        "start_to_first_token_s": start_up,
        "copy_bytes_s": limits.copy_bytes_s,
        "gemm_flop_s": limits.gemm_flop_s,
        "engine": llm.describe(),
        "device": device_info("cuda"),
        "versions": versions(),
        "git_commit": git_commit(),
        "source_digest": source_digest(),
    }
    with args.output.open("a", encoding="utf-8") as rows:
        for workload in args.workloads:
            sizes = [int(n) for n in re.fullmatch(r"(\d+)x(\d+)\+(\d+)", workload).groups()]
            row = measure(llm, *sizes, args.repeats, limits)
            log.info(LINE.format(**row))
            rows.write(json.dumps({**row, **facts}) + "\n")
            rows.flush()


if __name__ == "__main__":
    main()

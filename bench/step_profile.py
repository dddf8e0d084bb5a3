"""Where the time of a decode step goes on a GPU, kernel by kernel: `python bench/step_profile.py --output FILE.json`.

A batch of equal contexts decodes; a few steps are timed, then a few more are watched by torch.profiler. The file has,
per step, how often each kernel ran and for how long, and how long the device did nothing.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastcache import LLM, SamplingParams
from fastcache.device.ceilings import measure
from fastcache.device.info import device_info, versions

WARM, TIMED, WATCHED = 30, 30, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-8b", help="a preset, with dummy weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=2500)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    llm = LLM(
        args.model,
        load_format="dummy",
        device="cuda",
        max_model_len=args.context + 200,
        max_num_seqs=args.batch,
    )
    facts = {"device": device_info("cuda"), "versions": versions(), "ceilings": str(measure("cuda"))}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, llm.model_config.vocab_size, (args.batch, args.context), generator=generator)
    for prompt in prompts.tolist():
        llm.add_request(prompt, SamplingParams(max_tokens=WARM + TIMED + WATCHED + 50, ignore_eos=True))
    result = {"model": args.model, "batch": args.batch, "context": args.context, **facts, **profiled(llm)}
    llm.close()
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in result["kernels"][:20]:
        sys.stdout.write(f"{line['us_per_step']:9.1f} us {line['per_step']:6.1f} x  {line['name'][:90]}\n")
    sys.stdout.write(
        f"{result['ms_per_step']:.3f} ms per step, {result['idle_us_per_step']:.0f} us of it idle\n"
    )
    return 0


def profiled(llm: LLM) -> dict:
    run(llm, WARM)
    start = time.perf_counter()
    run(llm, TIMED)
    seconds = (time.perf_counter() - start) / TIMED
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run(llm, WATCHED)
    events = [e for e in watched.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    took, idle, end = collections.defaultdict(list), 0.0, events[0].time_range.start
    for event in events:
        took[event.name].append(event.time_range.end - event.time_range.start)
        idle += max(0.0, event.time_range.start - end)
        end = max(end, event.time_range.end)
    kernels = [
        {"name": name, "per_step": len(times) / WATCHED, "us_per_step": sum(times) / WATCHED}
        for name, times in sorted(took.items(), key=lambda item: -sum(item[1]))
    ]
    return {"ms_per_step": seconds * 1e3, "idle_us_per_step": idle / WATCHED, "kernels": kernels}


def run(llm: LLM, steps: int) -> None:
    for _ in range(steps):
        llm.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())

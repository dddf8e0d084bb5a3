"""The products of a decode step's few rows: `python bench/decode_products.py --output FILE.json`.

Per projection of a model, the time of torch's library and of fastcache's kernel (models/product_triton.py; null where
it does not take the shape), beside the time in which the device reads the weights. Each time is the median of replays
of a graph over many layers' weights, so that none is in a cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastcache.device.ceilings import measure
from fastcache.device.info import device_info, versions
from fastcache.models.config import ModelConfig, load_model_config
from fastcache.models.product_triton import product, takes

LAYERS, REPLAYS = 24, 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-8b", help="a preset")
    parser.add_argument("--rows", type=int, nargs="+", default=[40, 64])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    config, ceilings = load_model_config(args.model, "dummy"), measure("cuda")
    rows = [
        row for name, n, k in shapes(config) for row in timed(name, n, k, args.rows, ceilings.copy_bytes_s)
    ]
    facts = {"device": device_info("cuda"), "versions": versions(), "copy_bytes_s": ceilings.copy_bytes_s}
    args.output.write_text(
        json.dumps({"model": args.model, **facts, "products": rows}, indent=1) + "\n", "utf-8"
    )
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    return 0


def shapes(config: ModelConfig) -> list[tuple[str, int, int]]:
    """(name, columns, depth) of a layer's projections."""
    width, size = config.num_heads * config.head_dim, config.hidden_size
    return [
        ("qkv", width + 2 * config.num_kv_heads * config.head_dim, size),
        ("output", size, width),
        ("gate and up", 2 * config.intermediate_size, size),
        ("down", size, config.intermediate_size),
    ]


def timed(name: str, columns: int, depth: int, counts: list[int], copy_bytes_s: float) -> list[dict]:
    adds = name in ("output", "down")
    weights = [
        torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5 for _ in range(LAYERS)
    ]
    return [one(count, weights, adds, copy_bytes_s, name) for count in counts]


def one(count: int, weights: list[Tensor], adds: bool, copy_bytes_s: float, name: str) -> dict:
    columns, depth = weights[0].shape
    x = torch.randn(count, depth, device="cuda", dtype=torch.bfloat16)
    residual = torch.zeros(count, columns, device="cuda", dtype=torch.bfloat16) if adds else None
    return {
        "name": name,
        "rows": count,
        "columns": columns,
        "depth": depth,
        "library_us": median_us(lambda w: residual.addmm_(x, w.t()) if adds else x @ w.t(), weights),
        "ours_us": median_us(lambda w: product(x, w), weights) if takes(x, weights[0]) and not adds else None,
        "weights_us": round(2e6 * columns * depth / copy_bytes_s, 2),
    }


def median_us(run: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    """Of one product."""
    run(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(weights))
    return round(statistics.median(times[1:]), 2)


if __name__ == "__main__":
    sys.exit(main())

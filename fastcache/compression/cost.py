"""What a method costs on this device, measured: time per token and per step, and memory at its peak.

A step is measured as the engine runs it, all layers of contexts that start in it, right out of its keys and values; or
out of their pages, as contexts are compressed that were begun earlier, found in the prefix cache, or deferred.
On CUDA the layers are replayed as one graph, so that the device's time is counted and not the host's launches, which
hide behind a prefill. Nothing is known of what was not measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.compression.base import EvictionMethod
from fastcache.compression.cost_inputs import StepInputs, StepShape
from fastcache.compression.states import StateRater
from fastcache.compression.transform import BoundTransform
from fastcache.config import require
from fastcache.device.ceilings import Ceilings
from fastcache.device.streams import capture
from fastcache.errors import ConfigError

Method = EvictionMethod | BoundTransform
REPEATS = 7
# What a prefill shows of itself, and which of it takes all of the step's queries.
READS_QUERIES = frozenset({"attention_mass", "query_stats"})
WATCHED = frozenset({"keys", "values", "window_queries", "hidden_states"}) | READS_QUERIES


@dataclass(frozen=True)
class MethodCost:
    """seconds_per_token: all layers, of each token of the contexts that a step compresses. fixed_seconds: all
    layers, of each such step. extra_bytes: peak beside the step's tensors and the pages; None where the device
    does not count it. Measured for contexts of one length: a method that compares all queries with all keys takes
    longer per token of a longer one."""

    seconds_per_token: float
    fixed_seconds: float
    extra_bytes: int | None

    def seconds(self, num_tokens: int) -> float:
        """Of a step that compresses contexts of `num_tokens` together."""
        return self.fixed_seconds + self.seconds_per_token * num_tokens


@dataclass(frozen=True)
class Measurement:
    """`cost`, fitted to steps of two sizes; `step_seconds` of the larger one, and its bound in bytes or products."""

    cost: MethodCost
    step_seconds: float
    limit_seconds: float


def measure(method: Method, shape: StepShape, device: torch.device, ceilings: Ceilings) -> Measurement:
    """Time steps of `shape` and of its first sequence alone.

    Errors: `ConfigError` for a context too short for the method, or one that does more than watch a prefill.
    """
    if isinstance(method, EvictionMethod):
        method.check(shape.context, shape.ratio)
    require(
        shape.kept(method) > 0,
        f"a context of {shape.context} is too short for {method.name!r}; give a longer one.",
    )
    unseen = method.needs & READS_QUERIES if shape.paged else frozenset()
    require(
        not unseen,
        f"method {method.name!r} needs {', '.join(sorted(unseen))}, which pages do not hold: it is always compressed "
        "out of the step that computes the context. Measure it without --paged.",
    )
    beyond = method.needs - WATCHED
    require(
        not beyond,
        f"method {method.name!r} needs {', '.join(sorted(beyond))}, which is more than one prefill shows; allowed are "
        f"methods that need no more than {', '.join(sorted(WATCHED))}.",
    )
    rater = shape.rater(method, device)
    seconds, extra = _step(method, shape, device, rater)
    one = dataclasses.replace(shape, sequences=1)
    single = _step(method, one, device, rater)[0] if shape.sequences > 1 else 0.0
    slope, fixed = _line(one.num_tokens, single, shape.num_tokens, seconds)
    cost = MethodCost(slope, fixed, extra)
    return Measurement(cost, seconds, limit_seconds(method, shape, ceilings, rater))


def _line(few: int, few_s: float, many: int, many_s: float) -> tuple[float, float]:
    """Seconds per token and per step that explain the larger step, and the smaller one as well as neither being
    negative allows; all per token where only one size was measured."""
    slope = (many_s - few_s) / (many - few) if many > few else many_s / many
    slope = min(max(slope, 0.0), many_s / many)
    return slope, max(0.0, many_s - slope * many)


def limit_seconds(
    method: Method, shape: StepShape, ceilings: Ceilings, rater: StateRater | None = None
) -> float:
    """No step of `method` is faster: it reads what it needs, reads and writes what it keeps, and multiplies; a
    transform reads all and writes what it makes. rater: of a method of hidden states.

    Out of pages the same must move. Keys and values that a method needs are first brought together there, each read
    and written once more, which a kernel that follows page tables could do without.
    """
    entry = shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    if isinstance(method, BoundTransform):
        moved = 2 * entry * (shape.num_tokens + shape.sequences * shape.kept(method))
        flops = shape.sequences * method.flops(shape.context, shape.kv_heads)
        return shape.num_layers * max(moved / ceilings.copy_bytes_s, flops / ceilings.gemm_flop_s)
    query = shape.heads * shape.head_dim * shape.dtype.itemsize
    reads = entry * len(method.needs & {"keys", "values"}) + query * bool(method.needs & READS_QUERIES)
    if "attention_mass" in method.needs:
        reads += entry  # a mass is made of keys, whether or not the method sees them too
    reads += shape.hidden_size * shape.dtype.itemsize if rater is not None else 0
    copies = 4 * entry * shape.sequences * shape.kept(method)  # keys and values, read and written
    products = shape.heads * shape.head_dim * shape.num_tokens
    flops = rater.flops(shape.num_tokens) if rater is not None else 0.0
    if "attention_mass" in method.needs:
        flops += products * shape.context  # a multiply-add is two, half of all pairs are causal
    if "window_queries" in method.needs:
        flops += 2 * products * method.window
    if "query_stats" in method.needs:
        flops += 4 * products * shape.head_dim  # a covariance, and what each key makes of it
    of_bytes = (reads * shape.num_tokens + copies) / ceilings.copy_bytes_s
    return shape.num_layers * max(of_bytes, flops / ceilings.gemm_flop_s)


@torch.inference_mode()
def _step(
    method: Method, shape: StepShape, device: torch.device, rater: StateRater | None
) -> tuple[float, int | None]:
    inputs = StepInputs(method, shape, device, rater)

    def run() -> None:
        for layer in range(shape.num_layers):
            inputs.layer(layer)

    if device.type != "cuda":
        run()
        return _median(run, _host_clock), None
    inputs.layer(0)  # compiles
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs.layer(0)
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        inputs.layer(0)  # libraries set themselves up on the stream of the capture
    side.synchronize()
    with capture(graph, side, (side,)):
        run()
    graph.replay()
    return _median(graph.replay, _event_clock), extra


def _median(run: Callable[[], None], clock: Callable[[Callable[[], None]], float]) -> float:
    return statistics.median(clock(run) for _ in range(REPEATS))


def _host_clock(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _event_clock(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def save_costs(path: Path, costs: Mapping[str, MethodCost], facts: Mapping[str, Any]) -> None:
    """Write the file whole or not at all. facts: what else is to be known of the measurement.

    Errors: `ConfigError` if the place cannot be written.
    """
    content = {**facts, "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}. Choose another file.") from None


def load_costs(path: Path) -> tuple[dict[str, MethodCost], dict[str, Any]]:
    """Costs by method and facts, as `save_costs` wrote them. Errors: `ConfigError` for a file that is none of those."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {name: MethodCost(**cost) for name, cost in facts.pop("costs").items()}, facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{str(path)!r} holds no costs of methods ({error}); `fastcache cost --output FILE` writes one."
        ) from None

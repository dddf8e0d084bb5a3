"""What the probe's raw numbers mean: pure functions from measurements to {passed, ...} records.

Times are microseconds, SM ids are what %smid returned. A wave is one block on every SM of a side.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any

# A wave's wall time against the block's own time. The timer ticks in about 1 us steps; launch adds a few.
ONE_WAVE = (0.9, 1.3)
TWO_WAVES = (1.8, 2.6)
# Fewer samples of free memory than this have no two halves worth comparing.
MIN_SAMPLES = 4


def judge_identity(
    main: Collection[int],
    compress: Collection[int],
    granted: tuple[int | None, int | None],
    whole: Collection[int],
    shared_allowed: int = 0,
) -> dict[str, Any]:
    """The two sides' SM ids are disjoint, as many as granted, and all of this device.

    `granted` is (main, compress); None means the provider did not say, then only disjointness is judged.
    `shared_allowed` is 2 on compute capability 9.x once a kernel that launches kernels was loaded.
    """
    overlap = set(main) & set(compress)
    counts_match = all(
        g is None or g == len(set(ids)) for g, ids in zip(granted, (main, compress), strict=True)
    )
    stray = (set(main) | set(compress)) - set(whole)
    return {
        "passed": len(overlap) <= shared_allowed
        and counts_match
        and not stray
        and bool(main)
        and bool(compress),
        "main_ids": sorted(set(main)),
        "compress_ids": sorted(set(compress)),
        "main_count": len(set(main)),
        "compress_count": len(set(compress)),
        "overlap": sorted(overlap),
        "stray": sorted(stray),
    }


def judge_capacity(block_us: float, wall_at_us: float, wall_over_us: float, blocks: int) -> dict[str, Any]:
    """`blocks` blocks fit in one wave and one more does not. Needs no SM ids, so it holds if they mean nothing."""
    at, over = wall_at_us / block_us, wall_over_us / block_us
    return {
        "passed": ONE_WAVE[0] <= at <= ONE_WAVE[1] and TWO_WAVES[0] <= over <= TWO_WAVES[1],
        "blocks": blocks,
        "block_us": block_us,
        "wall_us": wall_at_us,
        "wall_one_more_us": wall_over_us,
    }


def judge_independence(long_block_us: float, delay_us: float, control_delay_us: float) -> dict[str, Any]:
    """Short work on one side starts at once beside a full queue on the other; on plain streams it waits a wave."""
    return {
        "passed": delay_us < 0.25 * long_block_us and control_delay_us > 0.75 * long_block_us,
        "long_block_us": long_block_us,
        "delay_us": delay_us,
        "plain_streams_delay_us": control_delay_us,
    }


def judge_graph(
    replayed: Collection[int], side: Collection[int], unnamed: Collection[int], guard_refused: bool
) -> dict[str, Any]:
    """A graph captured on a side replays on its SMs only; one captured without a stream leaves them, and the
    guard refuses to make it."""
    inside = bool(replayed) and set(replayed) <= set(side)
    return {
        "passed": inside and guard_refused,
        "replayed_count": len(set(replayed)),
        "outside": sorted(set(replayed) - set(side)),
        "captured_without_stream_count": len(set(unnamed)),
        "captured_without_stream_leaves": not set(unnamed) <= set(side),
        "guard_refused": guard_refused,
    }


def judge_memory(free_bytes: Sequence[int], changes: int, tolerance_bytes: int) -> dict[str, Any]:
    """Free device memory stays flat over `changes` changes of split: the second half is no lower than the first.

    `free_bytes` are samples in order, taken after every split had been made once.
    """
    assert len(free_bytes) >= MIN_SAMPLES, "flatness needs samples"
    half = len(free_bytes) // 2
    first, last = statistics.median(free_bytes[:half]), statistics.median(free_bytes[half:])
    return {
        "passed": first - last <= tolerance_bytes,
        "changes": changes,
        "free_first_half_bytes": int(first),
        "free_second_half_bytes": int(last),
        "lost_bytes": int(first - last),
        "tolerance_bytes": tolerance_bytes,
    }


def judge_compute(errors: dict[str, float], tolerance: float) -> dict[str, Any]:
    """Real kernels on a side compute what they compute on the whole GPU. `errors`: relative norms by kernel."""
    return {
        "passed": all(error <= tolerance for error in errors.values()),
        "tolerance": tolerance,
        "errors": errors,
    }


def conclude(parts: Sequence[dict[str, Any]]) -> bool:
    """All parts passed, and there was at least one."""
    return bool(parts) and all(part["passed"] for part in parts)

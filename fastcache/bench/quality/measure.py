"""One quality cell measured, in a process of its own: `python -m fastcache.bench.quality.measure CELL.json ROW.json`.

Like a speed cell it leaves a row for every error Python can catch; what it cannot catch is the supervisor's to tell.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache.bench.cell import classify, engine_facts
from fastcache.bench.quality import metrics
from fastcache.bench.quality.cells import RETRIEVAL, SHAPES, QualityCell, TaskConfig
from fastcache.bench.quality.pair import Pair, Pictures
from fastcache.bench.quality.retrieval import Item, item
from fastcache.bench.quality.row import blank_row
from fastcache.bench.quality.shapes import ShapesReader, by_kind, examples
from fastcache.bench.quality.texts import Prose, load_prose, windows
from fastcache.bench.row import failure, write_json
from fastcache.bench.supervise import die_with_parent
from fastcache.errors import UnsupportedCombination, UserError

log = logging.getLogger(__name__)

# What a task adds to its context: a question with its answer; the token that is always given before a continuation.
QUESTION_ROOM, GIVEN = 256, 1
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8}
SERVED_BITS = 16


def measure_quality(cell: QualityCell) -> dict[str, Any]:
    """The row of `cell`, whatever Python can catch."""
    row = blank_row(cell)
    started = time.perf_counter()
    try:
        _measure(cell, row)
    except Exception as error:  # whatever goes wrong in one cell is that cell's result, not the matrix's end
        if not isinstance(error, UserError):
            log.exception("cell %s", cell.id)
        row |= {"tasks": {}, **failure(classify(error), type(error).__name__, str(error))}
    return row | {"elapsed_s": time.perf_counter() - started}


def _measure(cell: QualityCell, row: dict[str, Any]) -> None:
    prose = load_prose(cell.text)
    room = max(task.context + (GIVEN + task.output if task.output else QUESTION_ROOM) for task in cell.tasks)
    pair = Pair(cell, room)
    try:
        facts = pair.model.describe()
        row |= _facts(facts) | {"text_source": prose.source}
        encode = _encoder(pair.model.tokenizer)
        row["tasks"] = {task.name: _task(task, cell, pair, prose, encode) for task in cell.tasks}
    finally:
        pair.close()
    share = pair.kept * (BITS[facts["kv_dtype"]] / SERVED_BITS if cell.kv_dtype != "auto" else 1)
    served = facts["kv_bytes_per_token"] * SERVED_BITS / BITS[facts["kv_dtype"]]
    row |= {
        "status": "ok",
        "kept": pair.kept,
        "kv_bytes_share": share,
        "kv_bytes_per_token": served * share,
        "uncompressed_requests": pair.uncompressed_requests if cell.compression_ratio else 0,
    }
    row["notes"] = [task["skipped"] for task in row["tasks"].values() if task["skipped"]]
    if row["uncompressed_requests"]:
        row["notes"].append(
            f"{row['uncompressed_requests']} requests were not compressed: too short for the method"
        )


def _task(
    task: TaskConfig, cell: QualityCell, pair: Pair, prose: Prose, encode: Callable[[str], list[int]]
) -> dict:
    """The task's numbers, with `skipped`: why they may not be used, or None."""
    if task.name == SHAPES:
        return _shapes(task, cell, pair)
    if task.name in RETRIEVAL:
        items = [item(task.name, i, task.context, cell.seed, prose, encode) for i in range(task.samples)]
        result = metrics.retrieval(*zip(*(_asked(pair, each) for each in items), strict=True))
        return result | {"skipped": metrics.unusable(task.name, result)}
    texts = windows(prose, encode, task.context + GIVEN + task.output, task.samples, cell.seed)
    if task.name == "greedy":
        full, ours = pair.generate([ids[: task.context + GIVEN] for ids in texts], task.output)
        return metrics.greedy(full, ours) | {"skipped": None}
    parts = [_continued(pair, ids, task.context) for ids in texts]
    return metrics.continuation(*zip(*parts, strict=True), tokens=task.output) | {"skipped": None}


def _shapes(task: TaskConfig, cell: QualityCell, pair: Pair) -> dict[str, Any]:
    """As retrieval, with the kinds of question apart and examples to look at."""
    reader = ShapesReader(pair.model)
    items = [reader.item(i, task.pictures, cell.seed) for i in range(task.samples)]
    outcomes = list(zip(*(_asked(pair, each.item, each.pictures) for each in items), strict=True))
    result = metrics.retrieval(*outcomes)
    return result | {
        "kinds": by_kind(items, *outcomes[:2]),
        "examples": examples(pair, items),
        "skipped": metrics.unusable(task.name, result),
    }


def _asked(
    pair: Pair, each: Item, pictures: Pictures = ()
) -> tuple[list[bool], list[bool], list[float], list[float]]:
    """Outcomes and answer NLLs of the whole cache and of the cell's, question by question.

    Greedy decoding gives exactly the answer if and only if each of its tokens is the likeliest after those before it.
    """
    questions, answers = [q.prompt for q in each.questions], [q.answer for q in each.questions]
    full = pair.full(each.context, questions, answers, pictures)
    ours = full if pair.same else pair.ours(each.context, questions, answers, pictures)
    right, loss = [], []
    for side in (full, ours):
        pairs = list(zip(side, answers, strict=True))
        right.append([bool((rows.argmax(-1) == _ids(answer, rows)).all()) for rows, answer in pairs])
        loss.append([float(_nll(rows, answer).mean()) for rows, answer in pairs])
    return right[0], right[1], loss[0], loss[1]


def _continued(pair: Pair, ids: list[int], context: int) -> tuple[float, float, float, float]:
    """NLL of the whole cache and of the cell's, KL(full || ours) and top-1 agreement, each a mean over the tokens."""
    cut = context + GIVEN
    given, rest = ids[context:cut], ids[cut:]
    (full,) = pair.full(ids[:context], [given], [rest])
    (ours,) = (full,) if pair.same else pair.ours(ids[:context], [given], [rest])
    kl = (full.exp() * (full - ours)).sum(-1).mean()
    top1 = (full.argmax(-1) == ours.argmax(-1)).float().mean()
    return float(_nll(full, rest).mean()), float(_nll(ours, rest).mean()), float(kl), float(top1)


def _nll(logprobs: Tensor, ids: list[int]) -> Tensor:
    """(n, vocab) -> (n,): nats for each of the n tokens."""
    return -logprobs.gather(1, _ids(ids, logprobs)[:, None]).squeeze(1)


def _ids(ids: list[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, device=like.device)


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    known = engine_facts(facts)
    names = ("attention_backend", "dtype", "weights", "device")
    return {name: known[name] for name in names} | {"stored_dtype": known["kv_dtype"]}


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    if tokenizer is None:
        raise UnsupportedCombination(
            "quality cells are made of text, and this model folder has no tokenizer.json."
        )
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def main(arguments: list[str]) -> None:
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    source, target = map(Path, arguments)
    cell = QualityCell.from_dict(json.loads(source.read_text(encoding="utf-8")))
    write_json(target, measure_quality(cell))


if __name__ == "__main__":
    main(sys.argv[1:])

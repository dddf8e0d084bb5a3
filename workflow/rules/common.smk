# The config becomes cells, and names that several rules need. Nothing here measures or draws.
import json
import os
import shlex
import sys
from pathlib import Path

from fastcache.bench.provenance import source_digest
from fastcache.bench.quality.cells import expand_quality
from fastcache.bench.serving.cells import expand_serving
from fastcache.errors import UserError
from snakemake.exceptions import WorkflowError
from workflow.scripts import progress, stale_lock
from workflow.scripts.config_check import check_config

# Relative, so that a checkout that moves takes its results' provenance with it.
BASE = Path(os.path.relpath(workflow.basedir))
SCHEMAS = BASE / "workflow" / "schemas"
# What measures a cell. Set the variable to put something in front: `numactl --membind=0 fastcache cell`.
CELL_COMMAND = os.environ.get("FASTCACHE_CELL_COMMAND", "fastcache cell")
FIGURES = (
    "throughput",
    "latency",
    "kv_memory",
    "agreement",
    "timeline",
    "decisions",
    "sm_ratio",
    "pools",
)

try:
    CELLS = {
        cell.id: cell
        for cell in check_config(config, SCHEMAS / "config.schema.yaml").cells
    }
    QUALITY = {cell.id: cell for cell in expand_quality(config)}
except UserError as error:
    sys.exit(f"Error in the config: {error}")

# Engines under open-loop load, by id.
SERVING = {cell.id: cell for cell in expand_serving(config)}
# What measures an engine, or trains; as FASTCACHE_CELL_COMMAND for matrix cells.
QUALITY_COMMAND = os.environ.get("FASTCACHE_QUALITY_COMMAND", "fastcache quality")
SERVING_COMMAND = os.environ.get("FASTCACHE_SERVING_COMMAND", "fastcache serving-cell")
TRAIN_COMMAND = os.environ.get("FASTCACHE_TRAIN_COMMAND", "python -m fastcache.cli")
SERVING_FIGURES = expand(
    "{{results}}/figures/serving_{figure}.{kind}",
    figure=["latency", "spread", "throughput", "memory", "stages", "pages"],
    kind=["svg", "csv"],
)

# Seconds of each cell, as far as rows tell; None where none does.
ESTIMATES = progress.estimate(CELLS, BASE, config.get("machine", {}).get("memory_gib"))

if stale_lock.clear_if_dead():
    logger.warning("The last run here was killed; its lock is removed.")

# How long a process that measured a cell waits for the next. In the environment, and not in a rule: no reason to measure
# again. A value that the user's environment has comes before the config's.
KEEP_PROCESS_S = os.environ.get("FASTCACHE_KEEP_PROCESS_S") or str(
    config.get("machine", {}).get("keep_process_s", 0)
)

# Jobs find this environment's `python` and `fastcache` without it being activated.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    f"export FASTCACHE_KEEP_PROCESS_S={shlex.quote(KEEP_PROCESS_S)}; "
)


# How many cells may be measured at once: `--resources gpu=4` on a machine with four GPUs, one cell on each.
GPUS = max(1, getattr(workflow.global_resources.get("gpu"), "value", None) or 1)


def measuring_threads(wildcards):
    """A cell on a GPU has its share of the cores; any other has all there are, so that nothing runs beside it."""
    cell = CELLS.get(wildcards.cell) or QUALITY[wildcards.cell]
    on_gpu = GPUS > 1 and cell.device != "cpu"
    return max(1, workflow.cores // GPUS) if on_gpu else 64  # scaled down to --cores


def longest_first(wildcards):
    """A cell's priority: with a long one left for the end, the other GPUs would wait for it. Quality cells, which have
    none, come last: a process that waits for the next cell would end meanwhile."""
    estimate = ESTIMATES[wildcards.cell]
    return estimate.seconds if estimate else 0


def minutes_of_cell(wildcards):
    """For a cluster's time limit: what the cell itself is allowed, and a start on a cold file system."""
    return int(CELLS[wildcards.cell].timeout_s / 60) + 6


# `results` is this run; `results/recorded/NAME` a report made from results/published/NAME.
wildcard_constraints:
    results=r"results(/recorded/[A-Za-z0-9][A-Za-z0-9._-]*)?",


def rows_of_this_run():
    """Targets name the rows themselves: a row that was deleted is made again even if the table is still there."""
    return expand("results/cells/{cell}.json", cell=CELLS)


def rows_of(wildcards):
    """Where a table's rows come from: a file per cell, or one file that the repository holds."""
    if wildcards.results == "results":
        return rows_of_this_run()
    return [f"results/published/{Path(wildcards.results).name}/rows.jsonl"]


def plan_of(wildcards):
    """What the rows should be; published rows may come with theirs."""
    if wildcards.results == "results":
        return ["results/plan.json"]
    return published(wildcards, "plan.json")


def proof_of(wildcards):
    """The proof of SM partitions, where a cell asks for one; published rows may come with theirs."""
    if wildcards.results == "results":
        asked = any(cell.greenctx for cell in CELLS.values())
        return rules.verify_greenctx.output if asked else []
    return published(wildcards, "greenctx.json")


def published(wildcards, name):
    """A file beside published rows, if it is there."""
    path = Path("results/published", Path(wildcards.results).name, name)
    return [str(path)] if path.is_file() else []


def script(name):
    """A script as an input, so that editing it makes its outputs anew."""
    return str(BASE / "workflow" / "scripts" / name)


def model_files(wildcards):
    """What a cell reads: the model the workflow makes, or a folder that has to be there already."""
    return files_of_model(CELLS[wildcards.cell].model_path)


def files_of_model(path):
    if path is None:
        return []
    if path == str(Path(rules.get_smollm2.output.weights).parent):
        return [rules.get_smollm2.output.weights]
    return [f"{path}/config.json"]


def greenctx_proof(wildcards):
    """A cell on a partition waits for its proof. ancient: a proof made again is no reason to measure again."""
    if not CELLS[wildcards.cell].greenctx:
        return []
    # str: ancient() marks the very object it is given, and the report does want a new proof.
    return ancient(str(rules.verify_greenctx.output))


def serving_rows_of_this_run():
    return expand("results/serving/{serving_cell}.json", serving_cell=SERVING)


def serving_rows_of(wildcards):
    """A file per engine, or one file that the repository holds."""
    if wildcards.results == "results":
        return serving_rows_of_this_run()
    return [f"results/published/{Path(wildcards.results).name}/rows.jsonl"]


def serving_model_files(wildcards):
    """What an engine reads."""
    cell = SERVING[wildcards.serving_cell]
    files = [file for file in (cell.workload.trace, cell.workload.dataset) if file]
    return [*files, *files_of_model(cell.model_path)]


def holds_serving_rows(name):
    """Published rows are of one kind: matrix cells, or request rates. A file that is not there is its rule's to miss."""
    rows = Path("results/published", name, "rows.jsonl")
    first = rows.read_text(encoding="utf-8").splitlines()[:1] if rows.is_file() else []
    return bool(first) and "row_id" in json.loads(first[0])


def recorded_reports(wildcards):
    """The reports of the published rows that the config names, or of all that are published."""
    published = sorted(
        path.parent.name for path in Path("results/published").glob("*/rows.jsonl")
    )
    names = [config["recorded"]] if config.get("recorded") else published
    if not names:
        raise WorkflowError(
            "no rows are published: there is no results/published/NAME/rows.jsonl."
        )
    return [
        f"results/recorded/{name}/{'serving' if holds_serving_rows(name) else 'report'}.html"
        for name in names
    ]


def quality_of_this_run():
    return expand("results/quality/{cell}.json", cell=QUALITY)


def quality_rows(wildcards):
    """A file per cell, or the one that the repository holds; nothing where quality was not measured."""
    if wildcards.results == "results":
        return quality_of_this_run()
    return published(wildcards, "quality.jsonl")


def quality_inputs(wildcards):
    """The model, and the text if it is not the one that ships with Python."""
    cell = QUALITY[wildcards.cell]
    return [*files_of_model(cell.model_path), *([cell.text] if cell.text else [])]

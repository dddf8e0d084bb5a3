# The config becomes cells, and names that several rules need. Nothing here measures or draws.
import json
import shlex
import sys
from pathlib import Path

from fastcache.bench.provenance import source_digest
from fastcache.errors import UserError
from workflow.scripts.config_check import check_config

WORKFLOW = Path(workflow.basedir) / "workflow"
SCRIPTS = WORKFLOW / "scripts"
SCHEMAS = WORKFLOW / "schemas"
REPORT = Path(workflow.basedir) / "report"
FIGURES = ("throughput", "latency", "kv_memory", "agreement")

try:
    CELLS = {
        cell.id: cell
        for cell in check_config(config, SCHEMAS / "config.schema.yaml").cells
    }
except UserError as error:
    sys.exit(f"Error in the config: {error}")

# Jobs find this environment's `python` and `fastcache` without it being activated.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
)


# `results` is this run; `results/recorded/NAME` a report made from results/published/NAME.
wildcard_constraints:
    results=r"results(/recorded/[A-Za-z0-9][A-Za-z0-9._-]*)?",


def rows_of(wildcards):
    """Where a table's rows come from: a file per cell, or one file that the repository holds."""
    if wildcards.results == "results":
        return expand("results/cells/{cell}.json", cell=CELLS)
    return [f"results/published/{Path(wildcards.results).name}/rows.jsonl"]


def plan_of(wildcards):
    """What the rows should be; published rows may come with theirs."""
    if wildcards.results == "results":
        return ["results/plan.json"]
    plan = Path("results/published", Path(wildcards.results).name, "plan.json")
    return [str(plan)] if plan.is_file() else []


def script(name):
    """A script as an input, so that editing it makes its outputs anew."""
    return str(SCRIPTS / name)

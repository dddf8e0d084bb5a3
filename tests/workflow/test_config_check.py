"""A config is judged before any job, in one sentence that says what was given and what is allowed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from config_check import check_config
from conftest import ROOT

from fastcache.errors import ConfigError, UnknownName, UserError

SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The default config with one dotted key set."""
    config = copy.deepcopy(DEFAULT)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = config
    for part in parents:
        place = place[part]
    place[last] = value
    return config


@pytest.mark.parametrize("name", ["config", "llava", "smoke"])
def test_a_shipped_config_is_valid(name):
    assert check_config(yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()), SCHEMA).cells


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("batch_size", "batch_sizes"),
        ("models.smollm2.paht", "path"),
        ("workloads.0.contxt", "context"),
        ("engine.dtyp", "dtype"),
        ("measure.repeat", "repeats"),
        ("greenctx.split", "splits"),
        ("greenctx.splits.0.main_ration", "main_ratio"),
        ("report.titel", "title"),
        ("expected_failure", "expected_failures"),
    ],
)
def test_a_key_that_does_not_exist_is_named_with_its_nearest_neighbour(path, nearest):
    with pytest.raises(UnknownName) as error:
        check_config(changed(path, 1), SCHEMA)
    assert repr(path.rsplit(".", 1)[-1]) in str(error.value) and error.value.nearest == nearest


@pytest.mark.parametrize(
    ("path", "value", "nearest"),
    [
        ("variants", ["baseline", "traid"], "triad"),
        ("workloads.0.name", "english-prosa", "english-prose"),
        ("models.smollm2.load_format", "dumy", "dummy"),
        ("engine.dtype", "float23", "float32"),
    ],
)
def test_a_name_that_does_not_exist_is_named_with_its_nearest_neighbour(path, value, nearest):
    with pytest.raises(UnknownName) as error:
        check_config(changed(path, value), SCHEMA)
    assert error.value.nearest == nearest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch_sizes", [0]),
        ("batch_sizes", [-1]),
        ("batch_sizes", ["4"]),
        ("batch_sizes", [1.5]),
        ("batch_sizes", []),
        ("compression_factors", [1]),
        ("compression_factors", [0.5]),
        ("greenctx.splits.0.compress_ratio", 0),
        ("greenctx.splits.0.compress_ratio", 1.2),
        ("greenctx.splits.0.main_ratio", 0.9),
        ("measure.repeats", 0),
        ("measure.timeout_s", 0),
        ("workloads.0.context", 0),
        ("recorded", "../elsewhere"),
        ("expected_failures", [{"cell": "*"}]),
        ("models", {}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_place(path, value):
    with pytest.raises(ConfigError):
        check_config(changed(path, value), SCHEMA)


def test_a_missing_section_is_named():
    config = {name: value for name, value in DEFAULT.items() if name != "workloads"}
    with pytest.raises(UserError, match="workloads"):
        check_config(config, SCHEMA)


def test_snakemake_says_one_line_and_no_traceback(workplace):
    workplace.configure(batchsizes=[1])
    done = workplace.snakemake("--dry-run")
    said = [line for line in done.stdout.splitlines() if "batchsizes" in line]
    assert done.returncode == 1
    assert len(said) == 1 and "Did you mean 'batch_sizes'?" in said[0]
    assert "Traceback" not in done.stdout and "File " not in done.stdout


def test_the_readme_lists_every_key_of_the_schema_and_no_other():
    """A key in the table stands in backticks at the start of its row."""
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    listed = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "config/README.md").read_text(), re.MULTILINE))
    assert listed == set(keys(schema))


def keys(schema: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of a schema's leaves; `ALIAS` for a name of the user's choice."""
    found = []
    inner = schema.get("items", schema)
    for name, part in inner.get("properties", {}).items():
        below = keys(part, f"{prefix}{name}.")
        found += below or [prefix + name]
    if isinstance(schema.get("additionalProperties"), dict):
        found += keys(schema["additionalProperties"], f"{prefix}ALIAS.")
    return found


def test_four_bits_are_refused_with_the_reason():
    with pytest.raises(
        ConfigError, match=r"'int4'; allowed: auto, fp8\. No attention kernel here reads .* 4 bits"
    ):
        check_config(changed("engine", {"kv_dtype": "int4"}), SCHEMA)

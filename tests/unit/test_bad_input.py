"""Mistakes of the user: exit 2, what is allowed, the nearest match, and never a traceback.

The command line is called in this process, so that a traceback would be an exception here; the last tests
run whole processes where the engine itself must find the mistake.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastcache.cli import main

DUMMY = "bench --models qwen3-8b --load-format dummy --workloads synthetic-long"


def refused(capsys, arguments: list[str]) -> str:
    """The message of a command that must end with exit code 2, one sentence and nothing on stdout."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "arguments, given, nearest, allowed",
    [
        ("bench --models qwen3-9b --load-format dummy", "qwen3-9b", "qwen3-8b", "smollm2"),
        (f"{DUMMY} --variants triat", "triat", "triad", "compression-only"),
        (
            "bench --models qwen3-8b --load-format dummy --workloads sinthetic-long",
            "sinthetic-long",
            "synthetic-long",
            "english-prose",
        ),
        (f"{DUMMY} --method snapkw", "snapkw", "snapkv", "streaming_llm"),
        (f"{DUMMY} --load-format dumy", "dumy", "dummy", "auto"),
        (f"{DUMMY} --dtype bfloat61", "bfloat61", "bfloat16", "float32"),
        (f"{DUMMY} --device cudda", "cudda", "cuda", "cpu"),
        ("bench --modles qwen3-8b", "--modles", "--models", "--workloads"),
        ("bensh --models qwen3-8b", "bensh", "bench", "generate"),
        ("generate hi --model x --method snapkw", "snapkw", "snapkv", "knorm"),
        ("generate hi --model x --max-token 3", "--max-token", "--max-tokens", "--temperature"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_that_is_allowed(
    capsys, arguments, given, nearest, allowed
):
    said = refused(capsys, arguments.split())
    assert f"{given!r}" in said and f"Did you mean {nearest!r}?" in said and "Allowed: " in said
    assert allowed in said


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("--synthetic-batch-sizes", "32,0", "'0' is not a positive integer"),
        ("--synthetic-batch-sizes", "-4", "'-4' is not a positive integer"),
        ("--synthetic-batch-sizes", "3.5", "'3.5' is not a positive integer"),
        ("--synthetic-batch-sizes", "32,,64", "without empty entries"),
        ("--synthetic-batch-sizes", "many", "'many' is not a positive integer"),
        ("--synthetic-context", "0", "'0' is not a positive integer"),
        ("--synthetic-output", "ten", "'ten' is not a positive integer"),
        ("--synthetic-num-batches", "-1", "not a positive integer"),
        ("--greenctx-compress-ratio", "0", "strictly between 0 and 1"),
        ("--greenctx-compress-ratio", "1", "strictly between 0 and 1"),
        ("--greenctx-compress-ratio", "nan", "strictly between 0 and 1"),
        ("--greenctx-main-ratio", "1.5", "strictly between 0 and 1"),
        ("--greenctx-main-ratio", "0.9", "sum to 1.150"),
        ("--greenctx-main-ratio", "half", "'half' is not a number"),
        ("--compression-factor", "0.5", "above 1"),
        ("--compression-factor", "1", "above 1"),
        ("--compression-factor", "inf", "above 1"),
        ("--compression-factor", "five", "'five' is not a number"),
        ("--gpu-mem-util", "1.2", "strictly between 0 and 1"),
        ("--kv-dtype", "int4", "No attention kernel here reads keys and values of 4 bits"),
        ("--repeats", "0", "not a positive integer"),
        ("--seed", "-1", "not 0 or a positive integer"),
        ("--timeout", "0", "positive number of seconds"),
        ("--compressor-path", "x.pth", "--method mlp"),
        ("--synthetic-output", "4096", "no room"),
        ("--workloads", "light-dataset", "--dataset-dir"),
        ("--workloads", "heavy-trace", "--trace-conv"),
        ("--dataset-dir", "/nonexistent/set", "does not exist"),
        ("--trace-conv", "/nonexistent/trace.csv", "cannot be read"),
        ("--output", "/proc/nothing/out.json", "cannot write"),
        ("--output", "/", "it is a folder"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_allowed(capsys, tmp_path, monkeypatch, flag, value, words):
    monkeypatch.chdir(tmp_path)
    workloads = {"--dataset-dir": "light-dataset", "--trace-conv": "heavy-trace"}.get(flag, "synthetic-long")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").write_text("{}")
    base = ["bench", "--smollm2", "model", "--workloads", workloads, "--synthetic-batch-sizes", "1"]
    assert main([*base, f"{flag}={value}"]) == 2
    out, err = capsys.readouterr()
    assert words in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("bench", "no model to measure"),
        ("bench --models qwen3-8b", "--qwen3-8b PATH"),
        ("bench --models llava-mlp", "--llava PATH"),
        ("bench --qwen3-8b /nonexistent/model", "does not exist"),
        ("bench --models", "expected one argument"),
        ("bench stray", "'stray'"),
        ("generate --model x", "PROMPT"),
        ("generate hi", "--model"),
        ("generate hi --model x --temperature -1", "temperature"),
        ("generate hi --model x --top-p 1.5", "top_p"),
        ("generate hi --model x --compression-factor 5", "--method"),
        ("generate hi --model x --method knorm --compressor-path f.pth", "kvzap or mlp"),
        ("generate hi --model x --compressor-path f.pth", "--method"),
        (
            "bench --models qwen3-8b --load-format dummy --method kvzap,mlp --compressor-path f.pth",
            "one method",
        ),
        ("generate hi --model llava-1.5-7b --load-format dummy --image a.png", "0 <image> and 1 --image"),
        ("generate a b --model llava-1.5-7b --load-format dummy --image a.png --chat", "one prompt"),
        ("cell nothing.json --output row.json", "nothing.json"),
    ],
)
def test_what_is_missing_is_named(capsys, arguments, words):
    assert words in refused(capsys, arguments.split())


CELL = {
    "model": "smollm2",
    "load_format": "dummy",
    "workload": {"name": "synthetic-long"},
    "batch_size": 1,
    "variant": "baseline",
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batch_sise": 2}, "Did you mean 'batch_size'?"),
        ({"workload": {"name": "synthetic-long", "contxt": 3}}, "Did you mean 'context'?"),
        ({"batch_size": 0}, "positive integer"),
        ({"variant": "trio"}, "Did you mean 'triad'?"),
        ({"variant": "triad", "method": "snapkv", "compression_factor": 5}, "greenctx_compress_ratio"),
        ({"workload": 3}, "workload"),
        ({"model": "smollm"}, "Did you mean 'smollm2'?"),
    ],
)
def test_a_cell_that_is_none_is_refused_before_anything_runs(capsys, tmp_path, change, words):
    file = tmp_path / "cell.json"
    file.write_text(json.dumps(CELL | change))
    said = refused(capsys, ["cell", str(file), "--output", str(tmp_path / "row.json")])
    assert words in said and not (tmp_path / "row.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "3", "{"])
def test_a_cell_file_that_is_no_mapping_is_refused(capsys, tmp_path, content):
    file = tmp_path / "cell.json"
    file.write_text(content)
    refused(capsys, ["cell", str(file), "--output", str(tmp_path / "row.json")])


def test_a_row_that_cannot_be_written_is_refused_before_measuring(capsys, tmp_path):
    (tmp_path / "cell.json").write_text(json.dumps(CELL))
    said = refused(capsys, ["cell", str(tmp_path / "cell.json"), "--output", str(tmp_path)])
    assert "it is a folder" in said


# -- what only the engine can find: whole processes ------------------------------------------------------------


def broken_folder(tmp_path: Path, source: Path, how: str) -> Path:
    folder = tmp_path / how
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = next(folder.glob("*.safetensors"))
    if how == "no-weights":
        weights.unlink()
    elif how == "corrupt-weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "other-architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    elif how == "no-config":
        (folder / "config.json").unlink()
    elif how == "broken-config":
        (folder / "config.json").write_text("{")
    return folder


FOLDERS = {
    "no-weights": "no *.safetensors",
    "corrupt-weights": "safetensors",
    "other-architecture": "LlamaForCausalLM",
    "no-config": "no config.json",
    "broken-config": "config.json",
}


@pytest.mark.parametrize("how", FOLDERS)
def test_a_model_folder_that_cannot_be_used_says_why(capsys, tmp_path, tiny_model, how):
    folder = broken_folder(tmp_path, tiny_model("llama"), how)
    said = refused(capsys, ["generate", "hi", "--model", str(folder), "--device", "cpu"])
    assert FOLDERS[how] in said and how in said


def test_a_prompt_that_does_not_fit_says_by_how_much(capsys, tiny_model):
    said = refused(
        capsys,
        [
            "generate",
            "hello " * 50,
            "--model",
            str(tiny_model("llama")),
            "--max-model-len",
            "40",
            "--device",
            "cpu",
        ],
    )
    assert "max_model_len is 40" in said


def test_a_missing_model_is_refused_by_generate(capsys):
    assert "does not exist" in refused(capsys, ["generate", "hi", "--model", "/nonexistent/model"])


@pytest.mark.slow
def test_a_matrix_over_a_corrupt_checkpoint_exits_2_and_leaves_rows_that_say_so(tmp_path, tiny_model):
    folder = broken_folder(tmp_path, tiny_model("llama"), "corrupt-weights")
    command = [sys.executable, "-m", "fastcache.cli", "bench", "--smollm2", str(folder), "--device", "cpu"]
    command += ["--workloads", "synthetic-long", "--variants", "baseline", "--synthetic-batch-sizes", "1"]
    command += [
        "--synthetic-context",
        "64",
        "--synthetic-output",
        "4",
        "--output",
        str(tmp_path / "rows.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "safetensors" in done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["status"] == "failed" and row["error"]["type"] == "ModelFolderError"

"""The command line: the guide's flags, what lands in the file, resuming, and the exit code."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from rows import failed_row, row

from fastcache import __version__, cli_bench
from fastcache.bench.matrix import VARIANTS, CellConfig, expand
from fastcache.bench.provenance import source_digest
from fastcache.cli import COMMANDS, Parser, main
from fastcache.cli_matrix import add_arguments, matrix_config

VALIDATOR = Draft202012Validator(yaml.safe_load((ROOT / "workflow/schemas/row.schema.yaml").read_text()))
GUIDE_FLAGS = (
    "--output --models --resume --dataset-dir --trace-conv --qwen3-8b --qwen3-32b --llava --compressor-path "
    "--synthetic-context --synthetic-output --synthetic-dialogue --synthetic-token --synthetic-num-batches "
    "--synthetic-batch-sizes --gpu-mem-util --workloads --variants --greenctx-compress-ratio "
    "--greenctx-main-ratio --greenctx-main-stream"
)
OWN_FLAGS = "--smollm2 --method --compression-factor --load-format --dtype --device --repeats --seed"
GUIDE_COMMAND = (
    "--models qwen3-8b --workloads synthetic-long --variants compression-only,triad --synthetic-context 4096 "
    "--synthetic-output 128 --synthetic-token Hello --synthetic-num-batches 1 --synthetic-batch-sizes 32,64"
)


def parse(text: str) -> argparse.Namespace:
    parser = Parser(prog="x")
    add_arguments(parser)
    return parser.parse_strictly(text.split())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`bench(arguments)` -> exit code, with cells measured by a stand-in that `bench.fail` can make fail."""
    output, folder = tmp_path / "out.json", tmp_path / "model"
    folder.mkdir()

    def measure(cell: CellConfig) -> dict:
        call.measured.append(cell.id)
        if cell.variant in call.fail:
            kind = call.fail[cell.variant]
            return failed_row(cell, "failed") | {"error": {"type": kind, "message": "no"}}
        return row(cell, source_digest=call.digest)

    def call(arguments: str = "", variants: str = "compression-only,triad") -> int:
        call.measured = []
        fixed = (
            f"bench --output {output} --smollm2 {folder} --workloads synthetic-long --synthetic-batch-sizes 2"
        )
        return main([*fixed.split(), "--variants", variants, *arguments.split()])

    call.fail, call.output, call.digest, call.folder = {}, output, source_digest(), folder
    call.rows = lambda: json.loads(output.read_text())
    monkeypatch.setattr(cli_bench, "run_cell", measure)
    return call


def test_every_flag_of_the_guide_and_of_ours_exists():
    parser = Parser(prog="x")
    add_arguments(parser)
    assert {*GUIDE_FLAGS.split(), *OWN_FLAGS.split()} <= set(parser._option_string_actions)


def test_the_guides_command_means_what_the_guide_says():
    cells = expand(matrix_config(parse(f"{GUIDE_COMMAND} --qwen3-8b models/q"))).cells
    assert [(c.variant, c.batch_size) for c in cells] == [
        ("baseline", 32),
        ("compression-only", 32),
        ("triad", 32),
        ("baseline", 64),
        ("compression-only", 64),
        ("triad", 64),
    ]
    workload = cells[0].workload
    assert (workload.context, workload.output, workload.num_batches, workload.token) == (
        4096,
        128,
        1,
        "Hello",
    )
    assert all(c.model_path == "models/q" and c.model_len == 4096 for c in cells)


def test_defaults_are_the_guides_and_no_path_is():
    args = parse("--qwen3-8b q --qwen3-32b r")
    config = matrix_config(args)
    assert list(config["models"]) == ["qwen3-8b", "qwen3-32b"]
    assert str(args.output) == "kvcache_matrix_results.json"
    assert [w["name"] for w in config["workloads"]] == ["synthetic-long", "english-prose"]
    assert {(w["context"], w["output"], w["num_batches"]) for w in config["workloads"]} == {(3072, 512, 2)}
    cells = expand(config).cells
    assert {c.batch_size for c in cells if c.model == "qwen3-8b"} == {16, 64}
    assert {c.greenctx_compress_ratio for c in cells} == {None, 0.25}
    assert {c.variant for c in cells} == {"baseline", *VARIANTS}
    defaults = vars(parse(""))
    paths = [v for k, v in defaults.items() if k.startswith("path_")] + [defaults["dataset_dir"]]
    assert len(paths) == 5 and not any(paths)


def test_named_inputs_add_their_workloads(tmp_path):
    config = matrix_config(parse("--smollm2 m --dataset-dir d --trace-conv t.csv"))
    by_name = {w["name"]: w for w in config["workloads"]}
    assert by_name["light-dataset"]["dataset_dir"] == "d" and by_name["heavy-trace"]["trace"] == "t.csv"


def test_ratios_reach_the_cells_and_complete_each_other():
    def ratios(text: str) -> set:
        cells = expand(matrix_config(parse(f"--smollm2 m --variants triad {text}"))).cells
        return {(c.greenctx_compress_ratio, c.greenctx_main_ratio) for c in cells if c.variant == "triad"}

    assert ratios("--greenctx-compress-ratio 0.4") == {(0.4, 0.6)}
    assert ratios("--greenctx-main-ratio 0.5") == {(0.25, 0.5)}
    assert ratios("--greenctx-compress-ratio 0.1 --greenctx-main-ratio 0.2") == {(0.1, 0.2)}


def test_a_run_writes_valid_rows_with_speed_ups_and_prints_table_and_path(bench, capsys):
    assert bench() == 0
    rows = bench.rows()
    assert [r["variant"] for r in rows] == ["baseline", "compression-only", "triad"]
    assert all(r["speedup_vs_baseline"] > 0 for r in rows) and rows[0]["speedup_vs_baseline"] == 1
    for made in rows:
        VALIDATOR.validate(made)
    out, err = capsys.readouterr()
    assert str(bench.output) in out and "compression-only" in out and "tok/s" in out
    assert "[3/3]" in err and "Traceback" not in err


@pytest.mark.parametrize("kind, code", [("RuntimeError", 1), ("OutOfPages", 1), ("ModelFolderError", 2)])
def test_a_failed_cell_fails_the_run_and_leaves_the_other_rows(bench, kind, code):
    bench.fail = {"compression-only": kind}
    assert bench() == code
    assert [r["status"] for r in bench.rows()] == ["ok", "failed", "ok"]
    assert bench.rows()[2]["speedup_vs_baseline"] is not None


def test_the_file_is_complete_after_every_cell(bench, monkeypatch):
    sizes = []
    write = cli_bench.write_json
    monkeypatch.setattr(
        cli_bench, "write_json", lambda path, rows: (write(path, rows), sizes.append(len(bench.rows())))
    )
    bench()
    assert sizes == [1, 2, 3, 3]


def test_resume_keeps_what_succeeded_and_retries_what_failed(bench):
    bench.fail = {"triad": "RuntimeError"}
    assert bench() == 1
    first = bench.rows()
    bench.fail = {}
    assert bench("--resume") == 0
    assert len(bench.measured) == 1 and "triad" in bench.measured[0]
    assert bench.rows()[:2] == first[:2] and bench.rows()[2]["status"] == "ok"
    assert bench("--resume") == 0 and bench.measured == []


@pytest.mark.parametrize(
    "change",
    [
        "--synthetic-context 1000",
        "--synthetic-output 64",
        "--seed 1",
        "--gpu-mem-util 0.5",
        "--repeats 2",
        "--synthetic-token Hello",
    ],
)
def test_resume_measures_again_under_other_parameters_and_keeps_the_old_rows(bench, change):
    bench()
    bench(f"--resume {change}")
    assert len(bench.measured) == 3 and len(bench.rows()) == 6


def test_resume_with_other_ratios_measures_only_what_they_change(bench):
    bench()
    bench("--resume --greenctx-compress-ratio 0.4")
    assert len(bench.measured) == 1 and "triad" in bench.measured[0]


def test_resume_measures_again_what_another_source_measured(bench):
    bench.digest = "0" * 16
    bench()
    bench.digest = source_digest()
    bench("--resume")
    assert len(bench.measured) == 3 and len(bench.rows()) == 3


def test_without_resume_a_run_starts_afresh(bench):
    bench()
    assert bench() == 0 and len(bench.measured) == 3 and len(bench.rows()) == 3


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '[{"status": "ok"}]', "\xff\x00"])
def test_resume_refuses_a_file_it_cannot_read_and_leaves_it(bench, content, capsys):
    bench.output.write_text(content)
    assert bench("--resume") == 2 and bench.measured == []
    assert bench.output.read_text() == content
    assert "cannot resume" in capsys.readouterr().err


def test_excluded_cells_are_named_with_their_rule(bench, capsys):
    code = bench("--models smollm2,qwen3-8b --load-format dummy --workloads english-prose")
    assert code == 0 and "left out (text-needs-a-tokenizer)" in capsys.readouterr().err


def test_a_cell_writes_its_row(tmp_path, monkeypatch, capsys):
    from fastcache import cli_cell

    cell = expand(matrix_config(parse("--smollm2 m --workloads synthetic-long"))).cells[0]
    for made in (row(cell), failed_row(cell, "oom")):
        monkeypatch.setattr(cli_cell, "run_cell", lambda given, made=made: made)
        (tmp_path / "cell.json").write_text(json.dumps(cell.to_dict()))
        target = tmp_path / "deep" / "row.json"
        assert main(["cell", str(tmp_path / "cell.json"), "--output", str(target)]) == 0
        assert json.loads(target.read_text()) == made
        assert [p.name for p in target.parent.iterdir()] == ["row.json"]


def test_help_and_version(capsys):
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS) and main([]) == 2
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "default: None" not in capsys.readouterr().out


def test_the_guides_script_is_the_same_command_and_loads_no_torch():
    script = str(ROOT / "bench/bench_kvcache_matrix.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert all(flag in done.stdout for flag in GUIDE_FLAGS.split())
    program = "import sys, fastcache.cli, fastcache.cli_bench; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_interrupt_is_one_word_and_its_exit_code(bench, monkeypatch, capsys):
    def interrupt(cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_bench, "run_cell", interrupt)
    assert bench() == 130 and "Traceback" not in capsys.readouterr().err


# -- the real thing, tiny --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_command_on_a_tiny_model(tiny_model, tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "bench/bench_kvcache_matrix.py"), "--output", str(output)]
    command += ["--smollm2", str(tiny_model("llama")), "--workloads", "synthetic-long,english-prose"]
    command += ["--variants", "compression-only", "--method", "streaming_llm", "--compression-factor", "4"]
    command += ["--synthetic-context", "100", "--synthetic-output", "8", "--synthetic-num-batches", "1"]
    command += ["--synthetic-batch-sizes", "2", "--device", "cpu", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    assert [(r["workload"], r["variant"], r["status"]) for r in rows] == [
        ("synthetic-long", "baseline", "ok"),
        ("synthetic-long", "compression-only", "ok"),
        ("english-prose", "baseline", "ok"),
        ("english-prose", "compression-only", "ok"),
    ]
    for made in rows:
        VALIDATOR.validate(made)
        assert made["prompt_tokens"] == 200 and made["output_tokens"] == 16
        assert made["total_tokens"] / made["elapsed_s"] == pytest.approx(made["throughput_tok_s"])
    for base, compressed in (rows[:2], rows[2:]):
        assert base["kv_len_before"] is None and base["agreement"]["token_match"] == 1
        assert (compressed["kv_len_before"], compressed["kv_len_after"]) == (100, 25)
        assert compressed["pages_freed"] > 0 and compressed["peak_kv_bytes"] <= base["peak_kv_bytes"]
        assert compressed["weights"]["sha256"] == base["weights"]["sha256"] is not None


@pytest.mark.slow
def test_a_pool_too_small_is_an_oom_row_of_a_real_cell(tiny_model, tmp_path):
    cell = {
        "model": "tiny",
        "model_path": str(tiny_model("llama")),
        "workload": {"name": "synthetic-long", "context": 64, "output": 4},
        "batch_size": 1,
        "variant": "baseline",
        "num_pages": 2,
        "device": "cpu",
        "repeats": 1,
    }
    (tmp_path / "cell.json").write_text(json.dumps(cell))
    assert main(["cell", str(tmp_path / "cell.json"), "--output", str(tmp_path / "row.json")]) == 0
    made = json.loads((tmp_path / "row.json").read_text())
    VALIDATOR.validate(made)
    assert (
        made["status"] == "oom" and made["error"]["type"] == "OutOfPages" and made["device"]["kind"] == "cpu"
    )


@pytest.mark.slow
def test_generate_prints_a_text_per_prompt(tiny_model, capsys):
    arguments = ["generate", "--model", str(tiny_model("llama")), "--max-tokens", "3", "--device", "cpu"]
    assert main([*arguments, "ab", "cd"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main([*arguments, "--method", "knorm", "abcdefgh"]) == 0
    dummy = ["--load-format", "dummy", "--method", "kvzap", "--compressor-path", "dummy"]
    assert main([*arguments, *dummy, "abcdefgh"]) == 0
    assert main([*arguments, *dummy[2:], "abcdefgh"]) == 2

"""A cell: what it asks of the engine, what its row says, and that every way to fail leaves a row."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from rows import row as factory_row

from fastcache.bench import cell as cell_module
from fastcache.bench.cell import busy_host, classify, engine_options, measure_cell
from fastcache.bench.matrix import VARIANTS, CellConfig
from fastcache.bench.provenance import PACKAGE, git_commit, measured_files, source_digest
from fastcache.bench.row import blank_row
from fastcache.bench.supervise import PARENT_VARIABLE, STARTED_VARIABLE, how_it_died, run_cell
from fastcache.bench.work import step_bytes
from fastcache.config import EngineConfig
from fastcache.device import clocks
from fastcache.device.ceilings import Ceilings
from fastcache.device.info import OtherLoad
from fastcache.errors import DeviceOutOfMemory, OutOfPages, UnsupportedArchitecture, UnsupportedCombination
from fastcache.results import RequestMetrics, RequestOutput
from fastcache.stats import EngineStats

VALIDATOR = Draft202012Validator(yaml.safe_load((ROOT / "workflow/schemas/row.schema.yaml").read_text()))


def cell(variant: str = "compression-only", **changes) -> CellConfig:
    values = {
        "model": "smollm2",
        "load_format": "dummy",
        "workload": {"name": "synthetic-long", "context": 40, "output": 4, "num_batches": 2},
        "batch_size": 3,
        "variant": variant,
        "repeats": 2,
        "timeout_s": 60,
    }
    if variant != "baseline":
        values |= {"method": "snapkv", "compression_factor": 4}
    if variant not in ("baseline", "compression-only"):
        values |= {"greenctx_compress_ratio": 0.25, "greenctx_main_ratio": 0.75}
    return CellConfig.from_dict(values | changes)


SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
}


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(cell_module.ceilings, "measure", lambda device: Ceilings(1e9, 2e9, "float32"))
    monkeypatch.setattr(clocks, "sensors_of", lambda device: None)


DECISIONS = {
    "decisions": [
        {
            "about": "compression",
            "choice": "whole",
            "reason": "compression costs more than these outputs give back",
            "count": 4,
            "inputs": {"context": 40, "kept": 8, "rest": 0, "output": 6, "sharing": 2},
            "outcome": {"compress": False, "place": "inline", "break_even": 11.6},
            "costs": {},
        }
    ],
    "measured": True,
    "costs": {},
    "places": ["inline"],
    "steps": {},
}


class FakeLLM:
    """The engine's interface with made-up times; keeps what it was asked."""

    def __init__(self, facts=None, fail_at=None, **options):
        self.options, self.batches, self.closed, self.fail_at = options, [], False, fail_at
        self.model_config, self.tokenizer = SimpleNamespace(**SHAPE), None
        self.facts = {
            "device": "cpu",
            "dtype": "float32",
            "kv_dtype": "float32",
            "kv_bytes_per_token": 128,
            "attention_backend": "fake",
            "weights": {"kind": "dummy", "sha256": None, "source": "x"},
            "num_pages": 9,
            "max_model_len": options["max_model_len"],
        } | (facts or {})

    def describe(self):
        return self.facts

    def generate(self, prompts, params):
        if self.fail_at is not None and len(self.batches) == self.fail_at:
            raise OutOfPages("too few pages")
        self.batches.append((prompts, params))
        return [self._output(*pair) for pair in zip(prompts, params, strict=True)]

    def _output(self, prompt, params):
        config = self.options["compression"]
        after = None if config is None else int(len(prompt) * (1 - config.compression_ratio))
        start = time.perf_counter()
        times = tuple(start + i / 1000 for i in range(params.max_tokens))
        metrics = RequestMetrics(
            start - 0.01,
            start,
            times[0],
            times[-1],
            times,
            len(prompt),
            params.max_tokens,
            0,
            config and len(prompt),
            after,
            2,
            config is not None,
            0,
        )
        return RequestOutput("0", tuple(prompt), list(range(params.max_tokens)), "", "length", metrics)

    def stats(self):
        return EngineStats(
            prefill_tokens=240,
            prefill_time_s=0.5,
            decode_tokens=18,
            decode_steps=6,
            decode_time_s=0.25,
            peak_kv_bytes=5,
            peak_running=3,
        )

    def decisions(self):
        return None if self.options["tuning"] == "off" else copy.deepcopy(DECISIONS)

    def explore(self, freely):
        self.explored = [*getattr(self, "explored", []), freely]

    def reset_stats(self):
        self.resets = getattr(self, "resets", 0) + 1

    def close(self):
        self.closed = True


def measured(config: CellConfig, **fake):
    made = []

    def make(**options):
        made.append(FakeLLM(**fake, **options))
        return made[-1]

    found = measure_cell(config, make)
    VALIDATOR.validate(found)
    return found, made[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_a_valid_row_that_says_what_ran(variant):
    row, llm = measured(cell(variant))
    assert row["status"] == "ok" and row["variant"] == variant and llm.closed
    assert (row["kv_len_before"], row["kv_len_after"]) == (
        (None, None) if variant == "baseline" else (40, 10)
    )
    tuned = variant in ("auto-tune+greenctx", "triad")
    assert row["policy"] == (None if variant == "baseline" else "auto" if tuned else "fixed")
    assert (row["auto_tune"], row["auto_dual"]) == (tuned, variant == "triad")
    assert (row["decisions"] is not None) == tuned
    assert getattr(llm, "explored", []) == ([True, False] if tuned else [])  # at will in the warm-up alone
    assert any("4 requests whole: compression costs more" in note for note in row["notes"]) == tuned
    assert any("break-even at 12 output tokens" in note for note in row["notes"]) == tuned
    assert any("seeded random numbers" in note for note in row["notes"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_switches_on_what_the_design_says(variant):
    config = EngineConfig.from_dict(engine_options(cell(variant, greenctx_main_stream=False)))
    assert (config.compression is not None) == (variant != "baseline")
    assert config.partition.enabled == (variant not in ("baseline", "compression-only"))
    assert config.max_num_seqs == 3 and config.max_model_len == 44
    if config.compression:
        assert config.compression.compression_ratio == 0.75
    if config.partition.enabled:
        assert (config.partition.compress_ratio, config.partition.main_ratio) == (0.25, 0.75)


def test_batch_size_is_the_concurrency_and_warm_up_is_short_and_not_counted():
    row, llm = measured(
        cell(workload={"name": "synthetic-long", "context": 40, "output": 30, "num_batches": 2})
    )
    assert [len(prompts) for prompts, _ in llm.batches] == [3] * (1 + 2 * 2)
    assert [params[0].max_tokens for _, params in llm.batches] == [16, 30, 30, 30, 30]
    assert all(p.ignore_eos and p.greedy for _, params in llm.batches for p in params)
    assert row["prompt_tokens"] == 2 * 3 * 40 and row["output_tokens"] == 2 * 3 * 30
    assert len(row["repeats"]["values"]) == 2 and llm.resets == 2


@pytest.mark.parametrize("lengths, tokens", [("equal", 3), ("mixed", 30)])
def test_a_gpu_prefills_whole_batches_and_decodes_until_each_batch_size_was_met(monkeypatch, lengths, tokens):
    if lengths == "mixed":
        real = cell_module.make_plan

        def make_plan(*args):
            plan = real(*args)
            for batches in plan.rounds:
                batches[0][0] = dataclasses.replace(batches[0][0], max_tokens=5)
            return plan

        monkeypatch.setattr(cell_module, "make_plan", make_plan)
    monkeypatch.setattr(cell_module, "device_info", lambda name: {"kind": "cuda", "name": name})
    monkeypatch.setattr(cell_module, "peak_memory_bytes", lambda name: 1)
    workload = {"name": "synthetic-long", "context": 40, "output": 30, "num_batches": 2}
    _, llm = measured(cell(workload=workload), facts={"device": "cuda:0"})
    assert [len(prompts[0]) for prompts, _ in llm.batches] == [40] * 5
    assert [params[1].max_tokens for _, params in llm.batches] == [tokens, 30, 30, 30, 30]


def test_the_ceilings_come_first_and_the_shares_follow_from_counted_work():
    row, llm = measured(cell("baseline"))
    assert (row["ceiling_copy_bytes_s"], row["ceiling_gemm_flop_s"]) == (1e9, 2e9)
    layers = 2 * 8 * ((2 * 2 + 2 * 1) * 4 + 3 * 16)
    last = 8 * (2 * 4 + 3 * 16)  # behind the last attention, where one token of a prompt goes on
    per_request = 2 * ((layers - last) * 40 + last) + 4 * 2 * 4 * 2 * 40 * 40 / 2
    assert row["prefill_mfu"] == pytest.approx(6 * per_request / 0.5 / 2e9)
    entries = 6 * (41 + 42 + 43)  # six requests, three tokens after the first
    read = 6 * step_bytes(llm.model_config, "float32") + 128 * entries
    assert row["decode_mbu"] == pytest.approx(read / 0.25 / 1e9)
    assert step_bytes(llm.model_config, "float32") == 4 * (layers + 8000)


def test_start_to_first_token_counts_from_the_supervisors_note(monkeypatch):
    assert measured(cell())[0]["start_to_first_token_s"] is None
    monkeypatch.setenv(STARTED_VARIABLE, str(time.monotonic() - 5))
    row, llm = measured(cell())
    assert 5 <= row["start_to_first_token_s"] < 60
    assert llm.batches[0][1][0].max_tokens == 1
    assert measured(cell())[0]["start_to_first_token_s"] is None  # a second cell of this process is no start


@pytest.mark.parametrize("seconds, noisy", [([1.0, 1.05], False), ([1.0, 1.5], True)])
def test_repeats_that_differ_much_are_noted(monkeypatch, seconds, noisy):
    rounds = iter(seconds)
    real = cell_module.run_round

    def run_round(llm, batches):
        return dataclasses.replace(real(llm, batches), elapsed_s=next(rounds))

    monkeypatch.setattr(cell_module, "run_round", run_round)
    row, _ = measured(cell())
    assert any(note.startswith("noisy") for note in row["notes"]) == noisy


def test_no_prompt_is_ever_sent_twice_and_every_variant_gets_the_same():
    _, llm = measured(cell())
    _, other = measured(cell("baseline"))
    sent = [tuple(p) for prompts, _ in llm.batches for p in prompts]
    assert len(set(sent)) == len(sent)
    assert sent == [tuple(p) for prompts, _ in other.batches for p in prompts]


def test_clipping_is_said_with_both_lengths():
    row, _ = measured(cell(workload={"name": "synthetic-long", "context": 4096, "output": 128}))
    assert (row["context_requested"], row["context_used"], row["max_model_len"]) == (4096, 3968, 4096)
    assert "context 4096 clipped to 3968" in row["notes"][0]


def test_a_repeated_token_is_recorded_as_shareable():
    workload = {"name": "synthetic-long", "context": 33, "output": 2, "token": "Hello"}
    row, _ = measured(cell(workload=workload))
    assert row["shareable_prefix_tokens"] == 2 * 32 and row["prefix_hit_tokens"] == 0
    assert "'Hello'" in row["text_source"]


def test_plain_streams_instead_of_green_contexts_are_a_recorded_fact():
    row, _ = measured(cell("triad"))
    assert row["greenctx"] and row["greenctx_available"] is False
    assert row["greenctx_reason"] in row["notes"][0] and "CPU" in row["greenctx_reason"]


def test_the_engines_report_of_a_partition_reaches_the_row():
    report = {
        "greenctx_available": True,
        "greenctx_reason": None,
        "greenctx_provider": "torch",
        "greenctx_exclusive": True,
        "greenctx_granted_from": "driver",
        "greenctx_attempts": [{"provider": "torch", "ok": True}],
        "requested_sms": {"compress": 33, "main": 99},
        "granted_sms": {"compress": 40, "main": 92},
    }
    row, _ = measured(cell("greenctx-only", require_greenctx=True), facts={"partition": report})
    assert {name: row[name] for name in report} == report
    plain, _ = measured(cell("baseline"), facts={"partition": report})
    assert plain["greenctx_available"] is None and plain["granted_sms"] is None


def test_required_green_contexts_that_are_not_there_are_unsupported():
    row, llm = measured(cell("triad", require_greenctx=True))
    assert row["status"] == "unsupported" and "require_greenctx" in row["error"]["message"] and llm.closed


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_failure_at_any_time_keeps_the_facts_and_drops_the_numbers(batches):
    row, llm = measured(cell(), fail_at=batches)
    assert row["status"] == "oom" and row["error"] == {"type": "OutOfPages", "message": "too few pages"}
    assert row["device"]["kind"] == "cpu" and row["weights"]["kind"] == "dummy" and row["num_pages"] == 9
    assert row["throughput_tok_s"] is None and llm.closed


@pytest.mark.parametrize(
    "error, status",
    [
        (DeviceOutOfMemory("x"), "oom"),
        (MemoryError(), "oom"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (UnsupportedCombination("x"), "unsupported"),
        (UnsupportedArchitecture("x"), "unsupported"),
        (ValueError("x"), "failed"),
        (RuntimeError("CUDA error: an illegal memory access"), "failed"),
    ],
)
def test_every_error_has_a_status_and_a_valid_row(error, status):
    def make(**options):
        raise error

    assert classify(error) == status
    row = measure_cell(cell(), make)
    VALIDATOR.validate(row)
    assert (
        row["status"] == status and row["error"]["type"] == type(error).__name__ and row["error"]["message"]
    )


def test_a_busy_host_is_noted_where_it_matters():
    assert busy_host({"kind": "cpu"}, 0.0) == [] == busy_host({"kind": "cuda"}, 1e3)
    assert "CPU threads busy" in busy_host({"kind": "cpu"}, 1e3)[0]


def test_the_load_of_others_leaves_out_our_own(monkeypatch):
    clocks = iter([(10.0, 100.0, 5.0), (14.0, 112.0, 9.0), (12.0, 101.0, 7.0), (10.0, 100.0, 5.0)])
    monkeypatch.setattr(OtherLoad, "_clocks", staticmethod(lambda: next(clocks)))
    load = OtherLoad()
    assert load.cores() == 2  # 12 busy seconds in 4, of which 4 were ours
    assert load.cores() == 0  # the system's clock is coarse: it may have seen less than we used
    assert load.cores() == 0  # no time has passed


def test_blank_and_factory_rows_have_the_same_keys():
    assert blank_row(cell()).keys() == factory_row(cell()).keys()


# -- the supervisor, with small programs in place of the measurement -----------------------------------------


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def test_the_childs_row_is_handed_back():
    program = "import json, sys; cell = json.load(open(sys.argv[1])); json.dump(cell, open(sys.argv[2], 'w'))"
    assert run_cell(cell(), python(program)) == json.loads(json.dumps(cell().to_dict()))


@pytest.mark.parametrize(
    "program, words",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os; os.abort()", "SIGABRT"),
        ("raise SystemExit(3)", "code 3"),
        ("pass", "code 0"),
    ],
)
def test_a_child_that_dies_is_a_crashed_row(program, words):
    row = run_cell(cell(), python(program))
    VALIDATOR.validate(row)
    assert row["status"] == "crashed" and words in row["error"]["message"]


def test_a_child_that_hangs_is_ended_with_all_its_helpers(tmp_path):
    note = tmp_path / "pids"
    program = (
        "import os, subprocess, sys, time\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{helper.pid}}')\n"
        "time.sleep(600)"
    )
    row = run_cell(cell(timeout_s=3), python(program))
    VALIDATOR.validate(row)
    assert row["status"] == "timeout" and "3 s" in row["error"]["message"]
    assert not any(running(int(pid)) for pid in note.read_text().split())


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's"
)
def test_a_child_dies_with_its_parent(tmp_path):
    note = tmp_path / "pid"
    child = (
        "import os, time; from fastcache.bench.supervise import die_with_parent; die_with_parent()\n"
        f"open({str(note)!r} + '.tmp', 'w').write(str(os.getpid())); os.rename({str(note)!r} + '.tmp', {str(note)!r})\n"
        "time.sleep(600)"
    )
    values = json.dumps(cell().to_dict())
    program = (
        "import json, sys; from fastcache.bench.cellconfig import CellConfig\n"
        "from fastcache.bench.supervise import run_cell\n"
        f"cell = CellConfig.from_dict(json.loads({values!r}))\n"
        f"run_cell(cell, (sys.executable, '-c', {child!r}))"
    )
    parent = subprocess.Popen(python(program))
    try:
        wait_for(note.exists)
        pid = int(note.read_text())
        assert running(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not running(pid))


def test_a_child_whose_parent_is_gone_already_ends_itself():
    program = "from fastcache.bench.supervise import die_with_parent; die_with_parent(); print('alive')"
    done = subprocess.run(
        python(program), env={**os.environ, PARENT_VARIABLE: "1"}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL and not done.stdout


def test_a_death_is_told_in_words():
    assert "memory runs out" in how_it_died(-9, 1.0) and "SIGSEGV" in how_it_died(-11, 1.0)
    assert "signal 63" in how_it_died(-63, 1.0) or "SIGRT" in how_it_died(-63, 1.0)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# -- provenance ------------------------------------------------------------------------------------------------


def test_the_digest_follows_measured_source_and_nothing_else(tmp_path):
    def digest(**files: str) -> str:
        folder = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source_digest(folder)

    base = digest(engine__a_py="1", bench__table_py="1", cli_bench_py="1")
    assert digest(engine__a_py="1", bench__table_py="2", cli_bench_py="2") == base
    assert digest(engine__a_py="2", bench__table_py="1", cli_bench_py="1") != base
    assert digest(engine__b_py="1", bench__table_py="1", cli_bench_py="1") != base


def test_the_real_digest_covers_the_engine_and_the_measurement():
    names = {file.relative_to(PACKAGE).as_posix() for file in measured_files()}
    assert {"engine/engine.py", "bench/cell.py", "bench/metrics.py", "config.py"} <= names
    assert not {"cli.py", "bench/table.py", "bench/matrix.py"} & names


def test_the_commit_is_that_of_our_own_repository_only(tmp_path):
    package = tmp_path / "site-packages" / "fastcache"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_commit(package) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    git_commit.cache_clear()
    assert git_commit(package) is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "y"], check=True)
    git_commit.cache_clear()
    assert len(git_commit(package)) == 40
    (package / "__init__.py").write_text("changed")
    git_commit.cache_clear()
    assert git_commit(package).endswith("-dirty")

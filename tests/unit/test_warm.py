"""Cells that share a measuring process: what is shared, what is not, and what ends the process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from test_cell import VALIDATOR, cell, running, wait_for

from fastcache.bench import supervise, warm, worker
from fastcache.errors import ConfigError

# Does what the cell says, in place of measuring it.
PROGRAM = """
import os, sys, time
from fastcache.bench import worker

def measure(content, before):
    os.write(2, content["do"].encode())
    if content["do"] == "hang":
        open(content["note"] + ".new", "w").write(str(os.getpid()))
        os.rename(content["note"] + ".new", content["note"])
        time.sleep(600)
    if content["do"] == "die":
        os._exit(3)
    return {"status": content["do"], "pid": os.getpid(), "before": before}

worker.main(sys.argv[1:], measure)
"""
COMMAND = (sys.executable, "-c", PROGRAM)
LONG_S = 60.0


@pytest.fixture(autouse=True)
def own_processes(monkeypatch):
    """No process of another test is found, and none is left."""
    monkeypatch.setenv("FASTCACHE_TEST", uuid.uuid4().hex)
    yield
    for pid, child in list(warm._started.items()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        child.wait()
        del warm._started[pid]


def run(do: str = "ok", device: str = "cpu", keep_s: float = LONG_S, timeout_s: float = LONG_S, note=""):
    return warm.run_kept({"do": do, "device": device, "note": str(note)}, timeout_s, COMMAND, keep_s)


def pid_of_run(**options) -> int:
    row, problem = run(**options)
    assert not problem
    return row["pid"]


def ended(pid: int) -> None:
    wait_for(lambda: not running(pid))


def test_the_next_cell_has_the_same_process_and_a_row_of_its_own():
    first, second = run()[0], run()[0]
    assert first["pid"] == second["pid"] and (first["before"], second["before"]) == (0, 1)


@pytest.mark.parametrize("status", ["failed", "oom"])
def test_a_cell_that_fails_ends_the_process_and_the_next_starts_afresh(status):
    good = pid_of_run()
    row, problem = run(status)
    assert row["status"] == status and row["pid"] == good and not problem
    assert not running(good)
    assert run()[0]["before"] == 0


def test_a_process_that_dies_is_told_by_its_parent():
    run()
    row, problem = run("die")
    assert row is None and problem["status"] == "crashed" and "code 3" in problem["error"]["message"]
    assert run()[0]["before"] == 0


def test_a_process_that_another_cell_started_dies_without_a_code():
    program = (
        "import sys; from fastcache.bench import warm\n"
        f"print(warm.run_kept({{'do': 'ok', 'device': 'cpu'}}, 60, {COMMAND!r}, 60)[0]['pid'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert pid_of_run() == int(done.stdout) and "ok" in done.stderr
    row, problem = run("die")
    assert row is None and "another cell had started" in problem["error"]["message"]
    ended(int(done.stdout))


def test_a_cell_that_hangs_is_ended_in_time(tmp_path):
    run()
    row, problem = run("hang", timeout_s=2, note=tmp_path / "pid")
    assert row is None and problem["status"] == "timeout" and "2 s" in problem["error"]["message"]
    assert not running(int((tmp_path / "pid").read_text()))


def test_a_process_ends_with_the_supervisor_of_its_cell(tmp_path):
    note = tmp_path / "pid"
    program = (
        "from fastcache.bench import warm\n"
        f"warm.run_kept({{'do': 'hang', 'device': 'cpu', 'note': {str(note)!r}}}, 600, {COMMAND!r}, 600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_for(note.exists)
        assert running(int(note.read_text()))
    finally:
        parent.kill()
        parent.wait()
    ended(int(note.read_text()))


def test_a_process_for_which_nobody_comes_ends():
    ended(pid_of_run(keep_s=0.5))


def test_a_process_ends_with_its_run(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as whole:
        monkeypatch.setenv(warm.RUN_VARIABLE, str(whole.pid))
        pid = pid_of_run(keep_s=600)
        assert running(pid)
        whole.kill()
    ended(pid)


def test_another_device_environment_source_or_folder_has_a_process_of_its_own(monkeypatch, tmp_path):
    first = warm.socket_path("cuda", COMMAND)
    assert warm.socket_path("cuda", COMMAND) == first != warm.socket_path("cuda:1", COMMAND)
    monkeypatch.setenv(warm.RUN_VARIABLE, "7")
    assert warm.socket_path("cuda", COMMAND) == first  # says whose a cell is, and decides nothing
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    second = warm.socket_path("cuda", COMMAND)
    monkeypatch.setattr(warm, "source_digest", lambda: "0" * 16)
    third = warm.socket_path("cuda", COMMAND)
    monkeypatch.chdir(tmp_path)
    assert len({first, second, third, warm.socket_path("cuda", COMMAND)}) == 4


def test_the_environment_reaches_the_process(monkeypatch):
    pid = pid_of_run()
    monkeypatch.setenv("FASTCACHE_TEST_OTHER", "1")
    other = pid_of_run()
    assert other != pid
    assert b"FASTCACHE_TEST_OTHER=1" in Path(f"/proc/{other}/environ").read_bytes()


def test_an_idle_process_holds_nothing_of_its_cell_open(tmp_path):
    """Who waits for the end of a pipe does not wait for the next cell; what was said has all arrived."""
    program = (
        "from fastcache.bench import warm\n"
        f"warm.run_kept({{'do': 'ok', 'device': 'cpu'}}, 60, {COMMAND!r}, 600)"
    )
    for _ in range(2):  # the one that starts the process, and one that finds it
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr.endswith("ok")
    pid = pid_of_run()
    assert all(os.readlink(f"/proc/{pid}/fd/{descriptor}") == os.devnull for descriptor in (0, 1, 2))
    os.killpg(pid, signal.SIGKILL)
    ended(pid)


def test_memory_that_stays_taken_ends_a_process():
    gib = 2**30
    assert not worker.leaks(None, None) and not worker.leaks((70 * gib, 0), (70 * gib, 0))
    assert worker.leaks((68 * gib, 0), (70 * gib, 0)) and worker.leaks(
        (70 * gib, 2 * gib), (70 * gib, 2 * gib)
    )


def test_a_process_has_an_end_of_its_cells(monkeypatch):
    few = PROGRAM.replace("worker.main", "worker.MOST_CELLS = 2; worker.main")
    rows = [
        warm.run_kept({"do": "ok", "device": "cpu"}, LONG_S, (sys.executable, "-c", few), LONG_S)[0]
        for _ in range(3)
    ]
    assert [row["before"] for row in rows] == [0, 1, 0]


def test_only_cells_on_a_gpu_share_a_process_and_only_where_it_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        supervise, "run_cell", lambda cell, command, blank, run=None: asked.append((command, run)) or {}
    )
    warm.run_cell(cell(device="cuda"))
    monkeypatch.setenv(warm.KEEP_VARIABLE, "20")
    warm.run_cell(cell(device="cpu"))
    warm.run_cell(cell(device="cuda"))
    (alone, _), (on_cpu, _), (command, kept) = asked
    assert alone == on_cpu == supervise.CHILD and command == warm.WORKER and kept.keywords == {"keep_s": 20.0}


@pytest.mark.parametrize("given", ["soon", "-1", "inf"])
def test_a_time_to_keep_that_is_no_number_of_seconds_is_refused(monkeypatch, given):
    monkeypatch.setenv(warm.KEEP_VARIABLE, given)
    with pytest.raises(ConfigError, match=warm.KEEP_VARIABLE):
        warm.keep_seconds()


# -- real cells -----------------------------------------------------------------------------------------------

# Of a process, a clock, or a host; `decisions` are what a row of triad decided from the times that it measured.
OF_THE_RUN = {
    *(
        "started_at",
        "elapsed_s",
        "throughput_tok_s",
        "prefill_tok_s",
        "decode_tok_s",
        "ttft_s",
        "tpot_s",
        "repeats",
    ),
    *(
        "decisions",
        "stage_s",
        "tpot_quantiles_s",
        "kv_timeline",
        "step_timeline",
        "start_to_first_token_s",
        "process_cells_before",
    ),
    *("ceiling_copy_bytes_s", "ceiling_gemm_flop_s", "prefill_mfu", "decode_mbu", "host_busy", "notes"),
    *(
        "peak_memory_bytes",
        "peak_kv_bytes",
        "pages_freed",
        "steps",
        "compressed_requests",
        "uncompressed_requests",
    ),
    *("kv_len_before", "kv_len_after", "output_sample"),
}
BY_TRIAD = {"peak_kv_bytes", "pages_freed", "steps", "compressed_requests", "uncompressed_requests"} | {
    *("kv_len_before", "kv_len_after", "output_sample")
}


def test_rows_are_those_of_fresh_processes(monkeypatch):
    """Also after another variant, and after a cell that failed: only times differ, and what follows from them."""
    small = {"device": "cpu", "repeats": 1, "batch_size": 2, "timeout_s": 120}
    cells = [
        cell("baseline", **small),
        cell(**small),
        cell("triad", **small),
        cell(**small, num_pages=1),
        cell("baseline", **small),
    ]
    fresh = {each.id: supervise.run_cell(each) for each in cells}
    monkeypatch.setattr(warm, "on_gpu", lambda device: True)
    monkeypatch.setenv(warm.KEEP_VARIABLE, "60")
    before = []
    for each in cells:
        row, alone = warm.run_cell(each), fresh[each.id]
        VALIDATOR.validate(row)
        before.append(row["process_cells_before"])
        assert (row["start_to_first_token_s"] is None) == (before[-1] > 0 or row["status"] != "ok")
        free = OF_THE_RUN - (set() if each.variant == "triad" else BY_TRIAD)
        assert {k: v for k, v in row.items() if k not in free} == {
            k: v for k, v in json.loads(json.dumps(alone)).items() if k not in free
        }
    assert before == [0, 1, 2, 3, 0]
    assert fresh[cells[3].id]["status"] == "oom" and fresh[cells[0].id]["process_cells_before"] == 0

"""What a second run measures again: what is missing, what changed, and never more."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from conftest import ROOT, Workplace
from test_graph import jobs

COPIED = ("envs", "fastcache", "workflow", "report", "config", "Snakefile")


@pytest.fixture
def own_checkout(tmp_path):
    """A copy of the sources that a test may edit."""
    checkout = tmp_path / "checkout"
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        checkout.mkdir(exist_ok=True)
        copy(source, checkout / name)
    shutil.copytree(ROOT / "workflow/profiles", checkout / "profiles")
    folder = tmp_path / "run"
    folder.mkdir()
    place = Workplace(folder, checkout)
    place.configure()
    return place


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_growing_the_grid_measures_the_new_cells_and_a_second_run_nothing(workplace, succeed):
    succeed(workplace.snakemake())
    first = workplace.measured()
    assert len(first) == 2
    assert "Nothing to be done" in succeed(workplace.snakemake())
    workplace.configure(batch_sizes=[1, 2])
    succeed(workplace.snakemake())
    new = workplace.measured()
    assert len(new) == 2 and not set(new) & set(first)
    assert set(workplace.rows()) == {*first, *new}


def test_shrinking_the_grid_measures_nothing_and_drops_the_rows(workplace, succeed):
    workplace.configure(batch_sizes=[1, 2])
    succeed(workplace.snakemake("results/rows.jsonl"))
    workplace.measured()
    workplace.configure(batch_sizes=[2])
    succeed(workplace.snakemake("results/rows.jsonl"))
    assert workplace.measured() == [] and {row["batch_size"] for row in workplace.rows().values()} == {2}


def test_an_edited_engine_is_measured_again_and_an_edited_plot_is_only_drawn_again(own_checkout, succeed):
    place, checkout = own_checkout, own_checkout.checkout
    succeed(place.snakemake())
    assert len(place.measured()) == 2
    append(checkout / "workflow/scripts/plot_latency.py", "\n# another colour\n")
    append(checkout / "fastcache/bench/table.py", "\n# another column\n")
    done = set(jobs(succeed(place.snakemake())))
    assert place.measured() == []
    assert {"plot_latency", "render_report"} <= done and "plot_throughput" not in done
    append(checkout / "fastcache/engine/scheduler.py", "\n# another policy\n")
    succeed(place.snakemake())
    assert len(place.measured()) == 2
    assert len({row["source_digest"] for row in place.rows().values()}) == 1


def test_one_row_can_be_forced(workplace, succeed):
    succeed(workplace.snakemake("results/rows.jsonl"))
    cell = workplace.measured()[0]
    row = f"results/cells/{cell}.json"
    succeed(workplace.snakemake("--forcerun", row, "--", row))
    assert workplace.measured() == [cell]


def test_killing_snakemake_loses_the_running_cell_alone_and_leaves_no_process(workplace, succeed):
    """SIGKILL leaves no chance to clean up: the measurement must notice by itself that nobody waits for it."""
    workplace.configure(batch_sizes=[1, 2, 3], measure={"repeats": 2, "timeout_s": 300})
    run = subprocess.Popen(
        workplace.command(),
        cwd=workplace.folder,
        env=workplace.environment({"b3-compression-only": "hang"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: "b3-compression-only" in started(workplace))
        time.sleep(1)
    finally:
        left = kill_and_wait(run)
    assert left == []
    done = {path.stem for path in (workplace.folder / "results/cells").glob("*.json")}
    workplace.measured()
    assert "its lock is removed" in succeed(workplace.snakemake("results/rows.jsonl"))
    again = set(workplace.measured())
    assert not again & done and len(again | done) == 6
    assert any("b3-compression-only" in cell for cell in again)


def test_the_lock_of_a_living_run_is_respected(workplace):
    """Two runs in one directory would measure each other."""
    workplace.configure(measure={"repeats": 2, "timeout_s": 300})
    run = subprocess.Popen(
        workplace.command("results/rows.jsonl"),
        cwd=workplace.folder,
        env=workplace.environment({"b1-compression-only": "hang"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: "b1-compression-only" in started(workplace))
        second = workplace.snakemake("results/rows.jsonl")
        assert second.returncode != 0 and "cannot be locked" in second.stdout
    finally:
        kill_and_wait(run)


def started(workplace):
    note = workplace.folder / "measured.txt"
    return note.read_text() if note.exists() else ""


def kill_and_wait(run):
    """Kill a run, which has started processes, as nothing else can. Which of those do not end by themselves?

    Not SIGTERM: Snakemake's handler takes a lock that the main thread may hold at that moment, and then waits forever.
    """
    family = psutil.Process(run.pid).children(recursive=True)
    assert family
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until and any(alive(process) for process in family):
        time.sleep(0.1)
    left = [process for process in family if alive(process)]
    for process in left:
        process.kill()
    return left


def alive(process):
    """A zombie is not: who reaps it is the system's affair."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds=60):
    for _ in range(seconds * 10):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")

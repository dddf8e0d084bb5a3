"""Where cells run: one per GPU on a machine with several, and one per job on a cluster."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_token
import progress
import pytest
import yaml
from conftest import MATRIX, ROOT

from fastcache.bench.matrix import expand

FAKE_SLURM = Path(__file__).with_name("fake_slurm")
BIG = {
    "models": {"qwen3-8b": {"load_format": "dummy"}},
    "workloads": [{"name": "synthetic-long", "context": 3900, "output": 130}],
    "batch_sizes": [200],
    "engine": {"device": "cuda"},
}
SLURM = ("--workflow-profile", str(ROOT / "workflow/profiles/slurm"))


def test_each_cell_has_a_gpu_of_its_own(workplace, succeed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake-a,fake-b")
    monkeypatch.setenv("FAKE_TOGETHER", "2")  # the first two end only if they run at once
    workplace.configure(batch_sizes=[1, 2], engine={"device": "cuda"})
    succeed(workplace.snakemake("--resources", "gpu=2", "--", "results/rows.jsonl"))
    assert devices_used_one_cell_at_a_time(workplace) == ["fake-a", "fake-b"]


def devices_used_one_cell_at_a_time(workplace) -> list[str]:
    used = [line.split() for line in (workplace.folder / "devices.txt").read_text().splitlines()]
    spans = sorted((name, float(start), float(end)) for name, start, end in used)
    assert len(spans) == len(workplace.rows())
    for (name, _, end), (other, start, _) in itertools.pairwise(spans):
        assert name != other or end <= start
    return sorted({name for name, *_ in spans})


def test_cells_of_a_run_share_a_process_for_each_gpu_where_the_config_says_so(
    workplace, succeed, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake-a,fake-b")
    monkeypatch.setenv("FAKE_TOGETHER", "2")
    shared = {"engine": {"device": "cuda"}, "machine": {"keep_process_s": 600}}
    workplace.configure(batch_sizes=[1, 2, 3], **shared)
    succeed(workplace.snakemake("--resources", "gpu=2", "--", "results/rows.jsonl"))
    pids, before = zip(
        *(line.split() for line in (workplace.folder / "processes.txt").read_text().splitlines()), strict=True
    )
    assert len(set(pids)) == 2 and before.count("0") == 2 and len(pids) == 6
    assert devices_used_one_cell_at_a_time(workplace) == ["fake-a", "fake-b"]
    assert sorted(row["process_cells_before"] for row in workplace.rows().values()) == sorted(
        map(int, before)
    )
    for log in (workplace.folder / "results/logs/cells").iterdir():
        said = log.read_text()
        assert said.count("said by") == 1 and f"said by {log.stem}\n" in said
    wait_until(lambda: not any(runs(pid) for pid in pids))  # long before ten minutes: their run is over
    assert len(workplace.measured()) == 6
    workplace.configure(batch_sizes=[1, 2, 3], engine={"device": "cuda"})
    succeed(workplace.snakemake("--", "results/rows.jsonl"))
    assert not workplace.measured()  # another time to keep is no reason to measure again


def runs(pid: str) -> bool:
    return Path("/proc", pid).exists() and "State:\tZ" not in Path("/proc", pid, "status").read_text()


def wait_until(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_long_cells_come_first(workplace, succeed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake-a")
    workplace.configure(variants=["baseline"], batch_sizes=[2, 8, 1, 4], engine={"device": "cuda"})
    succeed(workplace.snakemake("--", "results/rows.jsonl"))
    started = (workplace.folder / "measured.txt").read_text().split()
    assert [re.search(r"-b(\d)-", cell)[1] for cell in started] == ["8", "4", "2", "1"]


def test_quality_cells_run_at_once_on_several_gpus(workplace, succeed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake-a,fake-b")
    program = workplace.folder / "quality.py"
    program.write_text(
        "import sys, time; from pathlib import Path\n"
        "note, end = Path('measured.txt'), time.monotonic() + 20\n"
        "note.open('a').write('quality\\n')\n"
        "while len(note.read_text().split()) < 2:\n"
        "    sys.exit(1) if time.monotonic() > end else time.sleep(0.05)\n"
    )
    monkeypatch.setenv("FASTCACHE_QUALITY_COMMAND", f"{sys.executable} {program}")
    (workplace.folder / "model").mkdir()
    (workplace.folder / "model/config.json").write_text("{}")
    quality = {"methods": ["knorm"], "ratios": [0.5], "tasks": [{"name": "needles4"}]}
    workplace.configure(models={"smollm2": {"path": "model"}}, engine={"device": "cuda"}, quality=quality)
    succeed(workplace.snakemake("--resources", "gpu=2", "--", "quality"))
    rows = [json.loads(path.read_text()) for path in (workplace.folder / "results/quality").iterdir()]
    assert len(rows) == 5
    for row in rows:  # a program that leaves no row; 1 would be one that waited in vain
        assert "ended with code 0" in row["error"]["message"]


def test_a_run_that_is_told_to_end_finishes_its_cells_and_goes_on_from_there(workplace, succeed, monkeypatch):
    """As `timeout --foreground` does where a machine is lent for minutes."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake-a,fake-b")
    workplace.configure(batch_sizes=[1, 2, 3], engine={"device": "cuda"}, machine={"keep_process_s": 600})
    note = workplace.folder / "measured.txt"
    note.touch()
    arguments = ("--resources", "gpu=2", "--", "results/rows.jsonl")
    run = subprocess.Popen(
        workplace.command(*arguments),
        cwd=workplace.folder,
        env=workplace.environment({}) | {"FAKE_TOGETHER": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(note.read_text().split()) == 2)
        run.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert run.poll() is None
        with note.open("a") as file:
            file.write("end\n")
        assert run.wait(60) != 0
    finally:
        run.kill()
        run.wait()
    first = set(workplace.measured()) - {"end"}
    assert {path.stem for path in (workplace.folder / "results/cells").iterdir()} == first and len(first) == 2
    assert "its lock is removed" not in succeed(workplace.snakemake(*arguments))
    rows = workplace.rows()
    assert len(rows) == 6 and set(workplace.measured()) == set(rows) - first
    assert all(row["status"] == "ok" for row in rows.values())


def test_a_cell_that_names_its_device_keeps_it(workplace, succeed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "fake-a,fake-b")
    workplace.configure(variants=["baseline"], engine={"device": "cuda:1"})
    succeed(workplace.snakemake("--", "results/rows.jsonl"))
    assert (workplace.folder / "devices.txt").read_text().startswith("fake-a,fake-b ")


def test_a_token_is_given_back_by_a_process_that_is_killed(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; import gpu_token\n"
        "name, token = gpu_token.take(['x'], Path(sys.argv[1])); print(name, flush=True); time.sleep(600)"
    )
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT / "workflow/scripts"), os.environ.get("PYTHONPATH", "")))}
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], env=os.environ | path, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "x\n"
    name, second = gpu_token.take(["x", "y"], tmp_path)
    assert name == "y"
    second.close()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    name, first = gpu_token.take(["x", "y"], tmp_path)
    assert name == "x" and time.monotonic() - started < 5
    first.close()


@pytest.mark.parametrize(
    ("value", "devices"), [("0,3", ["0", "3"]), ("", []), ("GPU-ab, MIG-c", ["GPU-ab", "MIG-c"])]
)
def test_the_devices_are_those_the_user_left_visible(monkeypatch, value, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert gpu_token.visible_devices() == devices


def test_what_fits_is_judged_by_the_machine_and_not_by_the_shipped_config(workplace, succeed):
    paper = str(ROOT / "config/paper.yaml")
    for memory, cells in (("39.4", 114), ("139.8", 159)):  # without and with Qwen3-32B
        (workplace.folder / "machine.yaml").write_text(f"machine: {{memory_gib: {memory}}}\n")
        planned = succeed(workplace.snakemake("--configfile", paper, "machine.yaml", "--dry-run"))
        assert re.search(rf"^measure_cell +{cells}$", planned, re.MULTILINE)


@pytest.mark.parametrize(
    ("device", "given", "reckoned"), [("cuda", 139.8, 139.8), ("cuda", None, 39.4), ("cpu", None, None)]
)
def test_the_estimate_reckons_with_the_configs_memory_or_the_drivers(monkeypatch, device, given, reckoned):
    asked = []
    monkeypatch.setattr(progress, "smallest_gpu_gib", lambda: 39.4)
    monkeypatch.setattr(progress, "estimates", lambda cells, rows, memory: asked.append(memory))
    cells = expand(MATRIX | {"engine": {"device": device}}).cells
    progress.estimate({cell.id: cell for cell in cells}, ROOT, given)
    assert asked == [reckoned]


def test_a_run_is_estimated_for_the_memory_its_config_names(workplace, succeed):
    """Published rows tell an H100's rates; with 40 GiB, fewer of these requests decode at once than with 139."""
    seconds = []
    for memory in (40, 139):
        workplace.configure(**BIG, machine={"memory_gib": memory})
        succeed(workplace.snakemake("--", "results/plan.json"))
        entries = json.loads((workplace.folder / "results/estimate.json").read_text())["cells"].values()
        seconds.append(sum(entry["seconds"] for entry in entries))
    assert seconds[0] > seconds[1]


def test_the_slurm_profile_plans_every_shipped_gpu_config(workplace, succeed):
    (workplace.folder / "config.yaml").write_text((ROOT / "config/paper.yaml").read_text())
    planned = succeed(workplace.snakemake(*SLURM, "--dry-run"))
    assert re.search(r"^measure_cell +159$", planned, re.MULTILINE)
    assert re.search(r"^measure_quality +15$", planned, re.MULTILINE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-ins for SLURM are shell scripts")
def test_a_run_through_the_slurm_executor_asks_for_what_the_profile_says(workplace, succeed, monkeypatch):
    """The real executor plugin, with an sbatch that runs the job at once."""
    place = workplace.folder / "slurm"
    place.mkdir()
    monkeypatch.setenv("FAKE_SLURM", str(place))
    monkeypatch.setenv("PATH", os.pathsep.join((str(FAKE_SLURM), os.environ["PATH"])))
    said = succeed(
        workplace.snakemake(*SLURM, "--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "2")
    )
    assert "Plan: 2 cells to measure, about" in said and " on 8 GPUs." in said
    jobs = [json.loads(line) for line in (place / "jobs.jsonl").read_text().splitlines()]
    assert (
        len(jobs) == 2 == len(workplace.rows())
    )  # the cells alone; tables and figures run where Snakemake does
    for job in jobs:
        assert "--gpus=1" in job and "--cpus-per-task=2" in job  # 8, but for the --cores of these tests
        assert job[job.index("-t") + 1] == str(20 // 60 + 6) and job[job.index("--mem") + 1] == "96000"


def test_what_takes_seconds_is_no_job_of_the_cluster():
    """Every rule is local, or has resources in the profile, or is none but a name for others."""
    rules = "".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))
    local = re.search(r"localrules:\n(.*?)\n\n", (ROOT / "Snakefile").read_text(), re.DOTALL)[1]
    profile = yaml.safe_load((ROOT / "workflow/profiles/slurm/profile.yaml").read_text())
    for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^rule |\Z)", rules, re.DOTALL | re.MULTILINE):
        if "shell:" in body and "localrule: True" not in body:
            assert f"    {name}," in f"{local}\n" or name in profile["set-resources"], name


def test_the_slurm_profile_speaks_of_rules_that_exist():
    profile = yaml.safe_load((ROOT / "workflow/profiles/slurm/profile.yaml").read_text())
    rules = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    for name in {*profile["set-resources"], *profile["set-threads"]}:
        assert f"rule {name}:" in rules or f" as {name} with:" in rules
    pins = (ROOT / "envs/slurm.txt").read_text().splitlines()
    assert {p for p in pins if not p.startswith("#")} <= set((ROOT / "envs/dev.txt").read_text().splitlines())

"""The sweep's figures from rows, the works it times, and the one-call proof's handling of steps that fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def row(
    mode: str, work: str, side: str, sms: int, rate: float, makespan: float, partner: str | None = None
) -> dict:
    measured = {"rate": rate, "makespan_ms": makespan}
    return {"mode": mode, "work": work, "side": side, "sms": sms, "partner": partner} | measured


ROWS = [
    *(row("alone", work, "whole", 132, 100.0, 10.0) for work in ("prefill", "decode", "compress")),
    *(row("alone", work, "main", 104, 80.0, 12.0) for work in ("prefill", "decode", "compress")),
    *(row("alone", work, "compress", 28, 25.0, 40.0) for work in ("prefill", "decode", "compress")),
    row("sequential", "prefill", "whole", 132, 50.0, 20.0, "compress"),
    row("plain_streams", "prefill", "whole", 132, 55.0, 19.0, "compress"),
    row("sequential", "decode", "whole", 132, 50.0, 21.0, "compress"),
    row("plain_streams", "decode", "whole", 132, 55.0, 18.0, "compress"),
    row("together", "prefill", "main", 104, 70.0, 17.0, "compress"),
    row("together", "compress", "compress", 28, 20.0, 17.0, "prefill"),
    row("together", "decode", "main", 104, 70.0, 16.0, "compress"),
    row("together", "compress", "compress", 28, 20.0, 16.0, "decode"),
]


def test_figures_read_the_rows() -> None:
    plot = load("plot_sm_sweep")
    assert plot.rates(ROWS, "decode") == [(28, 0.25), (104, 0.8), (132, 1.0)]
    assert plot.pairs(ROWS) == [("prefill", "compress"), ("decode", "compress")]
    assert plot.makespans(ROWS, "prefill", "compress") == [(28, 17.0)]
    assert plot.control(ROWS, "plain_streams", "decode", "compress") == 18.0


def test_figures_are_drawn_the_same_twice(tmp_path: Path) -> None:
    plot = load("plot_sm_sweep")
    sweep = tmp_path / "sm_sweep.json"
    sweep.write_text(json.dumps({"rows": ROWS, "device": {"sm_count": 132}}))
    for folder in ("a", "b"):
        assert plot.main([str(sweep), "--output", str(tmp_path / folder)]) == 0
    for name in ("sm_rate.svg", "sm_makespan.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"plain streams" in (tmp_path / "a" / "sm_makespan.svg").read_bytes()


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_file_that_is_no_sweep(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture) -> None:
    sweep = tmp_path / "sm_sweep.json"
    if content is not None:
        sweep.write_text(content)
    assert load("plot_sm_sweep").main([str(sweep), "--output", str(tmp_path)]) == 2
    assert "not a sweep" in capsys.readouterr().err


def test_the_works_run_and_count_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    sweep = load("sm_sweep")
    for name, value in (("DECODE_BATCH", 2), ("COMPRESS_BATCH", 2), ("CONTEXT", 128), ("PREFILL_TOKENS", 4)):
        monkeypatch.setattr(sweep, name, value)
    works = sweep.works(torch.device("cpu"))
    assert list(works) == ["prefill", "decode", "compress"]
    works["compress"].run()
    assert works["decode"].amount == pytest.approx(12 * 2 * (2 * 8 * 128 * 128 * 2) / 1e12)
    assert works["prefill"].amount == pytest.approx(8 * 2 * 4 * 4096 * 24576 / 1e12)


def test_without_a_gpu_the_sweep_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert load("sm_sweep").main(["--output", str(tmp_path)]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    prove = load("prove_greenctx")
    bad = prove.step("bad", [sys.executable, "-c", "raise SystemExit('no such thing')"], str(tmp_path), None)
    dead = prove.step("dead", [sys.executable, "-c", "import os; os.abort()"], str(tmp_path), None)
    good = prove.step("good", [sys.executable, "-c", "print('one'); print('two')"], str(tmp_path), None)
    assert (bad["exit"], bad["last_line"]) == (1, "no such thing")
    assert dead["exit"] == -6 and (good["exit"], good["last_line"]) == (0, "two")


def test_every_proof_asked_for_is_one_that_can_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastcache.device import probe_logic

    prove = load("prove_greenctx")
    asked = []

    def step(name: str, command: list[str], cache: str, *_: object, **__: object) -> dict:
        asked.append((name, command))
        if name == "shim":  # what a built shim leaves behind
            for left in ("shim.json", "sgl_kernel_shim.so"):
                (Path(cache) / left).write_text("{}")
        return {"name": name, "exit": 0, "seconds": 0.0, "last_line": "", "stderr": ""}

    monkeypatch.setattr(prove, "step", step)
    site = str(tmp_path)
    assert prove.main(["--output", str(tmp_path / "out"), "--site", site, "--shim-site", site]) == 0
    proofs = {name: command for name, command in asked if "prove-greenctx" in command}
    assert set(proofs) == {"chain", "chain with the shim", "chain with LD_PRELOAD"}
    kept = {Path(command[command.index("--output") + 1]) for command in proofs.values()}
    assert len(kept) == 3 and {path.parent for path in kept} == {tmp_path / "out"}
    changes = [int(c[c.index("--changes") + 1]) for c in proofs.values() if "--changes" in c]
    assert len(changes) == 2 and min(changes) >= probe_logic.MIN_SAMPLES


def test_published_records_name_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove = load("prove_greenctx")
    failed = {"name": "a", "exit": 1, "seconds": 0.0, "last_line": "", "stderr": f'File "{prove.ROOT}/x.py"'}
    monkeypatch.setattr(prove, "run_steps", lambda _: [failed])
    assert prove.main(["--output", str(tmp_path)]) == 1
    (step,) = json.loads((tmp_path / "steps.json").read_text())
    assert step["stderr"] == 'File "x.py"'

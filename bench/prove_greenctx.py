"""Everything a GPU can prove about green contexts, in one call: chain, providers one by one, shim, sweep.

    python bench/prove_greenctx.py --output results/greenctx [--site FOLDER --shim-site FOLDER]

`--site` is a folder with an sgl_kernel that fits the installed torch, `--shim-site` one with an sgl_kernel that
needs the shim; both may hold only spatial_ops and version.py (about 90 KB), and the provider that imports the whole
package is then left out. Every step runs in a process of its
own, because an operator once registered stays, and a step that fails keeps no other from running. Writes
doctor.json, shim.json, greenctx.json, greenctx-shim.json, greenctx-preload.json, providers.json, sm_sweep.csv,
sm_sweep.json and steps.json, with paths inside the checkout written relative to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcache.device import sgl_install

ROOT = Path(__file__).resolve().parents[1]
CLI = "import sys; from fastcache.cli import main; sys.exit(main(sys.argv[1:]))"
# (compress, main) SMs of a 132-SM device: aligned, unaligned, halves, the extremes, and one with idle SMs.
ASKED = ((28, 104), (20, 112), (32, 100), (66, 66), (4, 128), (8, 124), (32, 64))
PAIRS = 30
STEP_TIMEOUT_S = 150


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the records")
    parser.add_argument("--site", type=Path, help="folder holding an sgl_kernel that fits this torch")
    parser.add_argument("--shim-site", type=Path, help="folder holding an sgl_kernel that needs the shim")
    parser.add_argument("--provider", help="internal: examine one provider and write --output as a file")
    options = parser.parse_args(arguments)
    if options.provider:
        options.output.write_text(json.dumps(examine(options.provider)))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    steps = run_steps(options)
    (options.output / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
    for record in options.output.glob("*.json"):
        record.write_text(record.read_text().replace(f"{ROOT}/", ""))
    for step in steps:
        sys.stdout.write(
            f"{step['name']:<28} exit {step['exit']!s:>4} {step['seconds']:6.1f} s  {step['last_line']}\n"
        )
    return 0 if all(step["exit"] == 0 for step in steps) else 1


def run_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    out, site, shim_site = options.output, options.site, options.shim_site
    with tempfile.TemporaryDirectory() as cache:
        steps = [step("chain", cli("prove-greenctx", "--output", out / "greenctx.json"), cache, site)]
        if shim_site:
            record = Path(cache) / "shim.json"  # its folder also takes the library, which is not a record
            steps.append(step("shim", cli("shim", "--output", record), cache, shim_site))
            if record.is_file():
                shutil.copy(record, out)
            proof = cli("prove-greenctx", "--output", out / "greenctx-shim.json", "--changes", "200")
            steps.append(step("chain with the shim", proof, cache, shim_site))
            library = record.with_name("sgl_kernel_shim.so")
            if library.is_file():
                again = cli("prove-greenctx", "--output", out / "greenctx-preload.json", "--changes", "20")
                steps.append(step("chain with LD_PRELOAD", again, cache, shim_site, LD_PRELOAD=str(library)))
        steps += provider_steps(out, cache, site, shim_site)
        sweep = [sys.executable, str(ROOT / "bench" / "sm_sweep.py"), "--output", str(out)]
        steps.append(step("sweep", sweep, cache, site))
        steps.append(step("doctor", cli("doctor", "--json"), cache, site, stdout=out / "doctor.json"))
    return steps


def provider_steps(out: Path, cache: str, site: Path | None, shim_site: Path | None) -> list[dict[str, Any]]:
    """Each provider by itself; their records together in providers.json."""
    steps, records = [], {}
    found = sgl_install.find([str(site)]) if site else None
    for name, where in (
        ("sgl_kernel", site if found and found.complete else None),
        ("sgl_kernel:spatial_ops", site),
        ("sgl_kernel:spatial_ops+shim", shim_site),
        ("cuda_bindings", None),
        ("torch_green", None),
    ):
        if where is None and name.startswith("sgl"):
            continue
        record = Path(cache) / "provider.json"
        record.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__)), "--provider", name, "--output", str(record)]
        steps.append(step(f"provider {name}", command, cache, where))
        if record.is_file():
            records[name] = json.loads(record.read_text())
    (out / "providers.json").write_text(json.dumps(records, indent=1) + "\n")
    return steps


def cli(*arguments: Any) -> list[str]:
    return [sys.executable, "-c", CLI, *map(str, arguments)]


def step(
    name: str, command: list[str], cache: str, site: Path | None, stdout: Path | None = None, **variables: str
) -> dict[str, Any]:
    """Run one step and describe how it went."""
    path = [str(ROOT), *([str(site.resolve())] if site else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "FASTCACHE_CACHE": cache}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
        code, text, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, text, errors = None, "", f"did not end in {STEP_TIMEOUT_S} s"
    if stdout is not None:
        stdout.write_text(text)
        text = json.loads(text)["headline"] if code == 0 else text
    lines = [line for line in (text + "\n" + errors if code else text).splitlines() if line.strip()]
    seconds = time.monotonic() - began
    return {
        "name": name,
        "exit": code,
        "seconds": seconds,
        "last_line": lines[-1] if lines else "",
        "stderr": errors[-4000:],
    }


def examine(name: str) -> dict[str, Any]:
    """One provider on this GPU: granted counts, SM ids and capacity for each split asked, and what a pair costs."""
    import torch

    from fastcache.device import green_context
    from fastcache.device.probe import Probe
    from fastcache.device.providers.base import ProviderError

    torch.cuda.init()
    provider = next(each for each in green_context.PROVIDERS if each.name == name)
    probe, total = Probe(0), green_context.device_sms(0).total
    splits = []
    for compress, main_sms in ASKED:
        try:
            splits.append(examine_split(provider, probe, total, compress, main_sms))
        except ProviderError as error:
            splits.append({"asked": [main_sms, compress], "kind": error.kind, "cause": str(error)})
    try:
        cost = pair_cost(provider, total)
    except ProviderError as error:
        cost = {"kind": error.kind, "cause": str(error)}
    return {"provider": name, "splits": splits, "cost": cost}


def examine_split(provider: Any, probe: Any, total: int, compress: int, main_sms: int) -> dict[str, Any]:
    """The request goes to the provider as it is, unrounded: what the driver makes of it is the question."""
    from fastcache.device.sms import SmSplit

    pair = provider.create(0, SmSplit(total, main_sms, compress, main_sms, compress, "main"))
    record = {"asked": [main_sms, compress], "granted": [pair.granted_main, pair.granted_compress]}
    seen = {}
    for side in ("main", "compress"):
        if (stream := getattr(pair, side)) is None:
            continue
        sample = probe.measure(stream, total)
        seen[side] = sample.ids
        count = len(sample.ids)
        walls = [probe.measure(stream, blocks).wall_us for blocks in (count, count + 1)]
        record[side] = {
            "ids": sorted(sample.ids),
            "count": count,
            "wall_us": walls[0],
            "wall_one_more_us": walls[1],
        }
    if len(seen) == 2:
        record["overlap"] = sorted(seen["main"] & seen["compress"])
    return record


def pair_cost(provider: Any, total: int) -> dict[str, Any]:
    """Free memory and time for PAIRS pairs made and, where the provider can, destroyed again in order."""
    import torch

    from fastcache.device.sms import SmSplit

    split = SmSplit(total, 104, 28, 104, total - 104, "main")
    torch.cuda.synchronize()
    free, began = [torch.cuda.mem_get_info()[0]], time.perf_counter()
    pairs = [provider.create(0, split) for _ in range(PAIRS)]
    torch.cuda.synchronize()
    made = time.perf_counter()
    free.append(torch.cuda.mem_get_info()[0])
    for pair in pairs:
        provider.destroy(pair)
    torch.cuda.synchronize()
    free.append(torch.cuda.mem_get_info()[0])
    return {
        "pairs": PAIRS,
        "free_bytes_before": free[0],
        "free_bytes_made": free[1],
        "free_bytes_destroyed": free[2],
        "bytes_per_pair": (free[0] - free[1]) / PAIRS,
        "bytes_per_pair_not_given_back": (free[0] - free[2]) / PAIRS,
        "ms_per_pair": (made - began) * 1e3 / PAIRS,
        "ms_per_teardown": (time.perf_counter() - made) * 1e3 / PAIRS,
    }


if __name__ == "__main__":
    sys.exit(main())

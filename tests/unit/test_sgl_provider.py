"""The three ways to sgl_kernel's operator, with a stand-in wheel on a torch without CUDA. Each in its own process:
an operator that was registered once stays for good."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from native import stand_ins

from fastcache.device.providers import sgl
from fastcache.device.providers.base import ProviderError
from fastcache.device.sms import DeviceSms, plan_split

pytestmark = pytest.mark.slow

# A torch that looks like a CUDA build with one GPU, as far as these providers ask.
PRELUDE = """
import dataclasses, json, sys
import torch
from fastcache.device import shim_plan
from fastcache.device.providers import sgl
from fastcache.device.providers.base import ProviderError
from fastcache.device.sms import DeviceSms, plan_split
facts = dataclasses.replace(shim_plan.torch_facts(), cuda="13.0")
sgl.torch_facts = lambda: facts
torch.cuda.init = lambda: None
torch.cuda.ExternalStream = lambda pointer, device: pointer
def create(provider, compress=0.2):
    try:
        pair = provider.create(0, plan_split(DeviceSms(132, 8, 8), compress, 1 - compress))
        return {"main": [pair.main, pair.granted_main], "compress": [pair.compress, pair.granted_compress]}
    except ProviderError as error:
        return {"kind": error.kind, "cause": str(error)}
def show(*values): print(json.dumps(values))
"""
INIT = "from . import spatial\n"
SPATIAL = """
try:
    from . import spatial_ops
except Exception as error:
    _spatial_import_error = error
else:
    _spatial_import_error = None
"""


@pytest.fixture
def site(tmp_path: Path):
    """`site(kind, files)` installs a wheel into a fresh folder and returns what runs code beside it."""

    def install(kind: str | None, **files: str):
        folder = tmp_path / "site" / "sgl_kernel"
        folder.mkdir(parents=True)
        if kind:
            (folder / "spatial_ops.abi3.so").write_bytes(stand_ins()[kind].read_bytes())
        (folder / "version.py").write_text('__version__ = "0.4.2"\n')
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return lambda code: run(code, folder.parent, tmp_path / "cache")

    return install


def run(code: str, path: Path, cache: Path) -> list:
    environment = os.environ | {"PYTHONPATH": str(path), "FASTCACHE_CACHE": str(cache)}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_not_installed(tmp_path: Path) -> None:
    answers = run("show(*[create(p) for p in (sgl.PACKAGE, sgl.SPATIAL, sgl.SHIMMED)])", tmp_path, tmp_path)
    assert [answer["kind"] for answer in answers] == ["not_installed"] * 3


def test_the_library_alone_gives_granted_counts_from_the_op(site) -> None:
    python = site("fitting", spatial=SPATIAL)
    package, shimmed, alone, other = python(
        "show(create(sgl.PACKAGE), create(sgl.SHIMMED), create(sgl.SPATIAL), create(sgl.SPATIAL, 0.12))"
    )
    assert package["kind"] == "incomplete_install" and shimmed["kind"] == "shim_not_needed"
    assert alone == {"main": [1000, 104], "compress": [2000, 28]}
    assert other == {"main": [2000, 116], "compress": [1000, 16]}, (
        "the group is the first stream, whoever's it is"
    )


def test_every_split_of_a_process_records_the_same_way(site) -> None:
    python = site("fitting", spatial=SPATIAL)
    first, second = python(
        "from fastcache.device import green_context\n"
        "chain = (sgl.PACKAGE, sgl.SPATIAL)\n"
        "split = [plan_split(DeviceSms(132, 8, 8), ratio, 1 - ratio) for ratio in (0.2, 0.12)]\n"
        "show(*[green_context.try_providers(0, each, chain)[2] for each in split])"
    )
    assert first == second and [attempt["ok"] for attempt in first] == [False, True]


def test_the_whole_package(site) -> None:
    python = site("fitting", __init__=INIT, spatial=SPATIAL)
    assert python("show(create(sgl.PACKAGE), 'sgl_kernel' in sys.modules)") == [
        {"main": [1000, 104], "compress": [2000, 28]},
        True,
    ]


def test_another_torchs_library_needs_the_shim(site) -> None:
    python = site("foreign", __init__=INIT, spatial=SPATIAL)
    package, alone, shimmed = python("show(*[create(p) for p in (sgl.PACKAGE, sgl.SPATIAL, sgl.SHIMMED)])")
    assert package["kind"] == alone["kind"] == "abi_forwardable" and "_def" in alone["cause"]
    assert shimmed == {"main": [1000, 104], "compress": [2000, 28]}


def test_an_operator_that_is_there_is_not_loaded_again(site) -> None:
    python = site("fitting", __init__=INIT, spatial=SPATIAL)
    unloadable = "first = create(sgl.SPATIAL)\nsgl.SPATIAL._load = sgl.PACKAGE._load = None\n"
    assert python(unloadable + "show(first == create(sgl.PACKAGE))") == [True]


@pytest.mark.parametrize(
    ("body", "kind", "cause"),
    [
        ("raise OSError('libnuma.so.1: cannot open shared object file')\n", "missing_system_lib", "libnuma"),
        ("import os\nos.abort()\n", "trial_failed", "SIGABRT"),
    ],
)
def test_a_package_that_does_not_import_is_refused_and_leaves_nothing(
    site, body: str, kind: str, cause: str
) -> None:
    python = site("fitting", __init__=body, spatial=SPATIAL)
    package, left, alone = python(
        "show(create(sgl.PACKAGE), 'sgl_kernel' in sys.modules, create(sgl.SPATIAL))"
    )
    assert package["kind"] == kind and cause in package["cause"] and not left
    assert alone["main"] == [1000, 104]


def test_an_import_error_hidden_by_the_wrapper_is_found(site) -> None:
    python = site(
        "fitting",
        __init__=INIT,
        spatial="_spatial_import_error = OSError('libcuda.so.1: cannot open shared object file')\n",
    )
    (package,) = python("show(create(sgl.PACKAGE))")
    assert package["kind"] == "no_driver"


def test_the_operators_own_refusal_is_a_driver_error(site) -> None:
    python = site("fitting", spatial=SPATIAL)
    code = "from fastcache.device.sms import SmSplit\nplan_split = lambda *_: SmSplit(132, 100, 90, 104, 96, 'main')\n"
    (answer,) = python(code + "show(create(sgl.SPATIAL))")
    assert answer["kind"] == "driver_error" and "Not enough SMs" in answer["cause"]


def test_a_folder_without_the_library(site) -> None:
    (answer,) = site(None)("show(create(sgl.SPATIAL))")
    assert answer["kind"] == "incomplete_install"


def test_a_provider_that_cannot_load_keeps_nothing_of_its_callers(monkeypatch):
    """Its failure is remembered for the process; an error with its traceback would keep a whole engine."""

    def load() -> None:
        raise ProviderError("not_installed", "it is not there")

    def call() -> weakref.ref[sgl.SglProvider]:
        model = sgl.SglProvider("anything that only this frame holds", load)
        with pytest.raises(ProviderError, match="it is not there"):
            provider.create(0, plan_split(DeviceSms(132, 8, 8), 0.125, 0.875))
        return weakref.ref(model)

    monkeypatch.setattr(sgl, "operator_registered", lambda: False)
    provider = sgl.SglProvider("absent", load)
    held = [call(), call()]
    gc.collect()
    assert [reference() for reference in held] == [None, None]

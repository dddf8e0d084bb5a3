"""The operator of the published wheels on this torch, over the fake driver: downloads, so by night only.

A CPU build of torch lacks CUDA's libraries, which the wheel names as needed; empty ones stand in for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from native import compile_c, fake_driver
from symbol_tables import LIBRARIES, SGL, download

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

CUDART = """
void** __cudaRegisterFatBinary(void* f) { static void* handle; (void)f; return &handle; }
void __cudaRegisterFatBinaryEnd(void** h) { (void)h; }
void __cudaRegisterVar(void** h) { (void)h; }
void __cudaUnregisterFatBinary(void** h) { (void)h; }
"""
EMPTY = ("libnvrtc.so.13", "libc10_cuda.so", "libtorch_cuda.so")
CODE = """
import ctypes, dataclasses, json, torch
from fastcache.device import sgl_install, shim, trial
from fastcache.device.shim_plan import plan, torch_facts
install = sgl_install.find()
made = plan(install, dataclasses.replace(torch_facts(), cuda="13.0"))
if made.status == "needed":
    library = shim.build(made)
    assert trial.load_spatial(install.spatial) is not None, "it loads without the shim"
    assert trial.load_spatial(install.spatial, library) is None
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(str(install.spatial))
op = torch.ops.sgl_kernel.create_greenctx_stream_by_value
results = [[int(x) for x in op(*asked, 0)[2:]] for asked in ((104, 28), (100, 32), (66, 66), (8, 124))]
print(json.dumps([made.status, str(op.default._schema), results]))
"""
SCHEMA = "sgl_kernel::create_greenctx_stream_by_value(int smA, int smB, int device) -> int[]"


@pytest.mark.parametrize("version", [version for version in SGL if version.startswith("0.4")])
def test_the_real_operator_with_the_shim_it_needs(version: str, tmp_path: Path) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch brings libraries that the stand-ins would hide")
    site, libraries, log = tmp_path / "site", tmp_path / "lib", tmp_path / "calls.log"
    with zipfile.ZipFile(download(f"{SGL[version]}=={version}", tmp_path)) as wheel:
        for member in (LIBRARIES["spatial_ops"], "sgl_kernel/spatial.py", "sgl_kernel/version.py"):
            wheel.extract(member, site)
    fake_driver(libraries)
    versions = libraries / "cudart.map"
    versions.write_text("libcudart.so.13 { global: *; };\n")
    compile_c(
        CUDART,
        libraries / "libcudart.so.13",
        "-Wl,-soname,libcudart.so.13",
        f"-Wl,--version-script={versions}",
    )
    for name in EMPTY:
        compile_c("", libraries / name, f"-Wl,-soname,{name}")
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "LD_LIBRARY_PATH": str(libraries),
        "FASTCACHE_CACHE": str(tmp_path / "cache"),
        "FAKE_CUDA_LOG": str(log),
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    status, schema, granted = json.loads(done.stdout.splitlines()[-1])
    assert schema == SCHEMA and granted == [[104, 28], [104, 28], [72, 60], [8, 124]]
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
    assert status == ("needed" if (version == "0.4.2") == newer else "not needed")
    destroyed = [line for line in log.read_text().splitlines() if "Destroy" in line]
    assert len(destroyed) == 4, "the operator destroys its outer context and neither of the two it returns"

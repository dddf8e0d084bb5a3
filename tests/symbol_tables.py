"""Symbol tables of the published sgl_kernel and torch wheels: recorded small, and re-read from PyPI by night.

`python tests/symbol_tables.py` downloads the wheels again (about 4.5 GB, one at a time) and rewrites
`tests/data/shim_symbols.json`; the test of the same name marked `network` compares instead of writing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastcache.device import elf
from fastcache.device.shim_symbols import BLAS_HANDLE, CHECKS, ONE_WAY, SPELLINGS

RECORDED = Path(__file__).parent / "data" / "shim_symbols.json"
SGL = {"0.3.21": "sgl-kernel", "0.4.2": "sglang-kernel", "0.4.10": "sglang-kernel"}
TORCH = ("2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1")
LIBRARIES = {
    "spatial_ops": "sgl_kernel/spatial_ops.abi3.so",
    "common_ops": "sgl_kernel/sm90/common_ops.abi3.so",
}
OF_TORCH = re.compile(r"^_Z.*(?<![0-9])(?:3c10|2at|5torch|6caffe2)")
TORCH_LIBRARY = re.compile(
    r"torch/lib/lib(c10|c10_cuda|torch|torch_cpu|torch_cuda|torch_cuda_linalg|torch_python)\.so"
)
TAG_HEADER = re.compile(r"enum class Tag \{(.*?)\}", re.S)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")
# Names a forwarder may call: whether a torch exports them must be recorded too.
TARGETS = {name for _, names in SPELLINGS for name in names} | {target for _, _, target in ONE_WAY}
assert {*CHECKS, BLAS_HANDLE + "Eb"} <= TARGETS


def download(requirement: str, folder: Path) -> Path:
    """The manylinux x86-64 wheel of `requirement` for Python 3.12, without its dependencies."""
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--abi", "abi3", "--abi", "cp312"]
    command += ["--index-url", "https://pypi.org/simple", *platforms, "-d", str(folder), requirement]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def sgl_undefined(version: str) -> dict[str, list[str]]:
    """Library name -> the torch symbols it leaves undefined."""
    with tempfile.TemporaryDirectory() as name:
        with zipfile.ZipFile(download(f"{SGL[version]}=={version}", Path(name))) as wheel:
            paths = {library: Path(wheel.extract(member, name)) for library, member in LIBRARIES.items()}
        return {
            library: sorted(s for s in elf.read(path).undefined if OF_TORCH.search(s))
            for library, path in paths.items()
        }


def torch_facts(version: str, wanted: set[str]) -> dict[str, list[str]]:
    """Which of `wanted` this torch does not export, and its operator tags in order."""
    exported, tags = set(), []
    with (
        tempfile.TemporaryDirectory() as name,
        zipfile.ZipFile(download(f"torch=={version}", Path(name))) as wheel,
    ):
        for member in wheel.namelist():
            if TORCH_LIBRARY.fullmatch(member):
                library = Path(wheel.extract(member, name))
                exported |= elf.read(library).exported
                library.unlink()
            elif member.endswith("core/enum_tag.h") and (
                found := TAG_HEADER.search(wheel.read(member).decode())
            ):
                listed = [tag.strip() for tag in found[1].split(",") if tag.strip()]
                tags = tags if any("$" in tag or "/" in tag for tag in listed) else listed
    return {"absent": sorted(wanted - exported), "tags": tags}


def read_all() -> dict:
    sgl = {version: sgl_undefined(version) for version in SGL}
    wanted = TARGETS.union(*(names for libraries in sgl.values() for names in libraries.values()))
    return {"sgl": sgl, "torch": {version: torch_facts(version, wanted) for version in TORCH}}


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(read_all(), indent=1) + "\n")

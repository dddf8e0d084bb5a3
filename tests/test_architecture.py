"""The shape of the source, checked: who may import whom, how large a unit is, and what is never done."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastcache"

# Who may import whom, by the package's top-level names. `LLM` stands for the lazy name of the package itself.
GROUND = {"config", "core", "errors", "results", "stats"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "core": GROUND,
    "results": set(),
    "stats": {"core"},
    "tokenizer": GROUND,
    "shapes": GROUND,
    "device": GROUND,
    "kvcache": GROUND,
    "attention": GROUND | {"device", "kvcache"},
    "models": GROUND | {"attention", "device", "kvcache", "tokenizer"},
    "compression": GROUND,
    "engine": GROUND | {"attention", "compression", "device", "kvcache", "models", "tokenizer"},
    # Gradients need the model's own modules and the methods' arithmetic, but neither pages nor a scheduler.
    "training": GROUND | {"compression", "engine", "models", "shapes", "tokenizer"},
    "bench": GROUND | {"LLM", "compression", "device", "shapes"},
    "serving": GROUND | {"LLM"},
    "cli": GROUND | {"LLM", "bench", "compression", "device", "models", "serving", "training"},
    "__init__": {"config", "engine"},
}
# These see pages as well as tensors; a method and its kernels never do.
WITH_PAGES = {
    f"compression/{name}.py"
    for name in (
        *("repack", "repack_triton", "repack_heads_triton", "work", "layer", "layer_transform"),
        *("cost", "cost_inputs"),
    )
}
# What a cell weighs and takes is counted from its model's shapes, before anything is loaded.
WITH_SHAPES = {"bench/fits.py"}
# The workflow's scripts may use what imports no torch, and otherwise the command line as a process.
FOR_THE_WORKFLOW = {
    "bench.estimate",
    "bench.matrix",
    "bench.row",
    "bench.table",
    "bench.provenance",
    "bench.serving.cells",
    "bench.serving.row",
    "bench.quality.cells",
    "bench.quality.row",
    "config",
    "errors",
}
TORCH_FREE = ("", ".cli", *(f".{name}" for name in sorted(FOR_THE_WORKFLOW)))

# About 250 lines a file and 40 a function; a tenth more is still "about". Named here is what may be longer, and why.
FILE_LINES, FUNCTION_LINES = 275, 45
LONGER = {
    "fastcache/engine/build.py:build": "one constructor call after another, nothing to decide",
    "fastcache/compression/expected_attention_triton.py:_logits_kernel": "one kernel, a third of it arguments",
    "fastcache/compression/observe_triton.py:_moments_kernel": "one kernel, and a third of it stores four blocks",
    "fastcache/models/ops_triton.py:_norm_rope_kernel": "one kernel: a third of it is the list of its arguments",
    "fastcache/attention/ragged_triton.py:_attend_kernel": "one kernel: half of it is the list of its arguments",
    "fastcache/compression/repack_heads_triton.py:_repack_kernel": "one kernel, half of it arguments",
    "fastcache/compression/merge_triton.py:_merge_kernel": "one kernel: three layers, and a third of it arguments",
    "fastcache/compression/repack_triton.py:_repack_kernel": "one kernel, half of it arguments",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, without the package's name; `LLM` for the package itself."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] or "LLM" for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and is_ours(node.module or ""):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                is_module = (ROOT / (module.replace(".", "/") + ".py")).exists() or (
                    ROOT / module.replace(".", "/")
                ).is_dir()
                inside = (module if is_module else node.module or "").partition(".")[2]
                if inside or alias.name != "__version__":
                    yield inside or "LLM"


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "fastcache"


def layer(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if first.startswith("cli") else first


@pytest.mark.parametrize("path", sources("fastcache"), ids=name)
def test_imports_point_one_way(path):
    own = layer(path)
    allowed = ALLOWED[own] | {own}
    if path.relative_to(PACKAGE).as_posix() in WITH_PAGES:
        allowed |= {"kvcache", "device"}
    if path.relative_to(PACKAGE).as_posix() in WITH_SHAPES:
        allowed |= {"models"}
    used = {module.split(".")[0] for module in imported(path)}
    used = {"cli" if module.startswith("cli") else module for module in used}
    assert used <= allowed, f"{name(path)} must not import {sorted(used - allowed)}"


@pytest.mark.parametrize("path", sources("workflow"), ids=name)
def test_the_workflow_touches_only_what_is_free_of_torch(path):
    assert set(imported(path)) <= FOR_THE_WORKFLOW
    modules = {n.name for node in ast.walk(tree(path)) if isinstance(node, ast.Import) for n in node.names}
    assert "torch" not in {module.split(".")[0] for module in modules}


def test_planning_imports_no_torch():
    modules = ", ".join(f"fastcache{module}" for module in TORCH_FREE)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sources("fastcache", "workflow", "bench"), ids=name)
def test_units_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES or name(path) in LONGER, f"{name(path)} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            where = f"{name(path)}:{node.name}"
            assert length <= FUNCTION_LINES or where in LONGER, f"{where} has {length} lines"


def test_no_exception_to_the_sizes_outlives_its_cause():
    for where in LONGER:
        file, _, function = where.partition(":")
        assert (ROOT / file).is_file(), where
        if function:
            defined = [
                n
                for n in ast.walk(tree(ROOT / file))
                if isinstance(n, ast.FunctionDef) and n.name == function
            ]
            assert any(n.end_lineno - n.lineno + 1 > FUNCTION_LINES for n in defined), where


@pytest.mark.parametrize("path", sources("fastcache", "workflow/scripts"), ids=name)
def test_what_is_never_done(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print" or layer_or_none(path) == "cli", f"{name(path)}:{node.lineno} prints"
            assert called not in ("eval", "exec"), f"{name(path)}:{node.lineno} runs text as code"
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{name(path)}:{node.lineno} unpickles"
        if isinstance(node, ast.ExceptHandler) and broad(node):
            near = lines[node.lineno - 2 : node.lineno + 1]
            assert any("#" in line for line in near), (
                f"{name(path)}:{node.lineno} catches everything without a reason"
            )
    assert not re.search(r"sys\.path(\.(append|insert|extend)|\s*\+?=)", text), f"{name(path)} edits sys.path"
    assert "trust_remote_code=True" not in text


def layer_or_none(path: Path) -> str | None:
    return layer(path) if path.is_relative_to(PACKAGE) else None


def broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")


TEXT = (".py", ".smk", ".yaml", ".yml", ".md", ".toml", ".j2", ".rst", ".txt", ".css", ".js", ".cff")
MACHINE_PATH = re.compile(r"(?<![\w.{}$~-])/(home|root|Users|work|mnt|scratch)/\w")


def test_no_path_of_a_machine_is_written_down():
    found = []
    for folder in ("fastcache", "workflow", "config", "report", "bench", "envs", "docs", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in TEXT and path != Path(__file__).resolve():
                found += [
                    f"{name(path)}: {m[0]}" for m in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))
                ]
    for path in (ROOT / "README.md", ROOT / "Makefile", ROOT / "Snakefile", ROOT / "pyproject.toml"):
        found += [f"{name(path)}: {m[0]}" for m in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))]
    assert not found

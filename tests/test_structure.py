# SPDX-License-Identifier: Apache-2.0
"""The house: who imports whom, where files stand, what an op must have."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ctxfast
from ctxfast import functional
from ctxfast._core import registry
from ctxfast.nn import graphs

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ctxfast"

# Floors from the ground up: a module imports only from its own room or from floors below, so rooms of one floor do not
# know each other.
FLOORS = [
    ["_core"],
    ["ops", "packing"],
    ["functional"],
    ["nn"],
    ["models", "swap"],
    ["embedding", "training/readers", "training/loop"],
    ["training/pretraining", "training/tasks"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Ops whose folder of csrc has another name, and implementations that are no kernels but calls of torch's.
CSRC_FOLDERS = {
    "add_layer_norm": "layer_norm",
    "add_norm": "layer_norm",
    "embed_layer_norm": "layer_norm",
    "feed_forward": "linear_act",
}
NOT_COMPILED = {("linear_cross_entropy", "cpu")}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> list[tuple[str, ...]]:
    """Absolute dotted names of everything a file imports, at any depth, as tuples."""
    package = path.relative_to(ROOT).with_suffix("").parts
    if path.name == "__init__.py":
        package = package[:-1] + ("",)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found += [(*base, alias.name) for alias in node.names]
    return found


def _room(parts: tuple[str, ...]) -> str | None:
    """The room that a module, or a name in it, belongs to; None outside the package and for what has no room."""
    if parts[:1] != ("ctxfast",):
        return None
    return next((room for room in ("/".join(parts[1:3]), "".join(parts[1:2])) if room in FLOOR), None)


def _name(path: Path) -> tuple[str, ...]:
    """A module's dotted name, as a tuple."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def test_every_module_has_a_room() -> None:
    doors = {("ctxfast",), ("ctxfast", "training")}  # they hold rooms
    homeless = [path.name for path in _modules() if _room(_name(path)) is None and _name(path) not in doors]
    assert homeless == []


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path) -> None:
    own = _room(_name(path))
    if own is None:  # the front door shows what every room has
        return
    for name in _imports(path):
        room = _room(name)
        where = f"{path.relative_to(ROOT)} imports {'.'.join(name)}, which does not stand below it"
        assert room in (None, own) or FLOOR[room] < FLOOR[own], where


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count: what needs them to escape a circle is one room badly cut in two."""
    modules = {_name(path): path for path in _modules()}
    graph = {
        module: {next((part for part in (name, name[:-1]) if part in modules), module) for name in _imports(path)}
        - {module, ("ctxfast",)}
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_core_knows_no_op() -> None:
    """Neither in a name, an attribute or a keyword, nor in a string that is no documentation."""
    ops = re.compile("|".join(rf"(?<![a-z]){name}(?![a-z])" for name in registry.OPS))
    for path in (PACKAGE / "_core").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        prose = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            for field in ("id", "attr", "arg", "name", "module", "value"):
                text = getattr(node, field, None)
                if isinstance(text, str) and node not in prose:
                    assert not ops.search(text), f"{path.name} names {text}"


def test_every_folder_of_ops_is_a_function_of_functional() -> None:
    folders = {path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py")} - {"shared"}
    assert folders == set(registry.OPS) == set(functional.__all__) - {"explain"}
    assert set(functional.__all__) <= set(ctxfast.__all__)


@pytest.mark.parametrize("spec", list(registry.OPS.values()), ids=lambda spec: spec.name)
def test_an_op_has_everything_under_its_name(spec) -> None:
    folder = PACKAGE / "ops" / spec.name
    for name in ("__init__.py", "reference.py", "cases.py"):
        assert (folder / name).is_file(), f"ops/{spec.name}/{name}"
    assert spec.reference.__name__ == spec.name
    documentation = inspect.getdoc(spec.declaration)
    assert all(f"\n{part}:" in documentation for part in ("Args", "Returns", "Reference"))
    assert (ROOT / "benchmarks" / "ops" / f"{spec.name}.py").is_file()
    for implementation in spec.impls:
        module = folder / f"{implementation.name}.py"
        assert module.is_file()
        names = {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert {spec.name, "supports", "raw_calls"} <= names
        if implementation.name != "triton" and (spec.name, implementation.name) not in NOT_COMPILED:
            kernels = ROOT / "csrc" / CSRC_FOLDERS.get(spec.name, spec.name)
            on_cpu = implementation.device == "cpu"
            assert (kernels / f"{kernels.name}.h").is_file()
            assert list(kernels.glob("cpu*.cpp" if on_cpu else "*.cu"))
            assert list(kernels.glob("bind_cpu.cpp" if on_cpu else "bind_cuda*.cpp"))
            assert list(kernels.glob("test_cpu*.cpp" if on_cpu else "test_*.cu"))


def test_what_ran_on_a_gpu_is_a_field() -> None:
    """README shows it; no sentence beside it, which would grow old."""
    for spec in registry.OPS.values():
        for implementation in spec.impls:
            is_gpu = re.fullmatch(r"[A-Z]+\d+ \d{4}-\d\d-\d\d", str(implementation.proven))
            assert is_gpu or implementation.proven in registry.PROVEN, f"{spec.name}: {implementation.proven}"
    said = registry.PROVEN.get(graphs.PROVEN, f"run on {graphs.PROVEN}")
    assert f"(`ctxfast/nn/graphs.py`): {said}." in (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.compile(r"(not|never)\s+(yet\s+)?(been\s+)?run\s+on\s+a\s+GPU", re.IGNORECASE)
    for folder in ("ctxfast", "csrc", "docs", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".h", ".cpp", ".cu", ".cuh") and "build" not in path.parts:
                assert not prose.search(path.read_text(encoding="utf-8")), path
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert not prose.search((ROOT / name).read_text(encoding="utf-8")), name


def test_implementations_do_not_import_one_another() -> None:
    for spec in registry.OPS.values():
        for implementation in spec.impls:
            path = PACKAGE / "ops" / spec.name / f"{implementation.name}.py"
            for name in _imports(path):
                # Parts of its own op that are no implementation may be shared or split off.
                is_part = name[:3] == ("ctxfast", "ops", spec.name) and name[3] not in registry.IMPL_NAMES
                is_below = name[:2] != ("ctxfast", "ops") or name[2] == "shared"
                assert is_part or is_below, f"{path.relative_to(ROOT)} imports {'.'.join(name)}"


def test_references_import_only_torch() -> None:
    """And of the package what definitions share, which imports torch alone."""
    allowed = {"torch", "math", "collections", "contextlib", "__future__", "typing"}
    shared = PACKAGE / "ops" / "shared" / "definitions.py"
    for path in (shared, *(PACKAGE / "ops").glob("*/reference.py")):
        for name in _imports(path):
            is_shared = path != shared and name[:4] == ("ctxfast", "ops", "shared", "definitions")
            assert name[0] in allowed or is_shared, f"{path.relative_to(ROOT)} imports {'.'.join(name)}"


def test_environment_is_read_in_core_only() -> None:
    for path in _modules():
        if "_core" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert "os.environ" not in text and "getenv" not in text, path


def test_only_commands_print() -> None:
    """The library has the logger "ctxfast" and those below it, one a module, and warnings."""
    for path in _modules():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        if _room(_name(path)) not in ("cli", "commands"):
            assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"], path
            assert not [node.lineno for node in nodes if getattr(node, "attr", "") in ("stdout", "stderr")], path
        for call in calls:
            if getattr(call.func, "attr", "") == "getLogger":
                assert ast.unparse(call.args[0]) == "__name__", path


def test_only_core_loads_the_extension() -> None:
    for path in _modules():
        if "_core" not in path.parts:
            assert not any("_C" in name for name in _imports(path)), path


def test_triton_is_imported_in_its_own_modules_only() -> None:
    for path in _modules():
        if not path.name.startswith("triton"):
            assert not any(name[0] == "triton" for name in _imports(path)), path


def test_kernels_know_neither_torch_nor_python() -> None:
    forbidden = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)")
    files = [path for path in (ROOT / "csrc").glob("*/*.*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    files = [path for path in files if not re.match(r"bind|module\.cpp", path.name)]
    assert len(files) > 60
    for path in files:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path


def test_the_map_shows_the_floors() -> None:
    """docs/house.md has them from the top."""
    house = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", house.partition("## Floors")[2].partition("\n## ")[0], re.MULTILINE)
    assert [re.findall(r"`([^`]+)`", row) for row in rows] == FLOORS[::-1]


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "docs/house.md", "docs/command_line.md", "docs/publishing.md", "docs/results.md"],
)
def test_pages_name_what_is_there(page) -> None:
    """Paths and links; "<op>" and the like, and stars, stand for any letters."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"(?:`|^)((?:ctxfast|csrc|tests|benchmarks|docs|examples)/[^\s`{}]*)", text, re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links or paths
    for path in [*paths, *(str(Path(page).parent / link) for link in links)]:
        assert any(ROOT.glob(re.sub(r"<\w+>", "*", path.rstrip("/")))), f"{page} names {path}"


def test_the_readme_is_short() -> None:
    """Generated tables, in which an op more is a row more, do not count."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [cell for line in lines if line.startswith("|") for cell in line.split("|") if len(cell.strip()) > 100]
    written = re.sub(r"<!-- (\w+): python.*?<!-- end of \1 -->", "", "\n".join(lines), flags=re.DOTALL)
    assert len(written.splitlines()) <= 95 and len(lines) <= 140


def test_files_are_short() -> None:
    long = {}
    for pattern in (
        "ctxfast/**/*.py",
        "csrc/*.py",
        "csrc/**/*.cpp",
        "csrc/**/*.cu*",
        "csrc/**/*.h",
        "tests/**/*.py",
        "benchmarks/**/*.py",
        "setup.py",
    ):
        for path in ROOT.glob(pattern):
            lines = path.read_text(encoding="utf-8").count("\n")
            name = str(path.relative_to(ROOT))
            if lines > 520 and "build" not in path.parts:
                long[name] = lines
    assert long == {}


def test_no_vague_rooms() -> None:
    assert not [path for path in _modules() if path.name in ("utils.py", "common.py", "helpers.py", "misc.py")]


def test_import_is_light() -> None:
    """`import ctxfast` and the command's help load neither torch nor what only files and models need; with torch,
    ctxfast touches no GPU and loads no Triton, tokenizer, HDF5 or Hugging Face library."""
    code = (
        "import contextlib, sys, ctxfast.cli\n"
        "for words in ('--help', '--version', 'finetune tag --help'):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        ctxfast.cli.main(words.split())\n"
        "heavy = {'torch', 'numpy', 'tqdm', 'triton', 'transformers', 'tokenizers', 'h5py', 'pyarrow', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not any(name.startswith('ctxfast.ops') for name in sys.modules)\n"
        "import torch\n"
        "ctxfast.lstm\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy -= {'torch', 'numpy', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(ctxfast.__all__) <= set(dir(ctxfast))\n"
        "for name in ctxfast.__all__:\n"
        "    getattr(ctxfast, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

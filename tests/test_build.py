# SPDX-License-Identifier: Apache-2.0
"""The build: its settings and their errors, the facts it records, what the extension needs to load."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ctxfast import _C

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ISAS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")
RUNNABLE = _C.cpu_isas()
sys.path.insert(0, str(CSRC))  # as for whoever runs a program there


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ctxfast_test_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toolchain() -> ModuleType:
    return _load(CSRC / "toolchain.py")


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    return _load(CSRC / "build.py")


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    return _load(CSRC / "resources.py")


# ---- the build's settings


def test_build_info_tells_what_was_built() -> None:
    info = _C.build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["compiler"]
    assert set(RUNNABLE) <= set(info["cpu_isas"]) <= set(ISAS)
    if info["cuda"]:
        assert info["cuda_version"] and info["cuda_archs"] and info["cuda_reason"] == ""
    else:
        assert info["cuda_reason"] and not info["cuda_archs"]


@pytest.mark.parametrize("text, mode", [(None, "auto"), ("", "auto"), ("AUTO", "auto"), ("0", "0"), (" 1 ", "1")])
def test_cuda_setting(toolchain: ModuleType, text: str | None, mode: str) -> None:
    assert toolchain.parse_cuda_mode(text) == mode


@pytest.mark.parametrize(
    "text, archs",
    [
        (None, ("80", "86", "89", "90a")),
        ("90a", ("90a",)),
        ("80, 90 80", ("80", "90")),
        ("80;120f", ("80", "120f")),
    ],
)
def test_arch_setting(toolchain: ModuleType, text: str | None, archs: tuple[str, ...]) -> None:
    assert toolchain.parse_archs(text) == archs


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"CTXFAST_CUDA": "yes"}, "CTXFAST_CUDA is 'yes'; expected auto, 0 or 1"),
        (
            {"CTXFAST_CUDA_ARCHS": "sm_80"},
            "CTXFAST_CUDA_ARCHS holds 'sm_80'; expected numbers from 80 up",
        ),
        (
            {"CTXFAST_CUDA_ARCHS": "70"},
            "CTXFAST_CUDA_ARCHS holds '70'; expected numbers from 80 up",
        ),
        ({"CTXFAST_CUDA_ARCHS": ";"}, "CTXFAST_CUDA_ARCHS is empty"),
        (
            {"CTXFAST_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "CTXFAST_CUDA=1 asks for CUDA kernels, but CUDA_HOME is /now",
        ),
    ],
)
def test_wrong_settings_are_errors(toolchain: ModuleType, environ: dict[str, str], message: str) -> None:
    with pytest.raises(toolchain.SettingError, match=re.escape(message)):
        toolchain.find_cuda(environ)


def test_missing_compilers(toolchain: ModuleType) -> None:
    cuda = toolchain.find_cuda({"CTXFAST_CUDA": "auto", "CUDA_HOME": "/nowhere"})
    assert cuda.nvcc is None and cuda.reason == "CUDA_HOME is /nowhere, which has no bin/nvcc"
    assert toolchain.find_cuda({"CTXFAST_CUDA": "0"}).reason == "built with CTXFAST_CUDA=0"
    with pytest.raises(toolchain.SettingError, match="CXX is 'no-such-compiler'"):
        toolchain.find_cxx({"CXX": "no-such-compiler"})


def test_wrong_setting_stops_the_build(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    environ = {"PATH": "/usr/bin:/bin", "CTXFAST_CUDA": "maybe"}
    answer = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert answer.returncode != 0
    assert "error: ctxfast: CTXFAST_CUDA is 'maybe'; expected auto, 0 or 1." in answer.stderr


def test_arch_flags(build_script: ModuleType) -> None:
    flags = build_script.gencode(("80", "90a"), CSRC / "scalar_mix" / "cuda.cu")
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"  # PTX for GPUs to come
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags
    assert build_script.gencode(("80", "90a"), CSRC / "lstm" / "step_sm90a.cu") == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]


def test_every_kernel_source_names_its_instruction_sets(build_script: ModuleType, tmp_path: Path) -> None:
    assert tuple(build_script.SETS) == ISAS
    kernels = build_script.sources("*/*.isa.cpp")
    assert kernels and all(build_script.sets_of(path)[0] == "generic" for path in kernels)
    exact = [path for path in kernels if path.name.startswith(("bfloat16.", "int8."))]  # the same bits on every set
    assert exact and all(build_script.directive(path, "flags") == ["-ffp-contract=off"] for path in exact)
    for text in ("// sets: avx2\n", "// sets: generic avx3\n", "// a sentence. sets: generic\n"):
        (tmp_path / "kernels.isa.cpp").write_text(text)
        with pytest.raises(build_script.SettingError, match="kernels.isa.cpp says sets"):
            build_script.sets_of(tmp_path / "kernels.isa.cpp")


def test_build_needs_no_torch() -> None:
    for script in (ROOT / "setup.py", CSRC / "build.py", CSRC / "toolchain.py"):
        assert not re.search(r"^\s*(import|from) torch", script.read_text(), re.MULTILINE)
    requires = re.search(r"^requires = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires and "torch" not in requires[1]


# ---- the extension as a file


def test_loads_without_torch_driver_or_cuda_libraries() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('ctxfast._C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "maps = open('/proc/self/maps').read()\n"
        "for library in ('libcudart', 'libcuda.so', 'libtorch', 'libgomp'):\n"
        "    assert library not in maps, library\n"
        "print(module.cpu_isa())\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == _C.cpu_isa()


# ---- the resource table

PTXAS = """
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2080 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""


def test_ptxas_output_is_understood(resources: ModuleType) -> None:
    assert resources.parse_ptxas(PTXAS) == {
        "_Z1aPf": {
            "registers": 40,
            "shared": 2080,
            "stack": 16,
            "spill_stores": 8,
            "spill_loads": 4,
        },
        "_Z1bPf": {"registers": 255, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0},
    }


def test_kernel_names_do_not_depend_on_the_checkout(resources: ModuleType) -> None:
    hashed = "_GLOBAL__N__b9dc9ec7_13_x_cu_781b14a9"
    name = f"void ctxfast::{hashed}::x_kernel<float, (bool)1>(ctxfast::Params)"
    assert resources.readable_name(name) == "ctxfast::x_kernel<float, 1>"
    assert resources.readable_name("ctxfast::(anonymous namespace)::y_kernel(float*)") == "ctxfast::y_kernel"


def test_resource_growth_and_spills_are_problems(resources: ModuleType) -> None:
    row = {"registers": 40, "shared": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    assert resources.compare({"a": row}, {"a": {**row, "registers": 32}}) == []
    found = resources.compare(
        {"a": row, "b": row, "gone": row},
        {"a": {**row, "registers": 41}, "b": {**row, "spill_stores": 4}, "new": row},
    )
    assert found == [
        ("a", "registers grew from 40 to 41"),
        ("b", "spills 4 B stored, 0 B loaded"),
        ("new", "is not in the table"),
        ("gone", "is in the table but no longer compiled"),
    ]


def test_what_no_triton_kernel_may_have(resources: ModuleType) -> None:
    row = {"registers": 40, "shared": 1000, "stack": 0}
    loss = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    assert resources.find_faults(row, PTXAS, 1000) == []
    assert resources.find_faults({**row, "stack": 8}, PTXAS, 999) == [
        "spills: 8 B of stack",
        "needs 1000 B of shared memory, and no block gets more than 999",
    ]
    (fault,) = resources.find_faults(row, f"{PTXAS}{loss} non wgmma instructions\n", 1000)
    assert fault.startswith("its products wait for one another: ptxas info    : (C7515)")


def test_triton_tables_have_the_same_rows() -> None:
    """One a Triton; a row that is in one alone was forgotten in the other."""
    tables = [json.loads(path.read_text()) for path in sorted(CSRC.glob("triton_resources-*.json"))]
    assert [table["triton"] for table in tables] == ["3.6.0", "3.9.0"]
    first, second = (set(table["kernels"]) for table in tables)
    assert first and first == second
    assert not any(row["stack"] for table in tables for row in table["kernels"].values())


def test_old_setuptools_are_told_apart(tmp_path) -> None:
    """One that does not read pyproject.toml's license stops with words that say nothing of the way out."""
    (tmp_path / "setuptools.py").write_text("__version__ = '76.1'\nExtension = setup = object\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types, setuptools\n"
        "setuptools.__path__ = []\n"
        "sys.modules['setuptools.command'] = types.ModuleType('c')\n"
        "sys.modules['setuptools.command'].__path__ = []\n"
        "sys.modules['setuptools.command.build_ext'] = types.SimpleNamespace(build_ext=object)\n"
        "sys.modules['setuptools.command.build_py'] = types.SimpleNamespace(build_py=object)\n"
    )
    done = subprocess.run(
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode != 0
    assert "setuptools 76.1 does not read this pyproject.toml; expected 77 or newer" in done.stderr


@pytest.mark.slow
def test_a_wheel_holds_the_benchmark_suite(tmp_path) -> None:
    words = ["-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", *words], cwd=ROOT, check=True, capture_output=True)
    program = (
        "import sys; sys.argv[1:] = ['bench', '--list', '--op', 'scalar_mix']; from ctxfast.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.startswith("scalar_mix/"), done.stderr
    assert not (tmp_path / "ctxfast" / "benchmarks" / "results").exists()


# ---- what an index takes


def test_an_index_page_has_no_link_to_a_file_beside_it(monkeypatch) -> None:
    """README's links lead to where the repository is published; without such a place they stay as they are."""
    setup = _load(ROOT / "setup.py")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = setup.index_page(readme, "https://example.org/x")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 5 and all(link.startswith("https://") for link in links)
    assert "](https://example.org/x/blob/main/docs/house.md)" in page
    assert setup.index_page(readme, "") == readme
    kept = "[a](https://example.org) [b](#part) [c](docs/c.md#part)"
    assert setup.index_page(kept, "h:").endswith("[a](https://example.org) [b](#part) [c](h:/blob/main/docs/c.md#part)")
    for text, expected in (("", ""), ("https://example.org/x/", "https://example.org/x")):
        monkeypatch.setenv("CTXFAST_HOMEPAGE", text)
        assert setup.homepage() == expected
    monkeypatch.setenv("CTXFAST_HOMEPAGE", "example.org")
    with pytest.raises(SystemExit, match="CTXFAST_HOMEPAGE is 'example.org'; expected an address"):
        setup.homepage()


def test_an_unpacked_sdist_knows_its_home(monkeypatch, tmp_path) -> None:
    setup = _load(ROOT / "setup.py")
    monkeypatch.delenv("CTXFAST_HOMEPAGE", raising=False)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "PKG-INFO").write_text(
        "Name: ctxfast\nProject-URL: Issues, https://a\nProject-URL: Homepage, https://b\n\n"
    )
    assert setup.homepage() == "https://b"


def test_dead_links_of_the_reference_are_found(tmp_path) -> None:
    """Those that pdoc made of bare names are taken away, all others are faults."""
    reference = _load(ROOT / "docs" / "reference.py")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.html").write_text(
        '<h1 id="A.b"></h1><a href="#A.b">A.b</a><a href="#A.c">A.c</a><a href="in/b.html#x">see there</a>'
        '<a href="in/b.html#y">and there</a><a href="https://example.org">out</a><a href="gone.html">gone, too</a>'
    )
    (tmp_path / "in" / "b.html").write_text('<p id="x"></p><a href="../a.html#A.b">A.b</a><img src="no.png">')
    reference.unlink_names(tmp_path)
    dead = {path.name: links for path, links in reference.dead_links(tmp_path).items()}
    assert dead == {"a.html": ["in/b.html#y", "gone.html"], "b.html": ["no.png"]}
    assert '<a href="#A.b">A.b</a>A.c<' in (tmp_path / "a.html").read_text()

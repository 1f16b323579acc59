# SPDX-License-Identifier: Apache-2.0
"""The build of everything under csrc: what is compiled, by which compiler and with which flags.

``setup.py`` builds the extension with it; the emulator of the tests, ``resources.py`` and ``benchmarks/gpu`` ask it
too. As a program it builds the test programs and runs them, each once, as many at a time as there are cores:

    python csrc/build.py test [--cpu]    kernels against plain loops: those of the CPU, then (without --cpu) the CUDA
                                         ones, on a GPU where nvcc is and on the emulator where CUDA's headers are

A source's name says how it is compiled:

    <op>/*.cpp             CPU
    <op>/*.isa.cpp         CPU, once for each instruction set of its line "// sets: ...", with the flags of that set and
                           of its line "// flags: ..."; base/isa.h chooses among them when they run
    <op>/*.cu              CUDA; ``_sm90a`` at its end: for that architecture alone
    <op>/bind_*.cpp        binding: the only sources, with base/module.cpp, that know Python; bind_cuda*.cpp are
                           compiled where the kernels that they bind are
    <op>/test_*.cpp, .cu   a test program, linked with the CPU's kernels or with the CUDA kernels of its folder
    emulator/*.cpp         CUDA kernels on the CPU, compiled as C++ against these headers

Settings (environment):

    CTXFAST_CUDA           auto (default: CUDA kernels if nvcc is found), 1 (nvcc missing is an error), 0 (no CUDA).
                           nvcc is looked for in CUDA_HOME (or CUDA_PATH), on PATH, then in NVIDIA's pip packages.
    CTXFAST_CUDA_ARCHS     architectures, default 80;86;89;90a; PTX of the newest is added for later GPUs
    CXX                    the C++ compiler
    MAX_JOBS               how many compilers run at once
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from toolchain import Cuda, SettingError, find_cuda, find_cuda_headers, find_cxx, find_ninja, parse_archs as parse_archs

CSRC = Path(__file__).resolve().parent
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mprefer-vector-width=512")
AVX512VNNI = (*AVX512, "-mavx512bw", "-mavx512vl", "-mavx512vnni")
AVX512BF16 = (*AVX512VNNI, "-mavx512bf16")
# Instruction sets: floats of a vector and flags. All but the first are x86-64's. csrc/base/isa.h lists them too.
SETS = {
    "generic": (4, ()),
    "avx2": (8, AVX2),
    "avxvnni": (8, (*AVX2, "-mavxvnni")),
    "avx512": (16, AVX512),
    "avx512vnni": (16, AVX512VNNI),
    "avx512bf16": (16, AVX512BF16),
    "amx": (16, (*AVX512BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
}
# A CUDA source whose name ends so, or the binding of one, uses instructions only this architecture has.
ARCH_ONLY = {"_sm90a": "90a"}
OPTIMIZED = ("-std=c++17", "-O3", "-DNDEBUG")
CXX_FLAGS = (*OPTIMIZED, "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-ffp-contract=fast")
NVCC_FLAGS = (*OPTIMIZED, "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden")
EMULATED_FLAGS = ("-x", "c++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra",
                  "-Wno-unknown-pragmas", "-DCTXFAST_EMULATE")  # fmt: skip


# ---- sources and their flags


def is_test(source: Path) -> bool:
    return source.name.startswith("test_")


def knows_python(source: Path) -> bool:
    return source.name.startswith("bind_") or source.name == "module.cpp"


def sources(pattern: str) -> list[Path]:
    """Sources of the extension by a pattern below csrc, in order: neither test programs nor the emulator's."""
    return [path for path in sorted(CSRC.glob(pattern)) if not is_test(path) and path.parent.name != "emulator"]


def directive(source: Path, key: str) -> list[str]:
    """The words of a source's line ``// <key>: ...``; none without such a line."""
    line = re.search(rf"^// {key}: (.+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    return line[1].split() if line else []


def sets_of(source: Path) -> list[str]:
    """The instruction sets that a kernel source names; SettingError if it names none or one that nobody knows."""
    sets = directive(source, "sets")
    if sets[:1] != ["generic"] or not set(sets) <= set(SETS):
        raise SettingError(
            f"ctxfast: {source.name} says sets: {' '.join(sets)!r}; expected generic first, of {[*SETS]}."
        )
    return sets


def arch_only(source: Path) -> str | None:
    """The only architecture that a CUDA source is for."""
    return next((arch for suffix, arch in ARCH_ONLY.items() if source.stem.endswith(suffix)), None)


def gencode(archs: Sequence[str], source: Path) -> list[str]:
    """nvcc's flags for one source: machine code of every architecture, and PTX of the newest."""
    only = arch_only(source)
    if only:
        return [f"-gencode=arch=compute_{only},code=sm_{only}"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(int(arch.rstrip("af")) for arch in archs)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def accepted_sets(cxx: list[str]) -> list[str]:
    """The instruction sets whose flags this compiler takes: the first alone on other processors than x86-64."""

    def takes(flags: tuple[str, ...]) -> bool:
        command = [*cxx, *flags, "-x", "c++", "-E", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [name for name, (_, flags) in SETS.items() if not flags or (is_x86 and takes(flags))]


# ---- what is built


class Build:
    """The file build.ninja of ``folder``: the extension and the test programs share its objects.

    Every method but ``run`` writes down how something is built and returns its path (or paths) relative to ``folder``;
    ``run`` builds.
    """

    folder = CSRC.parent / "build" / sysconfig.get_config_var("SOABI")

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.cuda = find_cuda(environ)
        self.cxx = find_cxx(environ)
        self.ninja = find_ninja()
        self._lines: dict[str, str] = {}  # target -> how it is made

    def object(self, source: Path, command: Iterable[str], kind: str = "") -> str:
        """One compiled source; ``kind`` keeps the objects of one source apart."""
        target = f"{kind}{source.parent.name}_{source.name}.o"
        words = shlex.join([*command, f"-I{CSRC}"]).replace("$", "$$")
        self._lines[target] = f"build {target}: compile {_escaped(source)}\n  command_line = {words}"
        return target

    def link(self, target: str, command: Iterable[str], objects: Iterable[str]) -> str:
        words = shlex.join(command).replace("$", "$$")
        self._lines[target] = f"build {_escaped(target)}: link {' '.join(objects)}\n  command_line = {words}"
        return target

    def run(self, targets: Sequence[str], *options: str) -> bool:
        """Build targets, with these options of ninja's; False if a command failed, which ninja has shown."""
        rules = (
            "ninja_required_version = 1.5\n"
            "rule compile\n  command = $command_line -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            "rule link\n  command = $command_line $in -o $out -ldl -lpthread -lrt\n"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = ["-j", self.environ["MAX_JOBS"]] if self.environ.get("MAX_JOBS") else []
        with open(self.folder / "lock", "wb") as lock:  # one build at a time
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_if_changed(self.folder / "build.ninja", rules + "\n".join(self._lines.values()) + "\n")
            return (
                subprocess.run([self.ninja, "-C", str(self.folder), *jobs, *options, *targets], check=False).returncode
                == 0
            )

    @cached_property
    def sets(self) -> list[str]:
        return accepted_sets(self.cxx)

    @cached_property
    def cuda_headers(self) -> Path | None:
        return find_cuda_headers(self.environ)

    # -- objects

    def cpu_kernels(self) -> list[str]:
        compiled = " ".join(["", *self.sets, ""])
        command = [*self.cxx, *CXX_FLAGS, f'-DCTXFAST_COMPILED_SETS="{compiled}"']
        objects = []
        for path in sources("*/*.cpp"):
            if path.name.endswith(".isa.cpp"):
                for name in sets_of(path):
                    if name in self.sets:
                        lanes, flags = SETS[name]
                        kind = [f"-DCTXFAST_ISA={name}", f"-DCTXFAST_LANES={lanes}", *flags, *directive(path, "flags")]
                        objects.append(self.object(path, [*command, *kind], f"{name}_"))
            elif not knows_python(path):
                objects.append(self.object(path, command))
        return objects

    def cuda_kernels(self, where: str = "*") -> list[str]:
        return [self._cuda_object(path) for path in self._compiled(sources(f"{where}/*.cu"))]

    def _compiled(self, cuda_sources: Iterable[Path]) -> list[Path]:
        """Those that are for an architecture of this build."""
        return [path for path in cuda_sources if arch_only(path) in (None, *self.cuda.archs)]

    def _cuda_object(self, source: Path) -> str:
        return self.object(source, [*self._nvcc(), *NVCC_FLAGS, *self.cuda.flags, *gencode(self.cuda.archs, source)])

    def _nvcc(self) -> list[str]:
        assert self.cuda.nvcc is not None
        return [self.cuda.nvcc, *(["-ccbin", self.cxx[0]] if len(self.cxx) == 1 else [])]

    def _emulated_object(self, source: Path, *flags: str) -> str:
        return self.object(source, [*self.cxx, *EMULATED_FLAGS, f"-isystem{self.cuda_headers}", *flags], "emulated_")

    def _emulator(self) -> list[str]:
        return [self._emulated_object(CSRC / "emulator" / name) for name in ("emulator.cpp", "runtime.cpp")]

    # -- targets

    def extension(self, name: str, version: str) -> str:
        """The shared library ``name``: bindings, CPU kernels and, where there is nvcc, CUDA kernels."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(self.folder / "ctxfast_build_info.h", build_info_header(version, self.compiler, self.cuda))
        flags = [*CXX_FLAGS, *_python_flags(), f"-I{self.folder}"]
        bindings = [CSRC / "base" / "module.cpp", *sources("*/bind_cpu.cpp")]
        if self.cuda.nvcc:
            bindings += self._compiled(sources("*/bind_cuda*.cpp"))
        objects = [self.object(path, [*self.cxx, *flags]) for path in bindings] + self.cpu_kernels()
        if not self.cuda.nvcc:
            command = [*self.cxx, "-shared", "-pthread", "-Wl,--exclude-libs,ALL"]
            return self.link(name, command, objects)
        # nvcc knows where its static runtime lies; the result needs no CUDA library to load.
        command = [*self._nvcc(), "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *self.cuda.link_flags]
        return self.link(name, command, objects + self.cuda_kernels())

    def emulated_extension(self, name: str) -> str:
        """The shared library ``name``: the CUDA kernels and their bindings, on the emulator."""
        objects = [self._emulated_object(path) for path in sources("*/*.cu")] + self._emulator()
        bindings = [*sources("*/bind_cuda*.cpp"), CSRC / "emulator" / "module.cpp"]
        objects += [self._emulated_object(path, *_python_flags()) for path in bindings]
        return self.link(name, [*self.cxx, "-shared"], objects)

    def cpu_tests(self) -> list[str]:
        kernels = self.cpu_kernels()
        programs = []
        for path in sorted(CSRC.glob("*/test_*.cpp")):
            objects = [self.object(path, [*self.cxx, *CXX_FLAGS]), *kernels]
            programs.append(self.link(program_name(path), [*self.cxx, "-pthread"], objects))
        return programs

    def cuda_tests(self) -> list[str]:
        command = [*self._nvcc(), "-cudart=static", *self.cuda.link_flags]
        programs = []
        for path in self._compiled(sorted(CSRC.glob("*/test_*.cu"))):
            objects = [self._cuda_object(path), *self.cuda_kernels(path.parent.name)]
            programs.append(self.link(program_name(path), command, objects))
        return programs

    def emulated_tests(self) -> list[str]:
        programs = []
        for path in sorted(CSRC.glob("*/test_*.cu")):
            kernels = [self._emulated_object(kernel) for kernel in sources(f"{path.parent.name}/*.cu")]
            objects = [self._emulated_object(path), *kernels, *self._emulator()]
            programs.append(self.link(f"emulated_{program_name(path)}", [*self.cxx, "-pthread"], objects))
        return programs

    @cached_property
    def compiler(self) -> str:
        """What the C++ compiler says it is."""
        answer = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True, check=False)
        return (answer.stdout.splitlines() or [" ".join(self.cxx)])[0]


def program_name(source: Path) -> str:
    """The name of a test program: test_lstm_step of lstm/test_step.cu."""
    return f"test_{source.parent.name}_{source.stem.removeprefix('test_')}"


def _escaped(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _python_flags() -> list[str]:
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


def build_info_header(version: str, compiler: str, cuda: Cuda) -> str:
    """The facts of this build, as the header that base/module.cpp includes."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    listed = [*cuda.archs, f"{max(int(arch.rstrip('af')) for arch in cuda.archs)}+PTX"] if cuda.nvcc else []
    return "".join(
        f"#define CTXFAST_{name} {value}\n"
        for name, value in (
            ("VERSION", quoted(version)),
            ("COMPILER", quoted(compiler)),
            ("WITH_CUDA", int(cuda.nvcc is not None)),
            ("CUDA_VERSION", quoted(cuda.version)),
            ("CUDA_ARCHS", quoted(";".join(listed))),
            ("CUDA_REASON", quoted(cuda.reason)),
        )
    )


def write_if_changed(path: Path, text: str) -> None:
    """Write ``path`` unless it holds ``text`` already: ninja then rebuilds nothing."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- the test programs


def run_programs(commands: Sequence[Sequence[str]], environ: Mapping[str, str]) -> int:
    """Run commands, as many at a time as there are cores; how many failed."""

    def run(command: Sequence[str]) -> int:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
        died = "" if done.returncode in (0, 1) else f"{' '.join(command)}: ended with {done.returncode}\n"
        print(done.stdout + died, end="", flush=True)
        return done.returncode != 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(run, commands))


def test(build: Build, only_cpu: bool) -> int:
    programs = build.cpu_tests()
    if not only_cpu:
        if build.cuda.nvcc:
            programs += build.cuda_tests()
        else:
            print(f"CUDA programs not built: {build.cuda.reason}")
        if build.cuda_headers:
            programs += build.emulated_tests()
        else:
            print("nothing run on the emulator: CUDA's headers come with its toolkit or with Triton")
    if not build.run(programs):
        return 1
    failed = run_programs([[str(build.folder / program)] for program in programs], build.environ)
    print(f"{len(programs)} programs, {failed} failed")
    return int(failed > 0)


# ---- the extension, where it is loaded from


def place(built: Path, target: Path) -> None:
    """Put a library where it is loaded from: replaced, not overwritten, for a process may have the old one mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(built, temporary)
    os.replace(temporary, target)


def told(build: Build, name: str) -> str:
    """What was built, in two lines."""
    kernels = f"CUDA kernels with nvcc {build.cuda.version} for {', '.join(build.cuda.archs)} and PTX"
    cuda = kernels if build.cuda.nvcc else f"no CUDA kernels: {build.cuda.reason}"
    return f"ctxfast: built {name}: CPU kernels with {build.compiler}\nctxfast: {cuda}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the test programs of csrc and runs them.")
    parser.add_argument("what", choices=("test",))
    parser.add_argument("--cpu", action="store_true", help="the CPU's programs alone")
    options = parser.parse_args()
    try:
        raise SystemExit(test(Build(dict(os.environ)), options.cpu))
    except SettingError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

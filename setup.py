# SPDX-License-Identifier: Apache-2.0
"""Builds the extension ``ctxfast._C``; everything else about the package is in pyproject.toml.

The sources know neither torch nor, outside ``bind*.cpp`` and ``base/module.cpp``, Python. So this needs no torch, takes
seconds, and the result loads next to any torch and on machines without a GPU or driver.

Settings (environment):
- ``CTXFAST_CUDA``: ``auto`` (default: CUDA kernels if nvcc is found), ``1`` (nvcc missing is an
  error), ``0`` (no CUDA). nvcc is looked for in ``CUDA_HOME`` (or ``CUDA_PATH``), then on ``PATH``,
  then in NVIDIA's pip packages.
- ``CTXFAST_CUDA_ARCHS``: architectures, default ``80;86;89;90a``; PTX of the newest is added for
  later GPUs.
- ``CXX``: the C++ compiler.
- ``MAX_JOBS``: how many compilers run at once.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;86;89;90a"
# A source whose name ends so is compiled with these flags where the compiler takes them, and chosen at run time.
ISA_FLAGS = {
    "_avx2.cpp": ("-mavx2", "-mfma"),
    "_avxvnni.cpp": ("-mavx2", "-mfma", "-mavxvnni"),
    "_avx512.cpp": ("-mavx512f", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "_avx512vnni.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma",
                        "-mprefer-vector-width=512"),
    "_avx512bf16.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma",
                        "-mprefer-vector-width=512"),
    "_amx.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma",
                 "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mprefer-vector-width=512"),
}  # fmt: skip
# Sources named so round every operation by itself, so that all instruction sets give the same bits.
EXACT = ("narrow_", ("-ffp-contract=off",))
# A CUDA source whose name ends so uses instructions only this architecture has.
ARCH_ONLY = {"_sm90a.cu": "90a"}


class SettingError(Exception):
    """A setting from the environment that cannot be followed."""


@dataclass
class Cuda:
    """The CUDA compiler and what to compile for; ``reason`` says why ``nvcc`` is None."""

    nvcc: str | None = None
    version: str = ""
    archs: tuple[str, ...] = ()
    reason: str = ""
    flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)


def parse_cuda_mode(text: str | None) -> str:
    """``auto``, ``0`` or ``1`` from the value of CTXFAST_CUDA (None: not set)."""
    mode = "auto" if text is None or not text.strip() else text.strip().lower()
    if mode not in ("auto", "0", "1"):
        raise SettingError(f"ctxfast: CTXFAST_CUDA is {text!r}; expected auto, 0 or 1.")
    return mode


def parse_archs(text: str | None) -> tuple[str, ...]:
    """Architectures from the value of CTXFAST_CUDA_ARCHS, e.g. ``80;90a`` -> ("80", "90a")."""
    words = re.split(r"[;,\s]+", (DEFAULT_ARCHS if text is None else text).strip())
    words = [word for word in words if word]
    for word in words:
        if not re.fullmatch(r"\d{2,3}[af]?", word) or int(word.rstrip("af")) < 80:
            raise SettingError(
                f"ctxfast: CTXFAST_CUDA_ARCHS holds {word!r}; expected numbers from 80 up like {DEFAULT_ARCHS}."
            )
    if not words:
        raise SettingError(f"ctxfast: CTXFAST_CUDA_ARCHS is empty; expected a list like {DEFAULT_ARCHS}.")
    return tuple(dict.fromkeys(words))


def gencode(archs: tuple[str, ...], source_name: str = "") -> list[str]:
    """nvcc's flags for one source: machine code of every architecture, and PTX of the newest."""
    for suffix, only in ARCH_ONLY.items():
        if source_name.endswith(suffix):
            return [f"-gencode=arch=compute_{only},code=sm_{only}"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(int(arch.rstrip("af")) for arch in archs)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_nvcc(environ: dict[str, str]) -> tuple[str | None, str]:
    """Path of nvcc, or None and the reason."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = environ.get(name)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            return (str(nvcc), "") if nvcc.is_file() else (None, f"{name} is {home}, which has no bin/nvcc")
    nvcc_on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc_on_path:
        return nvcc_on_path, ""
    # The environment's own packages: with build isolation they are not on sys.path.
    for site in {sysconfig.get_path("purelib"), *sys.path}:
        for nvcc in sorted(Path(site or ".").glob("nvidia/*/bin/nvcc"), reverse=True):
            return str(nvcc), ""
    return None, "no nvcc in CUDA_HOME, on PATH or among NVIDIA's pip packages"


def find_cuda(environ: dict[str, str]) -> Cuda:
    """The CUDA toolkit as the settings want it; SettingError if it is required and not there."""
    mode = parse_cuda_mode(environ.get("CTXFAST_CUDA"))
    archs = parse_archs(environ.get("CTXFAST_CUDA_ARCHS"))
    if mode == "0":
        return Cuda(reason="built with CTXFAST_CUDA=0")
    nvcc, reason = find_nvcc(environ)
    version = ""
    if nvcc:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        found = re.search(r"release (\d+\.\d+)", answer.stdout)
        if found:
            version = found[1]
        else:
            nvcc, reason = None, f"{nvcc} --version does not answer like nvcc"
    if not nvcc:
        if mode == "1":
            raise SettingError(
                f"ctxfast: CTXFAST_CUDA=1 asks for CUDA kernels, but {reason}. Install the CUDA toolkit."
            )
        return Cuda(reason=reason)
    cuda = Cuda(nvcc, version, archs)
    # NVIDIA's pip packages of CUDA 12 put headers and libraries beside nvcc's folder, not inside.
    package = Path(nvcc).resolve().parents[1]
    if package.parent.name == "nvidia":
        cuda.flags = [f"-I{folder}" for folder in sorted(package.parent.glob("*/include"))]
        cuda.link_flags = [f"-L{folder}" for folder in sorted(package.parent.glob("*/lib"))]
    return cuda


def find_cxx(environ: dict[str, str]) -> list[str]:
    """The C++ compiler's command."""
    for command in (environ.get("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
        if words and command == environ.get("CXX"):
            raise SettingError(f"ctxfast: CXX is {command!r}, which is not there; expected a C++17 compiler.")
    raise SettingError("ctxfast: no C++ compiler (c++, g++, clang++) on PATH. Install one or set CXX.")


def find_ninja() -> str:
    try:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.is_file():
            return str(path)
    except ImportError:
        pass
    on_path = shutil.which("ninja")
    if on_path is None:
        raise SettingError("ctxfast: ninja is not there. Install it: pip install ninja.")
    return on_path


def accepted_isas(cxx: list[str]) -> list[str]:
    """The suffixes of ISA_FLAGS whose flags this compiler takes: none on other processors than x86-64."""

    def takes(flags: tuple[str, ...]) -> bool:
        command = [*cxx, *flags, "-x", "c++", "-E", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    return [suffix for suffix, flags in ISA_FLAGS.items() if takes(flags)]


def is_ours(path: Path) -> bool:
    """Whether a source belongs into the extension: neither a test program nor the emulator."""
    return not path.name.startswith("test_") and path.parent.name != "emulator"


def is_binding(path: Path) -> bool:
    return path.name.startswith("bind") or path.name == "module.cpp"


def has_kernels(path: Path, cuda: Cuda) -> bool:
    """Whether what a binding binds is compiled."""
    if not path.name.startswith("bind_cuda"):
        return True
    return cuda.nvcc is not None and (not path.stem.endswith("_sm90a") or "90a" in cuda.archs)


def sources(cuda: Cuda, isas: list[str]) -> list[Path]:
    """Every source of this build, in order; ``isas`` as from ``accepted_isas``."""
    left_out = tuple(set(ISA_FLAGS) - set(isas))
    chosen = [path for path in sorted(CSRC.glob("*/*.cpp")) if not path.name.endswith(left_out) and is_ours(path)]
    chosen = [path for path in chosen if has_kernels(path, cuda)]
    if cuda.nvcc:
        for path in filter(is_ours, sorted(CSRC.glob("*/*.cu"))):
            needs = [arch for suffix, arch in ARCH_ONLY.items() if path.name.endswith(suffix)]
            if all(arch in cuda.archs for arch in needs):
                chosen.append(path)
    return chosen


def cpu_flags(name: str) -> list[str]:
    """Flags of one CPU source."""
    flags = [flag for suffix, listed in ISA_FLAGS.items() if name.endswith(suffix) for flag in listed]
    return [*flags, *EXACT[1]] if EXACT[0] in name else flags


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


def ninja_file(cxx: list[str], cuda: Cuda, target: Path, folder: Path) -> str:
    """The text of build.ninja: one object per source, one shared library."""
    import pybind11

    def escaped(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    includes = [f"-I{CSRC}", f"-I{folder}"]
    isas = accepted_isas(cxx)
    define = [f"-DCTXFAST_SM90A={int('90a' in cuda.archs)}"]
    isa_defines = [f"-DCTXFAST_{suffix[1:-4].upper()}=1" for suffix in isas]
    cxx_flags = [
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-fPIC",
        "-fvisibility=hidden",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-ffp-contract=fast",
    ]
    python_flags = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    compile_cxx = command([*cxx, *cxx_flags, *includes, *define, *isa_defines])
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {compile_cxx} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    link = [*cxx, "-shared", "-pthread", "-Wl,--exclude-libs,ALL"]
    libraries = ["-ldl"]
    if cuda.nvcc:
        host = ["-ccbin", cxx[0]] if len(cxx) == 1 else []
        nvcc_flags = [
            "-std=c++17",
            "-O3",
            "-DNDEBUG",
            "-lineinfo",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ]
        compile_cuda = [cuda.nvcc, *host, *nvcc_flags, *cuda.flags, *includes, *define]
        lines += [
            "rule nvcc",
            f"  command = {command(compile_cuda)} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        # nvcc knows where its static runtime lies; the result needs no CUDA library to load.
        link = [
            cuda.nvcc,
            *host,
            "-shared",
            "-cudart=static",
            "-Xlinker=--exclude-libs,ALL",
            *cuda.link_flags,
        ]
        libraries = ["-ldl", "-lpthread", "-lrt"]
    lines += ["rule link", f"  command = {command(link)} $in -o $out {command(libraries)}"]
    objects = []
    for source in sources(cuda, isas):
        obj = f"{source.parent.name}_{source.stem}.o"
        rule, flags = "cxx", []
        if source.suffix == ".cu":
            rule, flags = "nvcc", gencode(cuda.archs, source.name)
        elif is_binding(source):
            flags = python_flags
        else:
            flags = cpu_flags(source.name)
        lines += [f"build {obj}: {rule} {escaped(source)}", f"  flags = {command(flags)}"]
        objects.append(obj)
    lines += [
        f"build {escaped(target)}: link {' '.join(objects)}",
        f"default {escaped(target)}",
        "",
    ]
    return "\n".join(lines)


def write_if_changed(path: Path, text: str) -> None:
    """Write ``path`` unless it holds ``text`` already: ninja then rebuilds nothing."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class BuildExtension(build_ext):
    """``build_ext`` through ninja; objects stay in ``build/<abi>``: a second build does what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            cuda = find_cuda(dict(os.environ))
            cxx = find_cxx(dict(os.environ))
            ninja = find_ninja()
        except SettingError as error:
            raise SystemExit(f"error: {error}") from None
        answer = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False)
        compiler = (answer.stdout.splitlines() or [" ".join(cxx)])[0]
        folder = ROOT / "build" / sysconfig.get_config_var("SOABI")
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / Path(self.get_ext_filename(ext.name)).name
        header = build_info_header(self.distribution.get_version(), compiler, cuda)
        write_if_changed(folder / "ctxfast_build_info.h", header)
        write_if_changed(folder / "build.ninja", ninja_file(cxx, cuda, Path(built.name), folder))
        command = [ninja, "-C", str(folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, check=False).returncode != 0:
            hint = " If only nvcc failed: CTXFAST_CUDA=0 builds without CUDA kernels." if cuda.nvcc else ""
            raise SystemExit(f"error: ctxfast: the extension did not build, see above.{hint}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old one mapped keeps it.
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(built, temporary)
        os.replace(temporary, target)
        print(f"ctxfast: built {target.name}: CPU kernels with {compiler}")
        if cuda.nvcc:
            print(f"ctxfast: CUDA kernels with nvcc {cuda.version} for {', '.join(cuda.archs)} and PTX")
        else:
            print(f"ctxfast: no CUDA kernels: {cuda.reason}")


def main() -> None:
    extensions = []
    if sys.platform == "linux":
        every = [str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("*/*.c*")) if is_ours(path)]
        extensions = [Extension("ctxfast._C", sources=every)]
    else:
        print(f"ctxfast: no compiled extension on {sys.platform}: it is built on Linux only.")
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()

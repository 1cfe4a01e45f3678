"""C++ compilers: translated kernels to programs, each text once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from runner.metal.translate import translate

HERE = Path(__file__).resolve().parent
SHIM = HERE / "shim"
HOST = HERE / "host"
PRELUDE = '#include "emulated/metal.h"\n'
COMPILE_TIMEOUT_S = 300
# What C++ leaves undefined ends the program with a message.
CHECKS = "bounds,alignment,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
# Half numbers are rounded after every operation, and nothing is contracted: Metal's text decides, not the processor.
KERNEL_FLAGS = (
    *("-std=c++14", "-O1", "-g0", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-fsigned-char", "-ftrivial-auto-var-init=pattern", f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all"),
    *("-Werror=vla", "-Werror=return-type", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-c++17-extensions"),
)
OPTIONAL_FLAGS = ("-mf16c", "-mfma", "-fexcess-precision=16")


class CompileError(RuntimeError):
    """The compiler refused a kernel; the message is its own. MLX too raises a RuntimeError then."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler, and the folder that keeps what it made."""

    compiler: str
    folder: Path

    @cached_property
    def _flags(self) -> tuple[str, ...]:
        """Those that compile and run a program on this machine."""
        optional = [flag for flag in OPTIONAL_FLAGS if self._can_run(flag)]
        return (*KERNEL_FLAGS, *optional)

    @cached_property
    def _runtime_digest(self) -> str:
        sources = [path for folder in (SHIM, HOST) for path in sorted(folder.rglob("*")) if path.is_file()]
        version = _run([self.compiler, "--version"]).stdout
        return _digest(version, *self._flags, *(path.read_text(encoding="utf-8") for path in sources))

    @cached_property
    def _runtime(self) -> tuple[Path, Path]:
        """Folder of the precompiled prelude, and the emulator's object file."""
        folder = self.folder / f"runtime-{self._runtime_digest}"
        finished = folder / "emulator.o"
        if not finished.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "prelude.h").write_text(PRELUDE, encoding="utf-8")
            self._compile(["-x", "c++-header", str(folder / "prelude.h")], folder / "prelude.h.gch", self._flags)
            self._compile(["-c", str(HOST / "emulator.cpp")], finished, ("-std=c++17", "-O2", "-g0"))
        folder.touch()
        return folder, finished

    def build(self, text: str) -> Path:
        """The program of a Metal text, as MLX hands it to Metal's compiler.

        Raises:
            NotMetalError: the text is no Metal.
            CompileError: the compiler refused it.
        """
        program = self.folder / f"kernel-{_digest(self._runtime_digest, text)}"
        if program.exists():
            program.touch()  # the old ones are removed some day
            return program
        prelude, emulator = self._runtime
        source = program.with_name(f"{program.name}.{os.getpid()}.cpp")
        source.write_text(translate(self._preprocess(text)), encoding="utf-8")
        self._compile(["-include", str(prelude / "prelude.h"), str(source), str(emulator)], program, self._flags)
        source.unlink()
        return program

    def build_all(self, texts: Iterable[str]) -> None:
        """Compile side by side what is not compiled yet. Errors are left to `build`."""
        texts = [*dict.fromkeys(texts)]
        if not texts:
            return
        _ = self._runtime
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(self.build, text) for text in texts]
        for future in futures:
            future.exception()

    def _preprocess(self, text: str) -> str:
        """Macros replaced; only Metal's headers can be included."""
        command = [self.compiler, "-E", "-x", "c++", "-std=c++14", "-undef", "-nostdinc", "-nostdinc++"]
        # MLX's own prelude, in front of every kernel, includes Metal's library
        command += [f"-I{SHIM}", "-include", "metal_stdlib", "-D__METAL__", "-D__METAL_VERSION__=320", "-w", "-"]
        done = _run(command, text=f'#line 1 "kernel"\n{text}')
        if done.returncode:
            raise CompileError(done.stderr)
        return done.stdout

    def _compile(self, arguments: list[str], target: Path, flags: tuple[str, ...]) -> None:
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        done = _run([self.compiler, *flags, f"-I{SHIM}", *arguments, "-o", str(unfinished)])
        if done.returncode:
            raise CompileError(done.stderr)
        unfinished.replace(target)

    def _can_run(self, flag: str) -> bool:
        program = self.folder / f"probe-{_digest(self.compiler, flag)}"
        command = [self.compiler, "-x", "c++", "-Werror", flag, "-", "-o", str(program)]
        if _run(command, text="int main() { return 0; }").returncode:
            return False
        if flag == "-mf16c" or flag == "-mfma":
            return flag.removeprefix("-m") in _processor_features()
        return True


def find_compiler() -> str | None:
    """$CXX, c++, g++ or clang++: the first that is there."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def _processor_features() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


def _run(command: list[str], *, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S
    )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]

"""Builds csrc/cuda, and the kernels of a CPU behind the same interface, and calls both by ctypes.

Both libraries also have the functions of gpu_device.cu, so that whoever calls them need not know which one it is.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
STAND_IN = ROOT / "tests" / "cuda_on_cpu"
# What the processor must have for an instruction set, as /proc/cpuinfo calls it; best first.
FLAGS = {"avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"}, "avx2": {"avx2", "fma"}, "baseline": set()}

Pointer = ctypes.c_void_p
int64 = ctypes.c_int64


class Variable(ctypes.Structure):
    """WdopsVariable."""

    _fields_ = [
        ("n", int64),
        ("dtype", ctypes.c_int32),
        ("slot_dtype", ctypes.c_int32),
        ("param", Pointer),
        ("grad", Pointer),
        ("slot", Pointer * 3),
        ("accumulator", Pointer),
        ("average", Pointer),
        ("rows", Pointer),
        ("x", Pointer),
        ("dz", Pointer),
        ("batch", int64),
        ("width", int64),
    ]


SCALED_PROXIMAL, STOCHASTIC = 1, 2
_ACTIVATION = [ctypes.c_int, ctypes.c_int, Pointer, int64, int64, int64]
_FUNCTIONS = {
    "wdops_cuda_table_bytes": (int64, [ctypes.c_int]),
    "wdops_cuda_fill_table": (None, [Pointer, ctypes.c_int, Pointer]),
    "wdops_cuda_steps_bytes": (int64, [ctypes.c_int]),
    "wdops_cuda_fill_steps": (None, [ctypes.c_int, Pointer, Pointer, ctypes.c_int, ctypes.c_int, Pointer]),
    "wdops_cuda_scratch_bytes": (int64, [Pointer]),
    "wdops_cuda_apply": (None, [ctypes.c_int, *[Pointer] * 4, ctypes.c_int, Pointer, ctypes.c_int, *[Pointer] * 3]),
    "wdops_cuda_norms": (None, [*[Pointer] * 4, ctypes.c_int, *[Pointer] * 5]),
    "wdops_cuda_clip_scale": (None, [Pointer, ctypes.c_int, ctypes.c_double, Pointer, Pointer]),
    "wdops_cuda_activate": (None, [*_ACTIVATION, *[Pointer] * 4]),
    "wdops_cuda_activate_scratch_bytes": (int64, [int64] * 3),
    "wdops_cuda_activate_grad": (None, [*_ACTIVATION, *[Pointer] * 6]),
    "wdops_cuda_available": (None, []),
    "device_name": (None, [Pointer, ctypes.c_int]),
    "device_version": (None, [Pointer]),
    "device_memory": (None, [Pointer, Pointer]),
    "device_allocate": (None, [Pointer, int64]),
    "device_free": (None, [Pointer]),
    "device_allocate_pinned": (None, [Pointer, int64]),
    "device_free_pinned": (None, [Pointer]),
    "device_copy": (None, [Pointer, Pointer, int64, Pointer]),
    "device_new_stream": (None, [Pointer]),
    "device_wait": (None, [Pointer]),
    "device_new_event": (None, [Pointer]),
    "device_record": (None, [Pointer, Pointer]),
    "device_milliseconds": (None, [Pointer, Pointer, Pointer]),
    "device_begin_capture": (None, [Pointer]),
    "device_end_capture": (None, [Pointer, Pointer]),
    "device_launch": (None, [Pointer, Pointer]),
}


class CudaError(RuntimeError):
    """A function returned a cudaError_t that is not 0."""


class Library:
    """The functions of cuda/interface.h and gpu_device.cu; those that return a cudaError_t raise it."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path.resolve()))
        self._library.wdops_cuda_error.restype = ctypes.c_char_p
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = result or ctypes.c_int
            if result is None:
                function.errcheck = self._raise
            setattr(self, name.removeprefix("wdops_cuda_"), function)
        self.available()
        self.stream = self.made("new_stream")

    def _raise(self, error: int, function: Any, _arguments: Any) -> None:
        if error:
            raise CudaError(f"{function.__name__}: {self._library.wdops_cuda_error(error).decode()}")

    def made(self, function: str, *arguments: Any) -> int | None:
        """The pointer that a function of gpu_device.cu writes to its first or, behind arguments, last parameter."""
        pointer = Pointer()
        getattr(self, f"device_{function}")(*arguments, ctypes.byref(pointer))
        return pointer.value

    @cached_property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.device_name(text, len(text))
        return text.value.decode()

    @property
    def driver(self) -> int:
        version = ctypes.c_int()
        self.device_version(ctypes.byref(version))
        return version.value

    @property
    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.device_memory(ctypes.byref(free), ctypes.byref(total))
        return free.value


class Memory:
    """Some bytes on a library's device, until `free` or the end of a `with`."""

    def __init__(self, library: Library, content: np.ndarray | int) -> None:
        """`content`: bytes, or how many."""
        self.library = library
        self.bytes = content if isinstance(content, int) else content.nbytes
        pointer = Pointer()
        library.device_allocate(ctypes.byref(pointer), max(self.bytes, 1))
        self.at = pointer.value
        if not isinstance(content, int):
            self.write(content)

    def write(self, content: np.ndarray) -> None:
        self.library.device_copy(self.at, content.ctypes.data, content.nbytes, self.library.stream)
        self.library.device_wait(self.library.stream)

    def read(self) -> np.ndarray:
        content = np.empty(self.bytes, np.uint8)
        self.library.device_copy(content.ctypes.data, self.at, self.bytes, self.library.stream)
        self.library.device_wait(self.library.stream)
        return content

    def free(self) -> None:
        self.library.device_free(self.at)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


class Plan:
    """Variables with the constants of a step, which stay on a library's device until `free` or the end of a `with`.

    `hypers`: an array [count, names] of one set for each variable, or [names], of one for all. Without a rule it is the
    gradient's alone, for norms.
    """

    def __init__(
        self, library: Library, variables: list[Variable], rule: int | None, hypers: np.ndarray, options: int = 0
    ) -> None:
        self.library, self.count, self.options = library, len(variables), options
        self.rule = -1 if rule is None else rule
        self.host_table = np.zeros(library.table_bytes(self.count), np.uint8)
        library.fill_table((Variable * self.count)(*variables), self.count, self.host_table.ctypes.data)
        self.table = Memory(library, self.host_table)
        self.steps = Memory(library, library.steps_bytes(1 if hypers.ndim == 1 else self.count))
        pinned = Pointer()
        library.device_allocate_pinned(ctypes.byref(pinned), self.steps.bytes)
        self.pinned = pinned.value
        self.scratch = Memory(library, library.scratch_bytes(self.host_table.ctypes.data))
        self.fill(hypers)
        self.send()
        library.device_wait(library.stream)

    def fill(self, hypers: np.ndarray) -> None:
        """Makes the constants of a step, on the host."""
        self.library.fill_steps(
            self.rule, self.host_table.ctypes.data, hypers.ctypes.data, hypers.ndim == 1, self.options, self.pinned
        )

    def send(self) -> None:
        """Copies them to the device, in the order of the stream."""
        self.library.device_copy(self.steps.at, self.pinned, self.steps.bytes, self.library.stream)

    def apply(
        self,
        *,
        grad_scale: int | None = None,
        grad_scales: bool = False,
        clip_scale: int | None = None,
        clip_scales: bool = False,
        penalty: int | None = None,
    ) -> None:
        """The arguments are addresses on the device."""
        self.library.apply(
            self.rule, self.host_table.ctypes.data, self.table.at, self.steps.at, grad_scale, grad_scales, clip_scale,
            clip_scales, penalty, self.scratch.at, self.library.stream,
        )  # fmt: skip

    def norms(
        self, norm: int, penalty: int, finite: int, *, grad_scale: int | None = None, grad_scales: bool = False
    ) -> None:
        self.library.norms(
            self.host_table.ctypes.data, self.table.at, self.steps.at, grad_scale, grad_scales, norm, penalty, finite,
            self.scratch.at, self.library.stream,
        )  # fmt: skip

    def free(self) -> None:
        self.library.device_wait(self.library.stream)
        for memory in (self.table, self.steps, self.scratch):
            memory.free()
        self.library.device_free_pinned(self.pinned)

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


# ---- building


@dataclass(frozen=True)
class Tables:
    """The tables of csrc/rules, as the libraries know them."""

    rules: dict[str, dict[str, Any]]  # by name: slots, hypers, trust
    step_hypers: list[str]
    gradient_hypers: int  # so many of them are the gradient's
    dtypes: list[str]
    layouts: list[tuple[str, str]]
    activations: dict[str, list[str]]  # hyperparameters by name
    isa: str

    def rule(self, name: str) -> int:
        return list(self.rules).index(name)

    def hypers(self, rule: str) -> list[str]:
        return [*self.step_hypers, *self.rules[rule]["hypers"]]

    @classmethod
    def of(cls, path: Path) -> Tables:
        text = ctypes.CDLL(str(path)).wdops_tables
        text.restype = ctypes.c_char_p
        found = json.loads(text())
        if found.pop("variable_bytes") != ctypes.sizeof(Variable):
            raise RuntimeError("cuda/interface.h has another WdopsVariable than gpu_libraries.py")
        found["rules"] = {rule.pop("name"): rule for rule in found["rules"]}
        found["layouts"] = [tuple(layout) for layout in found["layouts"]]
        found["activations"] = {activation["name"]: activation["hypers"] for activation in found["activations"]}
        return cls(**found)


def why_no_card() -> str | None:
    """Asked before anything is built; None: there is one."""
    try:
        error = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return "there is no CUDA driver"
    return f"the CUDA driver's cuInit returns {error}" if error else None


def nvcc() -> str | None:
    """The compiler's path, on PATH or where CUDA is installed."""
    places = [shutil.which("nvcc"), *(f"{os.environ.get(v)}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH"))]
    return next((place for place in (*places, "/usr/local/cuda/bin/nvcc") if place and Path(place).exists()), None)


def best_isa() -> str:
    flags: set[str] = set()
    with suppress(OSError):
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(found[1].split()) if found else flags
    return next(isa for isa, needed in FLAGS.items() if needed <= flags)


def cmake_options() -> dict[str, list[str]]:
    """The compilers' options by the names that CMakeLists.txt gives them, so that they stand once."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(r'set\((\w+)_options "?([^")]*)"?\)', text)
    return {name: options.split() for name, options in found}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


class Shared:
    """A shared library, under a name that has a digest of all it is made of: one that is there is used again."""

    def __init__(
        self, folder: Path, name: str, sources: dict[Path, list[str]], link: list[str], made_of: list[Path]
    ) -> None:
        """`sources`: with the command that compiles each; `made_of`: the folders of what they include."""
        digest = hashlib.sha256(repr((sorted(sources.items()), link)).encode())
        for path in sorted(path for place in made_of for path in place.rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
        self.path = folder.resolve() / f"{name}-{digest.hexdigest()[:16]}.so"
        self.sources, self.link = sources, link

    def commands(self) -> list[list[str]]:
        if self.path.exists():
            return []
        self._objects.mkdir(parents=True, exist_ok=True)
        return [[*command, "-c", str(source), "-o", self._object(source)] for source, command in self.sources.items()]

    def linked(self) -> Path:
        if not self.path.exists():
            unfinished = self._objects / "linked"
            _run([*self.link, "-shared", "-o", str(unfinished), *map(self._object, self.sources)])
            unfinished.replace(self.path)
            shutil.rmtree(self._objects)
        return self.path

    @property
    def _objects(self) -> Path:
        return self.path.with_suffix(".objects")

    def _object(self, source: Path) -> str:
        return str(self._objects / f"{source.name}.o")


def _gpp(csrc: Path) -> list[str]:
    return ["g++", "-std=c++17", f"-I{csrc}", "-fPIC", "-fvisibility=hidden", *cmake_options()["rule"]]


def _on_stand_in(csrc: Path) -> list[str]:
    """Quickly rather than well."""
    return [*_gpp(csrc), "-O1", f"-I{STAND_IN}", "-x", "c++"]


def kernels(device: str, csrc: Path, folder: Path, architecture: str = "native") -> Shared:
    """The kernels of csrc/cuda, by nvcc for "gpu", and for "cpu" by g++ against the stand-in for CUDA's runtime."""
    if device == "gpu":
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("there is no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda")
        link = [compiler, f"-arch={architecture}"]
        command = [*link, "-std=c++17", "-O3", f"-I{csrc}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += cmake_options()["cuda"]
    else:
        link, command = ["g++"], _on_stand_in(csrc)
    sources = [*(csrc / "cuda").glob("*.cu"), HERE / "gpu_device.cu"]
    return Shared(folder, "kernels", dict.fromkeys(sources, command), link, [csrc, STAND_IN, HERE])


def kernels_of_cpu(device: str, csrc: Path, folder: Path) -> Shared:
    """The kernels of the CPU behind the same interface: for "gpu", those of its best instruction set."""
    isa = best_isa() if device == "gpu" else "baseline"
    command = [*_gpp(csrc), *cmake_options()[isa], f'-DWDOPS_ISA="{isa}"', *([] if device == "gpu" else ["-O1"])]
    sources = {source: command for source in (csrc / "cpu").glob("*.cc") if source.stem != "dispatch"}
    sources |= {HERE / "cpu_interface.cc": command, HERE / "gpu_device.cu": _on_stand_in(csrc)}
    return Shared(folder, "cpu", sources, ["g++"], [csrc, STAND_IN, HERE])


def build(*libraries: Shared) -> list[Path]:
    """Compiles all their sources side by side."""
    commands = [command for library in libraries for command in library.commands()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    return [library.linked() for library in libraries]

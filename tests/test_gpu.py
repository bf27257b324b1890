"""The TensorFlow half of the kernels for a GPU: run without one, loaded where there is a use for it, and told about."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorflow as tf
from test_cuda import ROOT, build
from test_package import PACKAGE, copy_package, fails, python, run

import wdops

HERE = ROOT / "tests/cuda_on_cpu"
# Only of the library as it is installed, which is not built where CMake finds no nvcc: what is in it is tested by g++.
needs_nvcc = pytest.mark.skipif(wdops.build_info()["cuda"] is None, reason="no CUDA compiler was found")


def build_gpu(folder: Path) -> None:
    """The libraries that make a GPU of the CPU: kernels, ops and device."""
    tensorflow = Path(tf.sysconfig.get_lib())
    include = [f"-I{ROOT}/csrc", "-isystem", tf.sysconfig.get_include()]
    flags = ["-O1", "-shared", "-fPIC", "-Wall", *tf.sysconfig.get_compile_flags(), *include]
    link = [tensorflow / "libtensorflow_framework.so.2", "-Wl,-z,defs"]
    with ThreadPoolExecutor() as pool:
        kernels = pool.submit(build, ROOT / "csrc", folder)
        device = [*flags, HERE / "device.cc", *link, "-o", folder / "libdevice.so"]
        done = [pool.submit(subprocess.run, ["g++", *map(str, device)], check=True)]
        objects = []
        for source in sorted((ROOT / "csrc/gpu").glob("*.cc")):
            objects.append(folder / f"gpu_{source.stem}.o")
            compile_ = [*(f for f in flags if f != "-shared"), "-c", source, "-o", objects[-1]]
            done.append(pool.submit(subprocess.run, ["g++", *map(str, compile_)], check=True))
        library = Path(kernels.result()._name)
        for future in done:
            future.result()
    ops = ["-shared", *objects, library, *link, "-Wl,-rpath,$ORIGIN", "-o", folder / "libwdops_gpu.so"]
    subprocess.run(["g++", *map(str, ops)], check=True)


def test_the_ops_on_a_gpu_that_is_none(tmp_path):
    build_gpu(tmp_path)
    tests = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-o", "addopts=-q", HERE / "ops_on_a_gpu.py"]
    result = run(*tests, "-k", "not jit and not hlo", check=False, WDOPS_GPU_ON_CPU=str(tmp_path))
    assert result.returncode == 0, result.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 200


# ---- where it is loaded


@needs_nvcc
def test_the_library_loads_whole_under_a_tensorflow_without_cuda():
    code = """
import ctypes, os, tensorflow as tf, wdops
from tensorflow.python.framework import kernels
folder = os.path.dirname(wdops.__file__)
ctypes.CDLL(f"{folder}/libwdops_gpu.so", os.RTLD_NOW)
print(*(k.device_type for k in kernels.get_registered_kernels_for_op("Wdops>ApplyAdam").kernel))
"""
    assert "GPU" in python(code).stdout


def test_what_is_not_loaded_is_told_and_nothing_else_is():
    result = python("import wdops; print(wdops.build_info()['gpu'])")
    if wdops.build_info()["cuda"] is None:
        assert result.stdout == "not built: CMake found no CUDA compiler\n"
    elif not tf.test.is_built_with_cuda():
        assert result.stdout == "not loaded: this TensorFlow is built without CUDA\n"
    assert "wdops" not in result.stderr and "libcuda" not in result.stderr


_WITH_CUDA = "import tensorflow as tf; tf.test.is_built_with_cuda = lambda: True; import wdops; "


@needs_nvcc
def test_without_a_driver_it_is_not_loaded():
    assert "no CUDA driver" in python(_WITH_CUDA + "print(wdops.build_info()['gpu'])").stdout


@needs_nvcc
def test_beside_a_driver_it_is_loaded_and_a_broken_one_is_an_error(tmp_path):
    package = copy_package(tmp_path)
    run("g++", "-shared", "-o", tmp_path / "libcuda.so.1", "-x", "c++", os.devnull)
    environment = {"PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    assert python(_WITH_CUDA + "print(wdops.build_info()['gpu'])", **environment).stdout == "loaded\n"
    (package / "libwdops_cuda.so").unlink()
    message = fails(_WITH_CUDA, **environment)
    assert message.startswith("ImportError: libwdops_gpu.so of wdops") and "pip install" in message


@needs_nvcc
def test_info_says_whether_there_is_a_card():
    (line,) = (x for x in run(sys.executable, "-m", "wdops", "info").stdout.splitlines() if x.startswith("kernels for"))
    assert wdops.build_info()["gpu"] in line and "; card: " in line
    assert PACKAGE.joinpath("libwdops_gpu.so").exists()

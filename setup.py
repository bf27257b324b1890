"""Calls CMake; every decision is in CMakeLists.txt, all metadata in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds csrc/ into the package's folder: that of the sources for an editable install."""

    def run(self) -> None:
        package = Path("src" if self.inplace else self.build_lib, "wdops").resolve()
        # Not build_temp, which is a new folder at every editable install: a second build is incremental.
        build = Path("build", f"cmake-{sys.implementation.cache_tag}")
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DWDOPS_VERSION={self.distribution.get_version()}",
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ".", "-B", build, *configure], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(ext_modules=[Extension("wdops._native", [])], cmdclass={"build_ext": CMakeBuild})

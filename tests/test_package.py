"""The package as a user meets it: imports, messages, libraries, the command line, and the README."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import wdops

ROOT = Path(__file__).parents[1]
PACKAGE = Path(wdops.__file__).parent
README = (ROOT / "README.md").read_text()


def run(*command, check=True, cwd=None, **environment):
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=os.environ | environment
    )
    assert not check or result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def python(code, **options):
    return run(sys.executable, "-c", code, **options)


def fails(code, **options):
    result = python(code, check=False, **options)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


# ---- importing


def test_build_info_tells_what_was_built():
    import tensorflow as tf

    info = wdops.build_info()
    assert info["version"] == wdops.__version__
    assert info["tensorflow"].split(".")[:2] == tf.__version__.split(".")[:2]
    assert info["cxx11_abi"] == tf.sysconfig.CXX11_ABI_FLAG
    assert info["compiler"].split()[0] in ("GNU", "Clang")
    assert set(info["isas"]) >= set(wdops.isa.available()) >= {"baseline"}
    assert (info["cuda"] is not None) == (PACKAGE / "libwdops_cuda.so").exists()


@pytest.mark.parametrize("found", ["2.20.0", "2.22.1", "3.21.0"])
def test_another_tensorflow_gets_one_clear_message(found):
    message = fails(f"import tensorflow; tensorflow.__version__ = '{found}'; import wdops")
    assert message.startswith("ImportError: wdops ")
    for part in (wdops.build_info()["tensorflow"], found, "pip install"):
        assert part in message


def test_another_patch_of_the_same_tensorflow_is_taken():
    minor = wdops.build_info()["tensorflow"].rpartition(".")[0]
    python(f"import tensorflow; tensorflow.__version__ = '{minor}.99'; import wdops")


def copy_package(folder, ignore=()):
    return shutil.copytree(PACKAGE, folder / "wdops", ignore=shutil.ignore_patterns("__pycache__", *ignore))


def test_a_package_that_was_not_built_says_so(tmp_path):
    copy_package(tmp_path, ("_build_info.py", "*.so"))
    assert "ImportError: wdops is not built here" in fails("import wdops", PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("library", ["ops", "xla"])
def test_a_library_that_does_not_load_gets_one_clear_message(library, tmp_path):
    """As one does whose symbols this TensorFlow lacks."""
    path = copy_package(tmp_path) / f"libwdops_{library}.so"
    source = tmp_path / "undefined.cc"
    source.write_text("void undefined_in_this_tensorflow(); struct A { A() { undefined_in_this_tensorflow(); } } a;")
    run("g++", "-shared", "-fPIC", source, "-o", path)
    message = fails("import wdops", PYTHONPATH=str(tmp_path))
    assert message.startswith(f"ImportError: libwdops_{library}.so of wdops") and "pip install" in message


_STEP = """
import tensorflow as tf, wdops
for jit in (False, True):
    variable = tf.Variable([2.0])
    tf.function(lambda: wdops.ops.apply_sgd(variable, tf.constant([1.0]), lr=1.0), jit_compile=jit)()
    assert variable.numpy()[0] == 1
print(wdops.isa.active(), wdops.__file__)
"""


def test_the_package_can_be_moved(tmp_path):
    copy_package(tmp_path)
    assert str(tmp_path) in python(_STEP, PYTHONPATH=str(tmp_path)).stdout
    for library in PACKAGE.glob("*.so"):
        path = re.search(r"R(?:UN)?PATH.*\[(.*)\]", run("readelf", "-d", library).stdout)
        assert path is None or all(p.startswith("$ORIGIN") for p in path[1].split(":")), library


@pytest.mark.parametrize("isa", wdops.isa.available())
def test_the_environment_chooses_the_instruction_set(isa):
    assert python(_STEP, WDOPS_ISA=isa).stdout.split()[0] == isa


@pytest.mark.parametrize("name", ["avx1024", "", "AVX2", "../libevil"])
def test_an_unknown_instruction_set_is_an_error_and_changes_nothing(name):
    before = wdops.isa.active()
    with pytest.raises(ValueError, match=r"is not one that this processor runs: .*baseline"):
        wdops.isa.use(name)
    assert wdops.isa.active() == before
    if name:
        message = fails("import wdops", WDOPS_ISA=name)
        assert message.startswith("ValueError: the environment variable WDOPS_ISA: instruction set")


def test_importing_after_a_compilation_by_xla_warns():
    """Which takes its kernels once. Eager and graph go on."""
    compile_first = "import tensorflow as tf; tf.function(lambda: tf.ones(3) + 1, jit_compile=True)(); import wdops"
    step = "\nv = tf.Variable([1.0]); wdops.ops.apply_sgd(v, tf.ones(1), lr=1.0); assert v.numpy()[0] == 0"
    assert "wdops was imported after XLA's first compilation" in python(compile_first + step).stderr
    assert "was imported after" not in python("import wdops").stderr


def test_another_program_with_the_word_wdops_on_its_command_line(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import wdops")
    (tmp_path / "program" / "__main__.py").write_text("import wdops; print(wdops.optimizers.SGD)")
    run(sys.executable, "-m", "program", "wdops", cwd=tmp_path)


def test_importing_changes_nothing_else():
    code = """
import os, warnings, logging, locale, signal
import tensorflow as tf, keras
def state():
    return (dict(os.environ), os.getcwd(), warnings.filters[:], logging.root.level, tf.get_logger().level,
            locale.setlocale(locale.LC_ALL), tf.config.threading.get_intra_op_parallelism_threads(),
            keras.config.floatx(), tf.config.optimizer.get_jit(), signal.getsignal(signal.SIGABRT))
before = state()
import wdops
assert state() == before
"""
    python(code)


# ---- libraries


@pytest.mark.parametrize("isa", wdops.build_info()["isas"])
def test_a_library_of_kernels_exports_its_table_and_nothing_else(isa):
    """So that no other library can ever run an inline function that was compiled for this instruction set."""
    library = PACKAGE / f"libwdops_cpu_{isa}.so"
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()]
    assert symbols == ["wdops_cpu_kernels"]
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library).stdout)
    assert not any("tensorflow" in n or "python" in n for n in needed)
    # A contracted product and sum would round once where another machine rounds twice. Factors are multiplied with one
    # rounding on every machine.
    functions = run("objdump", "-dC", library).stdout.split("\n\n")
    rounding_once = [function for function in functions if re.search(r"\bvfn?m(add|sub)", function)]
    assert bool(rounding_once) == (isa != "baseline")
    for function in rounding_once:
        name = function[: function.index("\n")]
        if re.search(r"::(Product|RegisterTile)<", name):
            continue
        # The square of what was a float is exact in a double: rounded once or twice, a sum of them is the same.
        assert re.search(r"PenaltySums::Add<|GradientSums|TrustSums", name), name
        assert not re.search(r"[<,] ?double|GradientSumsId", name), name
        assert set(re.findall(r"\bvfn?m(?:add|sub)\w*([sp][sd])\b", function)) <= {"pd", "sd"}, name


@pytest.mark.parametrize("library", ["cpu", "ops"])
def test_only_the_lowerings_need_all_of_tensorflow(library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", PACKAGE / f"libwdops_{library}.so").stdout)
    assert ("libtensorflow_framework.so.2" in needed) == (library == "ops")
    assert "libtensorflow_cc.so.2" not in needed


# ---- the command line


def test_info(tmp_path):
    result = run(sys.executable, "-m", "wdops", "info", cwd=tmp_path)
    assert result.stderr == ""
    for part in (wdops.__version__, "TensorFlow", f"{wdops.isa.active()} (in use)", "adam", "libwdops_xla.so (loaded)"):
        assert part in result.stdout


def test_demo(tmp_path):
    result = run(sys.executable, "-m", "wdops", "demo", "--epochs", "4", "--steps", "2", cwd=tmp_path)
    assert result.stderr == ""
    for part in ("digits, keras", "training loss", "test accuracy", "largest difference of weights", "speed-up", "ms"):
        assert part in result.stdout
    assert float(re.search(r"largest difference of weights\s+(\S+)", result.stdout)[1]) < 1e-5
    _, full, half = (float(x) for x in re.findall(r"\d\.\d{6}", result.stdout)[:3])  # training loss, bfloat16 slots
    assert 0 < abs(half - full) < 0.01 * full
    assert (tmp_path / "wdops_demo.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("command", [[], ["info"], ["demo"]])
def test_help(command):
    result = run(sys.executable, "-m", "wdops", *command, "--help")
    assert result.stdout.startswith("usage: python -m wdops") and result.stderr == ""


@pytest.mark.parametrize("command", [[], ["fly"], ["demo", "--epochs", "0"], ["demo", "--steps", "x"]])
def test_a_bad_command_line_is_refused(command):
    result = run(sys.executable, "-m", "wdops", *command, check=False)
    assert result.returncode == 2 and "usage:" in result.stderr and "Traceback" not in result.stderr


# ---- the README


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_the_readme_run():
    examples = blocks("python", README.partition("## Add a rule")[0])
    assert len(examples) == 6
    python("\n".join(examples))  # the later ones go on with the model of the first


def test_a_rule_is_added_by_what_the_readme_says_and_nothing_else(tmp_path):
    how_to = README.partition("## Add a rule")[2]
    header, line = blocks("cpp", how_to)
    (reference,) = blocks("python", how_to)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", "*.so", "_build_info.py", "*.egg-info"))
    (tree / "csrc/rules/signum.h").write_text(header)
    table = tree / "csrc/rules/rules.inc"
    table.write_text(table.read_text().replace("#undef RULE", line + "#undef RULE"))
    module = tree / "src/wdops/reference.py"
    module.write_text(module.read_text().replace("def to_float64", reference + "\n\ndef to_float64"))

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    # Not optimized, and for one of all the cards: the installed library is, and its compilation takes a while.
    run(*pip, "--target", site, tree, CMAKE_BUILD_TYPE="Debug", CUDAARCHS="90")
    tests = [sys.executable, "-m", "pytest", "-k", "signum or every_rule", "tests/test_rules.py", "tests/test_ops.py"]
    result = run(*tests, cwd=tree, PYTHONPATH=str(site))
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 150

"""The check of the kernels on a GPU, on the stand-in for a card: it passes, and it finds what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wdops._load import native

ROOT = Path(__file__).parents[1]

# A change to a source, and whether the oracle finds it; the comparison with the CPU's bits finds each.
MUTANTS = {
    "a sign": ("rules/adam.h", "(grad * grad - v)", "(grad * grad + v)", True),
    "the row of another": ("cuda/sweep.cu", "place_begin = v.rows[row] * v.width", "place_begin = row * v.width", True),
    "another rounding": (
        "rules/adam.h",
        "param - step_size * slot[0] / (Sqrt(slot[1]) + epsilon)",
        "param - step_size / (Sqrt(slot[1]) + epsilon) * slot[0]",
        False,
    ),
    "a write behind the end": ("cuda/memory.h", "if (w < place.count) first[w] =", "first[w] =", True),
}


def test_the_check_passes_without_a_card(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device=cpu", f"--build={tmp_path}", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["passed"] and found["machine"]["device"] == "cpu"
    assert "these times mean nothing" in done.stdout
    compared = found["compared"]
    rules = {rule["name"] for rule in native.rules}
    assert set(compared) - rules == {"norms", "clip_scale", "activations", "a captured graph", "refusals"}
    for rule in rules:
        assert compared[rule]["cases"] > 10 and compared[rule]["compared"] > 1e6, rule
        assert all(0.1 < worst <= 1 for dtype, worst in compared[rule]["worst"].items() if dtype != "bool"), rule
    assert all(table["seconds"] and min(map(min, table["seconds"].values())) > 0 for table in found["tables"])
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """The modules of the check, and a copy of the sources with but two rules, which is soon built."""
    folder = tmp_path_factory.mktemp("csrc")
    shutil.copytree(ROOT / "csrc", folder / "plain")
    lines = (folder / "plain/rules/rules.inc").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("RULE(") or line.startswith(("RULE(sgd,", "RULE(adam,"))]
    (folder / "plain/rules/rules.inc").write_text("\n".join(kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import gpu_cases
        import gpu_libraries

        yield gpu_cases, gpu_libraries, folder


def verdict_on(check, csrc):
    """On the step of Adam by the kernels of `csrc`, beside the plain ones of the CPU."""
    gpu_cases, gpu_libraries, folder = check
    kernels = gpu_libraries.kernels("cpu", csrc, folder)
    cpu = gpu_libraries.kernels_of_cpu("cpu", folder / "plain", folder)
    paths = gpu_libraries.build(kernels, cpu)
    tables = gpu_libraries.Tables.of(paths[1])
    kernels, cpu = map(gpu_libraries.Library, paths)
    verdict = gpu_cases.Verdict()
    for case in gpu_cases.steps("adam", tables, large=False):
        verdict += case.judge(case.run(kernels, tables), case.run(cpu, tables))
    return verdict


def test_the_plain_sources_pass(check):
    verdict = verdict_on(check, check[-1] / "plain")
    assert verdict.cases and not verdict.failures and not verdict.bit_failures


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found(check, mutant):
    file, old, new, by_oracle = MUTANTS[mutant]
    csrc = check[-1] / mutant.replace(" ", "_")
    shutil.copytree(check[-1] / "plain", csrc)
    text = (csrc / file).read_text()
    assert old in text
    (csrc / file).write_text(text.replace(old, new))
    verdict = verdict_on(check, csrc)
    assert verdict.bit_failures
    assert bool(verdict.failures) == by_oracle, verdict.failures

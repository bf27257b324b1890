"""The bench command: what its suites return, write and print, that rivals agree, and the figures of the README.

No test looks at how long anything took.
"""

import dataclasses
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.image import imread

import wdops
from wdops import bench
from wdops.__main__ import SUITES
from wdops._load import native
from wdops.bench import activations, dense, grid, rules, scaling, small, step, timing, whole_step

ROOT = Path(__file__).parents[1]
SETTINGS = timing.Settings(short=True, rounds=2, patience=0)


def run(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "wdops", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


# ---- the stream


@pytest.mark.parametrize("n", [0, 1, 1000, 400_000])
def test_the_stream_reads_and_writes_what_it_says(n, isa):
    rng = np.random.default_rng(0)
    for reads in range(1, 8):
        for writes in range(reads + 1):
            arrays = [rng.standard_normal(n, np.float32) for _ in range(reads + 1)]
            before = [a.view(np.uint32).copy() for a in arrays]
            sums = np.sum(before[:reads], axis=0, dtype=np.uint32)
            assert native.stream(arrays, reads, writes, threads=2) == sums.sum(dtype=np.uint32)
            for k, array in enumerate(arrays):
                np.testing.assert_array_equal(array.view(np.uint32), sums if k < writes else before[k])


@pytest.mark.parametrize(
    ("arrays", "reads", "writes", "threads", "message"),
    [
        ([], 1, 0, 1, "reads must be"),
        ([np.ones(3, np.float32)], 2, 0, 1, "reads must be"),
        ([np.ones(3, np.float32)] * 8, 8, 0, 1, "reads must be"),
        ([np.ones(3, np.float32)], 1, 2, 1, "writes"),
        ([np.ones(3, np.float32)], 1, -1, 1, "writes"),
        ([np.ones(3, np.float32)], 1, 1, 0, "threads"),
        ([np.ones(3)], 1, 0, 1, "float32"),
        ([np.ones(3, np.float32), np.ones(4, np.float32)], 2, 0, 1, "elements"),
        ([np.ones(6, np.float32)[::2]], 1, 1, 1, "contiguous"),
    ],
)
def test_the_stream_refuses_other_arrays(arrays, reads, writes, threads, message):
    with pytest.raises(ValueError, match=message):
        native.stream(arrays, reads, writes, threads)


# ---- how it is timed


def test_rivals_take_turns_and_run_as_often_as_counted():
    calls = []
    runs = {name: lambda times, name=name: calls.append((name, times)) for name in ("one", "other")}
    table = timing.in_turn("title", runs, SETTINGS, elements=5, facts={"a": 1})
    # In every round each runs a while before it counts.
    assert [name for name, _ in calls[-8:]] == ["one", "one", "other", "other"] * 2
    assert [times for _, times in calls[-8::2]] == [max(1, times // 4) for _, times in calls[-7::2]]
    assert {name: len(seconds) for name, seconds in table.seconds.items()} == {"one": 2, "other": 2}
    assert (table.title, table.elements, table.facts["a"]) == ("title", 5, 1)


def test_a_loop_takes_so_many_steps():
    count = tf.Variable(0)
    for jit in (False, True):
        timing.loop(lambda: count.assign_add(1), jit)(5)
    assert count.numpy() == 10


def test_another_instruction_set_is_in_use_only_while_it_is_timed():
    seen, before = [], wdops.isa.active()
    for name, on in timing.on_each_isa("wdops", lambda times: seen.append(wdops.isa.active())).items():
        on(1)
        assert name == ("wdops" if seen[-1] == before else f"wdops, {seen[-1]}") and wdops.isa.active() == before
    assert sorted(seen) == sorted(wdops.isa.available()) and seen[0] == before


def test_a_process_of_its_own_has_so_many_processors():
    assert timing.in_its_own_process("timing", "THREADS", processors=1) == 1


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no_such_thing"):
        timing.in_its_own_process("timing", "no_such_thing")


# ---- the suites


@pytest.mark.parametrize("suite", [activations, dense, step, whole_step])
def test_rivals_agree(suite):
    suite.check_agreement()


def test_a_rival_that_computes_something_else_is_found(monkeypatch):
    rivals = step.rivals

    def with_a_wrong_one(shapes, share):
        weights = step.adamw(wdops.optimizers, shapes)("eager").weights
        return rivals(shapes, share) | {"wrong": step.Rival(lambda times: None, weights)}

    monkeypatch.setattr(step, "rivals", with_a_wrong_one)
    monkeypatch.setattr(step, "KERAS", {})
    with pytest.raises(AssertionError, match="wrong is"):
        step.check_agreement()


@pytest.fixture
def tiny(monkeypatch):
    """All suites with sizes that take no time, and without the checks and processes that other tests run."""
    for suite in (activations, dense, step, whole_step):
        monkeypatch.setattr(suite, "check_agreement", lambda: None)
    monkeypatch.setattr(activations, "SHORT_SHAPES", [(8, 4)])
    monkeypatch.setattr(activations, "RIVALS", {"elu": tf.nn.elu})
    monkeypatch.setattr(dense, "SHORT_N", 64)
    monkeypatch.setattr(rules, "SHORT_ELEMENTS", 1000)
    monkeypatch.setattr(wdops.reference, "RULES", {name: wdops.reference.RULES[name] for name in ("adam", "lamb")})
    monkeypatch.setattr(small, "SHORT_LAYERS", (2,))
    monkeypatch.setattr(step, "SHORT_CASES", [step.Case("a", [(8,)]), step.Case("b", [(8,), (3,)], flushed=True)])
    monkeypatch.setattr(whole_step, "BERT_LAYER", [(4, 3), (3,)])
    monkeypatch.setattr(scaling, "cases", lambda short: {"parameters": {9: [(9,)]}, "tensors": {2: [(4,)] * 2}})

    def in_this_process(module, call, processors):
        monkeypatch.setattr(scaling, "THREADS", processors)
        return json.loads(json.dumps(eval(f"{module}.{call}", {"scaling": scaling})))

    monkeypatch.setattr(scaling, "in_its_own_process", in_this_process)


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.values() if path.stem != "train"))
def test_a_suite_returns_tables_that_can_be_written_shown_and_drawn(name, tiny, tmp_path):
    suite = importlib.import_module(f"wdops.bench.{name}")
    told = []
    tables = suite.measure(SETTINGS, told.append)
    assert told and all(isinstance(what, str) for what in told)
    assert len({table.title for table in tables}) == len(tables)
    for table in tables:
        written = timing.Table(**json.loads(json.dumps(dataclasses.asdict(table))))
        assert written == table
        rounds = {len(seconds) for seconds in table.seconds.values()}
        assert rounds == ({1} if suite is grid else {SETTINGS.rounds})
        assert all(s > 0 for seconds in table.seconds.values() for s in seconds)
        assert set(table.bytes_per_element) <= set(table.seconds)
        assert table.elements or not table.bytes_per_element
        assert bench.show(table).row_count == len(table.seconds)
    bench.save_picture(suite, tables, tmp_path / "suite.png")
    assert np.ptp(imread(tmp_path / "suite.png")) == 1  # not only its background


def test_the_peak_of_a_step_holds_the_gradients_that_are_formed():
    size = 512
    call = f"peak_bytes({dense.KERAS!r}, {size})"
    assert timing.in_its_own_process("dense", call) > 4 * dense.MEMORY_LAYERS * size**2


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(scaling, "memory_available", lambda: 10**9)
    assert scaling.fitting([(10**3,)]) == list(scaling.HELD)
    assert scaling.fitting([(4 * 10**7,)]) == ["wdops"]
    assert scaling.fitting([(10**9,)]) == []
    assert scaling.fitting([(10,)] * 5000) == ["wdops", step.STREAM, "Keras, tf.function"]


def test_bars_show_every_rival():
    table = timing.Table("title", {"wdops": [1.0, 2.0, 3.0], "Keras": [4.0, 4.0, 5.0]})
    figure = Figure()
    bench.draw_ratios([table, table], figure)
    for axis in figure.axes:
        assert [bar.get_width() for bar in axis.patches] == [1, 2]  # the median of 4, 2 and 5/3
        assert "2e+03 ms" in axis.get_title()


# ---- the command line


def test_the_command(tmp_path):
    """JSON, picture and tables of one suite, beside older figures of another machine."""
    tables = [{"title": "elu, 128 x 1024", "seconds": {"wdops": [1e6]}}]
    old = {"machine": {"processor": "an abacus"}, "settings": {"short": True}, "suites": {"activations": tables}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    files = ["--json", "new.json", "--png", "png", "--compare", "old.json"]
    result = run("activations", "--short", "--rounds", "1", *files, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (tmp_path / "png" / "activations.png").read_bytes()[1:4] == b"PNG"
    found = json.loads((tmp_path / "new.json").read_text())
    assert found["machine"]["isa"] == wdops.isa.active() and found["machine"]["build"] == wdops.build_info()
    assert found["settings"] == {"short": True, "rounds": 1, "patience": 0}
    assert list(found["suites"]) == ["activations"]
    for table in found["suites"]["activations"]:
        assert table["title"] in result.stdout and len(table["seconds"]) == 5
        assert f"{1e3 * table['seconds']['wdops'][0]:.3f}" in result.stdout
    assert len(re.findall(r"activations: elu, 128 x 1024 .*wdops .*│ 1000000000.000 │.*│ +0\.00 │", result.stdout)) == 1
    assert "not the same machine or settings: processor: was an abacus" in result.stdout


def test_a_comparison_has_what_both_have():
    def results(seconds):
        tables = [{"title": title, "seconds": {"wdops": s}} for title, s in seconds.items()]
        return {"machine": {"threads": 2}, "settings": {"short": False}, "suites": {"step": tables}}

    old, new = results({"a": [2.0], "b": [1.0]}), results({"a": [1.0], "c": [1.0]})
    grid = bench.compared(old, new)
    assert [list(column.cells) for column in grid.columns] == [
        ["step: a"],
        ["wdops"],
        ["2000.000"],
        ["1000.000"],
        ["0.50"],
    ]
    assert bench.differences(old, new) == []
    new["settings"]["short"] = True
    assert bench.differences(old, new) == ["short: was False, is True"]


def test_the_list_describes_every_suite():
    lines = run("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(SUITES)
    assert all(line.endswith(".") and len(line.split()) > 5 for line in lines)
    assert {"step", "whole-step", "small", "rules", "activations", "dense", "grid", "scaling"} <= set(SUITES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "suite fly: the suites are activations"),
        (["timing"], "suite timing"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--compare", "nothing.json"], "there is no file nothing.json"),
        (["--patience", "x"], "invalid float"),
    ],
)
def test_a_bad_command_line_is_refused(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_pictures_need_matplotlib_and_say_so_first(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib', name='matplotlib')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run("activations", "--png", "png", PYTHONPATH=path, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == 'bench needs matplotlib: pip install "wdops[demo]"\n'
    assert result.stdout == ""


# ---- the README


@pytest.fixture(scope="module")
def figures():
    return runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))


def test_the_figures_of_the_readme_are_those_of_the_json(figures):
    readme, results = figures["README"].read_text(), figures["measured"]()
    assert figures["filled"](readme, results) == readme
    names = re.findall(r"<!-- bench:(\S+) -->", readme)
    assert len(set(names)) == len(names)
    assert {name.split("/")[-1] for name in names} == set(figures["FIGURES"])
    for name, of_machine in results.items():
        other = dataclasses.replace(of_machine, machine=of_machine.machine | {"processor": "an abacus"})
        assert figures["filled"](readme, results | {name: other}).count("an abacus") == 1


def test_the_figures_of_a_gpu_are_those_of_its_json(figures):
    readme = figures["README"].read_text()
    assert figures["with_gpus"](readme) == readme
    emptied = re.sub(r"(<!-- gpu:\S+ -->).*?(<!-- /gpu -->)", r"\1\2", readme, flags=re.DOTALL)
    assert emptied != readme == figures["with_gpus"](emptied)


def test_no_figure_of_the_section_is_typed_by_hand(figures):
    section = re.search(r"## Measured\n(.*?)\n## ", figures["README"].read_text(), re.DOTALL)[1]
    typed = re.sub(r"<!-- bench:(\S+) -->.*?<!-- /bench -->", "", section, flags=re.DOTALL)
    assert not re.search(r"\d\.\d|\d %|\d (ms|µs|GB)", typed)


def test_every_picture_is_of_a_suite_of_the_json(figures):
    suites = {suite for of_machine in figures["measured"]().values() for suite in of_machine.suites}
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.png")} == suites

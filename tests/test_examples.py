"""The examples, shortened: what they claim holds, and they write what they say."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def decay():
    return runpy.run_path(str(EXAMPLES / "decay.py"))


def test_a_spoiled_training_set_differs_where_it_should(decay):
    rng = np.random.default_rng(0)
    images, labels = rng.random((200, 64), np.float32), rng.integers(0, 10, 200)
    changed = {}
    for task in decay["TASKS"]:
        new_images, new_labels = decay["spoiled"](task, images, labels, seed=1)
        assert new_images.dtype == images.dtype and set(new_labels) <= set(range(10))
        changed[task] = (new_images != images).any(axis=1).sum(), (new_labels != labels).sum()
    assert changed == {"clean": (0, 0), "25% wrong labels": (0, 50), "30% outliers": (60, 0)}


def test_the_strength_is_chosen_by_validation_and_of_equals_the_weakest(decay):
    accuracy = np.full((2, 3, len(decay["SETTINGS"])), 0.5)
    weakest = {row: settings[0] for row, settings in decay["ROWS"].items()}
    trained = decay["Trained"](None, accuracy, None, None)
    assert decay["chosen"](trained) == weakest
    accuracy[:, 0] = np.arange(len(decay["SETTINGS"]))  # of an epoch that is not the last
    accuracy[:, -1, decay["ROWS"]["l2"][3]] = 0.6
    assert decay["chosen"](trained) == weakest | {"l2": decay["ROWS"]["l2"][3]}


def test_decay(decay, tmp_path, monkeypatch, capsys):
    """Three epochs of one seed: only the proximal step makes exact zeros, and a stronger one more of them."""
    main, train = decay["main"], decay["train"]
    results = []
    monkeypatch.setitem(main.__globals__, "train", lambda *args: results.append(train(*args)) or results[-1])
    png = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["decay.py", "--epochs", "3", "--seeds", "1", "--output", str(png)])
    main()
    (of_tasks,) = results
    assert len(of_tasks) == len(decay["TASKS"])
    for trained in of_tasks:
        assert (trained.train_loss[-1] < trained.train_loss[0])[: len(decay["ROWS"]["l1"])].all()
        assert trained.validation_accuracy.shape == trained.train_loss.shape == (3, len(decay["SETTINGS"]))
        for row, settings in decay["ROWS"].items():
            zeros = trained.zeros[settings]
            if row == "proximal_l1":
                assert (np.diff(zeros) > 0).all() and zeros[-1] > 0.5
            else:
                assert not zeros.any(), row
    # Without decay it learns the clean digits, and the table says so.
    assert 0.8 < of_tasks[0].test_accuracy[0] < 1
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in table] == ["decay", "-" * len(table[1][1]), *decay["ROWS"]]
    assert table[2][2].strip() == f"{100 * of_tasks[0].test_accuracy[0]:.1f} ± 0.0; 0; 0.0%"
    assert png.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("argument", ["--epochs", "--seeds"])
def test_a_bad_argument_is_named(decay, argument, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decay.py", argument, "0"])
    with pytest.raises(SystemExit):
        decay["main"]()
    assert f"{argument} must be at least 1" in capsys.readouterr().err

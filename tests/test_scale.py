"""What full data sets cost: how much is kept stays at its limits, listed files are small, tables are printed."""

import tracemalloc

import pytest
import torch
from click.testing import CliRunner
from conftest import NOTES, TINY

import common
import train_mvae
from tests.experiments import scale


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few originals, everything in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(scale, "ORIGINALS", 5)
    monkeypatch.setattr(scale, "forget_peak", lambda: None)
    yield
    torch.set_num_threads(threads)


def folder_of(tmp_path, monkeypatch, kind, *counts):
    monkeypatch.setitem(scale.COUNTS, kind, counts)
    return scale.make_folder(tmp_path, kind, 1.0)[0]


def test_tables_are_printed(tmp_path, monkeypatch):
    words = "--dataset pictures --size 32 " + " ".join(TINY)
    monkeypatch.setattr(scale, "DATA", {"own pictures": ("train_mvae", "pictures", words)})
    monkeypatch.setattr(scale, "STEPS", 1)
    monkeypatch.setattr(train_mvae, "SCENES", 20)
    monkeypatch.setattr(scale, "PROCESSES", 1)
    monkeypatch.setattr(scale, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(scale, "exchanges", lambda sizes: scale.exchange(0, tmp_path, sizes))
    result = CliRunner().invoke(scale.main, ["--share", "0.0005", "--batches", "2", "3", "--folder", str(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in result.stdout.splitlines() if " | " in line}
    assert rows["| data"] == rows["| model"] == ["own pictures |"] and rows["| files"] == ["50 |"]
    assert {"| s to list", "| MB after 3 batches", "| MB a step", "| share"} <= set(rows)


@pytest.mark.parametrize("kind", ["clevr", "nsynth"])
def test_what_is_kept_stays_at_its_limit(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(train_mvae, "CACHE", 8 * 3 * 32**2)
    monkeypatch.setattr(common, "KEPT", 8)
    root = folder_of(tmp_path, monkeypatch, kind, *{"clevr": (60, 20), "nsynth": (200, 80, 80)}[kind])
    words = {"clevr": ["--dataset", "clevr", "--size", "32", *TINY], "nsynth": ["--dataset", "nsynth-duo", *NOTES]}
    found = scale.reading("train_mvae", [*words[kind], "--data-root", str(root)], (2, 13))
    assert 8 < found["kept"] <= 3 * (8 + 2 * 4) < found["read"]


def test_a_listed_note_takes_little_memory(tmp_path, monkeypatch):
    root = folder_of(tmp_path, monkeypatch, "nsynth", 2000, 50, 50)
    tracemalloc.start()
    notes = common.nsynth_notes(root, "train", common.FAMILIES, False)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(notes) == 2000 and now < 2000 * 2000 and peak < 2000 * 8000
    assert len({note.name for note in notes}) == 2000

"""The benchmarks still run; what they measure is asserted nowhere."""

import torch
from click.testing import CliRunner
from test_data import write_clevr

from tests.benchmarks import grid, griffin_lim, recompose, renderer, separation


def test_the_renderer_is_timed_and_drawn_beside_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(renderer, "ROUNDS", 1)
    result = CliRunner().invoke(renderer.main, [])
    assert result.exit_code == 0, result.exception
    assert "drawn for each" in result.output
    write_clevr(tmp_path / "CLEVR_v1.0", sizes=[(320, 240)] * 4)
    args = ["--data-root", str(tmp_path), "--figure", str(tmp_path / "figure.png")]
    result = CliRunner().invoke(renderer.main, args)
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_recomposition_is_timed_beside_import_torch(monkeypatch, capsys):
    monkeypatch.setattr(recompose, "ROUNDS", 1)
    recompose.main()
    assert "of the time" in capsys.readouterr().out


def test_griffin_lim_is_studied_and_timed_beside_onnxruntime(monkeypatch):
    monkeypatch.setattr(griffin_lim, "NOTES", 1)
    monkeypatch.setattr(griffin_lim, "ROUNDS", 1)
    result = CliRunner().invoke(griffin_lim.main, [])
    assert result.exit_code == 0, result.exception
    assert "| mel 192 |" in result.output and "of torchaudio's time" in result.output


def test_the_grid_trains_each_row_once_and_prints_a_table(tmp_path):
    args = ["selection", "--only", "exploring", "--steps", "2", "--seeds", "0,1", "--out", str(tmp_path)]
    printed = [CliRunner().invoke(grid.main, args) for _ in range(2)]
    assert all(result.exit_code == 0 for result in printed), printed[0].exception
    assert printed[0].stdout == printed[1].stdout
    assert "| and exploring (the default) |" in printed[0].stdout
    assert (tmp_path / "sprites-selection.png").stat().st_size > 1000


def test_ways_to_part_two_notes_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(separation.run, ["--mixtures", "2"])
    assert result.exit_code == 0, result.exception
    assert "NMF, two components, n_fft 1024: " in result.output and "ideal masks: " in result.output


def test_factors_of_a_matrix_of_two_components_are_found():
    first, second = torch.tensor([[4.0], [1.0], [0.0]]), torch.tensor([[0.0], [2.0], [3.0]])
    true = torch.stack([first @ torch.tensor([[1.0, 1.0, 0.0, 0.0]]), second @ torch.tensor([[0.0, 1.0, 1.0, 2.0]])])
    found = separation.factorize(true.sum(0)[None], 2)[0]
    torch.testing.assert_close(found.sum(0), true.sum(0), atol=1e-2, rtol=1e-2)
    order = [0, 1] if found[0, 0, 0] > found[1, 0, 0] else [1, 0]
    torch.testing.assert_close(found[order], true, atol=0.1, rtol=0)

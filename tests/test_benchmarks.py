"""The benchmarks still run; what they measure is asserted nowhere."""

from click.testing import CliRunner
from test_data import write_clevr

from tests.benchmarks import grid, griffin_lim, recompose, renderer


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

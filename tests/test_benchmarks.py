"""The benchmarks still run; what they measure is asserted nowhere."""

import shutil

import pytest
from click.testing import CliRunner
from test_data import write_clevr

from tests.benchmarks import griffin_lim, recompose, renderer, steps, streams, warm


def invoke(command, *args):
    """The output of a command, whose exit code must be 0."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_renderer_is_timed_and_drawn_beside_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(renderer, "ROUNDS", 1)
    monkeypatch.setattr(renderer.train_mvae, "CHUNK", 2)
    assert "drawn for each" in invoke(renderer.main)
    write_clevr(tmp_path / "CLEVR_v1.0", sizes=[(320, 240)] * 4, train=30)
    invoke(renderer.main, "--data-root", tmp_path, "--figure", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_recomposition_is_timed_beside_import_torch(monkeypatch, capsys):
    monkeypatch.setattr(recompose, "ROUNDS", 1)
    monkeypatch.setattr(recompose, "WARM_UP", 0)
    recompose.main()
    assert "of the time" in capsys.readouterr().out


def test_recomposition_when_warm_is_timed_beside_the_model(clevr_run, monkeypatch):
    monkeypatch.setattr(warm, "ROUNDS", 1)
    said = invoke(warm.main, clevr_run)
    assert "of PyTorch's time" in said and float(said.split("pixel: ")[1].split()[0]) < 1e-4


def test_griffin_lim_is_timed_beside_onnxruntime(notes_run, monkeypatch):
    exported = notes_run / "export" / "vocoder.onnx"  # the same graph, which takes seconds to write
    monkeypatch.setattr(griffin_lim.export, "write_onnx", lambda graph, inputs, path, info: shutil.copy(exported, path))
    monkeypatch.setattr(griffin_lim, "ROUNDS", 1)
    monkeypatch.setattr(griffin_lim, "REPEATS", 1)
    assert "of torchaudio's time" in invoke(griffin_lim.main)


def test_streams_are_timed_beside_griffin_lim(wave_run, notes_run, monkeypatch):
    exported = notes_run / "export" / "vocoder.onnx"
    monkeypatch.setattr(griffin_lim.export, "write_onnx", lambda graph, inputs, path, info: shutil.copy(exported, path))
    monkeypatch.setattr(griffin_lim, "REPEATS", 1)
    said = invoke(streams.main, wave_run / "export", "--repeats", 2).splitlines()
    assert [row.split(" | ")[0] for row in said[2:6]] == ["| 512", "| 1024", "| 2048", "| 4096"]
    assert said[2].endswith("| 76 |") and "x real time" in said[6]


@pytest.mark.parametrize("stage", ["MNIST conv", "sprites"])
def test_a_training_step_is_timed_through_the_real_command(stage, digits, monkeypatch):
    small = {"MNIST conv": f" --channels 2 --D 2 --data-root {digits}", "sprites": " --size 32 --channels 8 --batch 2"}
    monkeypatch.setitem(steps.COMMANDS, stage, steps.COMMANDS[stage] + small[stage])
    assert f"| {stage} | " in invoke(steps.main, "--only", stage, "--skip", 1, "--steps", 2)


def test_a_command_that_fails_is_named(monkeypatch):
    monkeypatch.setitem(steps.COMMANDS, "sprites", "train_mvae.py --dataset sprites --N 0")
    result = CliRunner().invoke(steps.main, ["--only", "sprites"])
    assert result.exit_code == 1 and "train_mvae.py --dataset sprites --N 0" in result.output

"""Shared fixtures: small runs made once a session, through the real command line."""

import pytest
import torch
from click.testing import CliRunner

import export
import train_mvae

TINY = ["--channels", "8", "--D", "4", "--cells", "8", "--batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="session")
def small_and_steady():
    """Two threads, and evaluations over few scenes: with a handful of steps, every step is followed by one."""
    torch.set_num_threads(2)
    train_mvae.HELD_OUT, train_mvae.PAIRS = 8, 4


def train(*args):
    """Run train_mvae in this process; returns click's result, whose exit code must be 0."""
    result = CliRunner().invoke(train_mvae.main, [str(a) for a in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="session")
def clevr_run(tmp_path_factory):
    """A run of a few steps on the built-in scenes, with latents for the background, and its export."""
    folder = tmp_path_factory.mktemp("runs") / "clevr"
    train("--dataset", "clevr", "--steps", 3, "--N", 3, *TINY, "--out", folder)
    result = CliRunner().invoke(export.main, [str(folder)])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


@pytest.fixture(scope="session")
def sprites_run(tmp_path_factory):
    """A run of a few steps on sprites, without a background, and its export."""
    folder = tmp_path_factory.mktemp("runs") / "sprites"
    train("--dataset", "sprites", "--steps", 3, "--op", "sum", "--background", "none", *TINY, "--out", folder)
    result = CliRunner().invoke(export.main, [str(folder)])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder

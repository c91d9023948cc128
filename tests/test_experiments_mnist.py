"""The experiments on digits: a tiny sweep over beta, the curve of a run, the linear probe."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import train_vae_mnist as stage
from common import random_generator
from tests.experiments import beta, mnist_curve


def invoke(main, *args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_sweep_stopped_in_the_middle_goes_on_and_ends_in_a_table_and_a_figure(digits, tmp_path, monkeypatch):
    tiny = ["--hidden", "16", "--D", 3, "--batch", 20, "--steps", 3, "--eval-samples", 5, "--device", "cpu"]
    args = ["--betas", "0,4", "--out", tmp_path / "sweep", "--", "--data-root", digits, *tiny]
    taken, step = [], stage.optimizer_step

    def interrupted(*arguments):
        taken.append(None)
        if len(taken) == 5:  # in the second run
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(stage, "draw_figures", lambda *_: None)
    monkeypatch.setattr(stage, "optimizer_step", interrupted)
    assert "the same command goes on" in invoke(beta.main, *args, code=1)
    lines = invoke(beta.main, *args).splitlines()[-6:]
    assert len(taken) == 6
    assert lines[0].startswith("| beta | rate | distortion") and lines[2].startswith("| step 0 |")
    assert lines[3].startswith("| 0 |") and lines[4].startswith("| 4 |") and lines[5].startswith("mean picture: NLL")
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [row["beta"] for row in table] == [0, 4] and all(0 <= row["probe_accuracy"] <= 1 for row in table)
    assert stage.load(tmp_path / "sweep" / "beta-4").config["options"]["beta"] == 4
    with Image.open(tmp_path / "sweep" / "beta.png") as image:
        assert np.asarray(image).std() > 5


@pytest.mark.parametrize("args", [["--betas", "1,nan"], ["--betas", ""], ["--betas", "1,-1"], ["--", "--beta", "2"]])
def test_wrong_options_are_refused(args):
    assert "Error" in invoke(beta.main, *args, code=2)


def test_the_curve_of_a_run(vae_run, tmp_path):
    shutil.copytree(vae_run, tmp_path / "run")
    assert "curve.png" in invoke(mnist_curve.main, tmp_path / "run")
    with Image.open(tmp_path / "run" / "figures" / "curve.png") as image:
        assert np.asarray(image).std() > 5
    (tmp_path / "run" / "curve.json").unlink()
    assert "is no run" in invoke(mnist_curve.main, tmp_path / "run", code=2)


def test_the_probe_reads_what_is_linear_and_nothing_else():
    z = torch.randn(600, 5, generator=random_generator("test", "z"))
    labels = (z[:, 0] > 0).long() + 2 * (z[:, 1] > 0).long()
    noise = torch.randint(0, 10, (600,), generator=random_generator("test", "labels"))
    assert beta.probe_accuracy(z[:400], labels[:400], z[400:], labels[400:]) > 0.93
    assert beta.probe_accuracy(z[:400], noise[:400], z[400:], noise[400:]) < 0.3

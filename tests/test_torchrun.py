"""Several processes: the same losses as of one, a process that dies, and restarts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import NOTES, TINY, write_nsynth

import train_mvae

ROOT = Path(__file__).parents[1]
SPRITES = ["train_mvae.py", "--dataset", "sprites", *TINY, "--size", 32, "--eval", "quick"]
PORT = 29_500 + os.getpid() % 1000  # tests run side by side
# Process 1 of the first attempt kills itself at the start of a step, as a machine that is lost does.
DIES = """
import os, runpy, signal, sys
import common
steps = common.Run.steps
def dying(run):
    for step, progress in steps(run):
        if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        yield step, progress
common.Run.steps = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(*args, how=("--nproc-per-node=2", f"--master-port={PORT}")):
    command = [sys.executable, "-m", "torch.distributed.run", *how, *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)


def train(*args):
    command = list(map(str, [sys.executable, *args]))
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def assert_alike(one, two):
    """Weights differ by what the order of sums changes; two processes average gradients, not losses."""
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(two)[name], atol=2e-3), name


def test_a_run_that_torchrun_restarts_ends_bit_for_bit_as_undisturbed(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    how, steps = ["--nproc-per-node=2", "--max-restarts=1", f"--master-port={PORT}"], ["--steps", 10, "--out"]
    result = torchrun(tmp_path / "dies.py", *SPRITES, *steps, tmp_path / "run", how=how)
    assert result.returncode == 0, result.stderr
    assert re.search("stopped at step 5|step 5, saved: a process is lost", result.stdout + result.stderr)
    assert torchrun(*SPRITES, *steps, tmp_path / "undisturbed").returncode == 0
    expected, found = weights(tmp_path / "undisturbed"), weights(tmp_path / "run")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [one["processes"] for one in json.loads((tmp_path / "run" / "config.json").read_text())["history"]] == [2, 2]


def test_restarts_need_a_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    result = CliRunner().invoke(train_mvae.main, ["--dataset", "sprites", "--dry-run"])
    assert result.exit_code == 2 and "torchrun --max-restarts: expected --out" in result.output


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["mnist", "notes", "mvae"])
def test_two_processes_train_as_one_with_the_same_global_batch(stage, digits, tmp_path):
    mnist = ["train_vae_mnist.py", "--data-root", digits, "--hidden", "16", "--D", 3, "--eval-samples", 2]
    root = write_nsynth(tmp_path / "nsynth", [("bass", 40), ("flute", 70), ("bass", 45), ("flute", 76)])
    notes = ["train_vae_audio.py", "--data-root", root, *NOTES, "--channels", 16, "--eval", "quick"]
    command = [*{"mnist": mnist, "notes": notes, "mvae": SPRITES}[stage], "--steps", 20, "--device", "cpu"]
    train(*command, "--batch", 16, "--out", tmp_path / "one")
    result = torchrun(*command, "--batch", 8, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.faults
def test_without_restarts_the_loss_of_a_process_ends_the_run_with_a_checkpoint(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    result = torchrun(tmp_path / "dies.py", *SPRITES, "--steps", 10, "--out", tmp_path / "run")
    assert result.returncode == 1
    again = torchrun("train_mvae.py", "--resume", tmp_path / "run")
    assert again.returncode == 0, again.stderr


@pytest.mark.faults
def test_two_machines_go_on_where_a_process_of_one_is_lost(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    how = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=job"]
    command = [sys.executable, "-m", "torch.distributed.run", *how, f"--rdzv-endpoint=localhost:{PORT + 1000}"]
    command += [tmp_path / "dies.py", *SPRITES, "--steps", 10, "--out", tmp_path / "run"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    machines = [subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stderr=subprocess.DEVNULL) for _ in "ab"]
    try:
        assert [machine.wait(timeout=120) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    assert torchrun(*SPRITES, "--steps", 10, "--out", tmp_path / "undisturbed").returncode == 0
    expected, found = weights(tmp_path / "undisturbed"), weights(tmp_path / "run")
    assert all(torch.equal(found[name], value) for name, value in expected.items())

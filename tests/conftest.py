"""Shared fixtures: small runs made once a session, through the real command line."""

import json
import struct

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

import export
import train_mvae
import train_vae_audio
import train_vae_mnist

TINY = ["--channels", "8", "--D", "4", "--cells", "8", "--batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="session")
def small_and_steady():
    """Two threads, and evaluations over few scenes: with a handful of steps, every step is followed by one."""
    torch.set_num_threads(2)
    train_mvae.HELD_OUT, train_mvae.PAIRS = 8, 4
    train_mvae.MIXTURES, train_mvae.WATCHED = 6, 4
    train_vae_audio.NOTES_EACH, train_vae_audio.EVALUATED, train_vae_audio.FamilyClassifier.STEPS = 3, 8, 20
    train_vae_audio.INSTRUMENTS = {"train": range(2), "valid": range(2, 3), "test": range(3, 4)}


def train(*args, main=train_mvae.main):
    """Run a training script in this process; returns click's result, whose exit code must be 0."""
    result = CliRunner().invoke(main, [str(a) for a in args])
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


def write_digits(root, kind="MNIST", train=120, test=40):
    """Small made-up digits in the unpacked files of MNIST: class k is a bright bar in column 2 k + 4."""
    generator = np.random.default_rng(0)
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", train), ("t10k", test)):
        labels = generator.integers(0, 10, n).astype(np.uint8)
        images = generator.integers(0, 60, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[6:22, 2 * label + 4] = 250
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def vae_run(digits, tmp_path_factory):
    """A run of a few steps of the MLP on made-up digits, and its export."""
    folder = tmp_path_factory.mktemp("runs") / "vae"
    args = ["--data-root", digits, "--hidden", "16,8", "--D", 3, "--batch", 20, "--steps", 12, "--device", "cpu"]
    train(*args, "--eval-samples", 10, "--out", folder, main=train_vae_mnist.main)
    result = CliRunner().invoke(export.main, [str(folder)])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


def write_nsynth(root, names, form="wav", rate=16000, samples=64000, channels=1):
    """NSynth's three folders with a decaying sine for every (family, pitch) of `names`; returns the root."""
    t = np.arange(samples) / rate
    for split in train_vae_audio.SPLITS:
        folder = root / f"nsynth-{split}"
        (folder / "audio").mkdir(parents=True)
        listing = {}
        for family, pitch in names:
            name = f"{family}_acoustic_{len(listing):03}-{pitch:03}-100"
            wave = 0.5 * np.exp(-t) * np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * t)
            soundfile.write(folder / "audio" / f"{name}.{form}", np.stack([wave] * channels, axis=1), rate)
            listing[name] = {
                "instrument_family_str": family, "instrument_str": name[:-8], "pitch": pitch, "velocity": 100,
            }  # fmt: skip
        (folder / "examples.json").write_text(json.dumps(listing))
    return root


@pytest.fixture(scope="session")
def notes_run(tmp_path_factory):
    """A run of a few steps on synthesised notes, conditional, and its export."""
    folder = tmp_path_factory.mktemp("runs") / "notes"
    args = ["--families", "bass,flute", "--condition", "both", "--channels", 16, "--D", 3, "--batch", 4, "--steps", 1]
    cache = tmp_path_factory.mktemp("cache")
    train(*args, "--device", "cpu", "--cache", cache, "--out", folder, main=train_vae_audio.main)
    result = CliRunner().invoke(export.main, [str(folder)])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


@pytest.fixture(scope="session")
def duo_run(tmp_path_factory):
    """A run of a few steps on mixtures of synthesised notes, and its export."""
    folder = tmp_path_factory.mktemp("runs") / "duo"
    small = ["--size", 64, "--cells", 16, "--channels", 8, "--D", 4, "--batch", 4, "--device", "cpu"]
    data = ["--dataset", "nsynth-duo", "--families", "bass,flute", "--cache", tmp_path_factory.mktemp("cache")]
    train(*data, *small, "--steps", 2, "--out", folder)
    result = CliRunner().invoke(export.main, [str(folder)])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder

"""Shared fixtures: one small run of every kind, made once a session through the real command line, and exported.

Under pytest-xdist every process sees the same folders: the first that needs one makes it, the others wait for it.
"""

import hashlib
import json
import os
import re
import struct
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from click.testing import CliRunner

import common
import export
import train_mvae
import train_vae_audio
import train_vae_mnist

TINY = ["--channels", "8", "--D", "4", "--detail", "2", "--cells", "8", "--batch", "4", "--device", "cpu"]
NOTES = ["--families", "bass,flute", "--D", "3", "--batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="session")
def small():
    """Evaluations over few examples: a run of a handful of steps is evaluated after every one of them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    train_mvae.SCENES, train_mvae.MIXTURES = 8, 6
    train_vae_audio.EVALUATED, train_vae_audio.WATCHED, train_vae_audio.QUICK = 8, 8, 4
    common.NOTES_EACH, common.INSTRUMENTS = 3, {"train": range(2), "valid": range(2, 3), "test": range(3, 4)}


def train(*args, main=train_mvae.main):
    """Run a training script in this process; returns click's result, whose exit code must be 0."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def once(tmp_path_factory, name, make):
    """The folder `name` as make(folder) filled it, in whichever process of the session came first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / name, root / f"{name}-made"
    try:
        (root / f"{name}-in-the-making").mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.1)
        return folder
    try:
        make(folder)
    finally:
        done.touch()
    return folder


def made(tmp_path_factory, name, *args, main=train_mvae.main, export_args=()):
    """The folder of a run of these arguments, which is also exported."""

    def make(folder):
        train(*args, "--out", folder, main=main)
        result = CliRunner().invoke(export.main, [str(folder), *export_args])
        assert result.exit_code == 0, (result.output, result.exception)

    return once(tmp_path_factory, name, make)


@pytest.fixture(scope="session")
def sessions():
    return {}


@pytest.fixture
def kept_sessions(sessions, monkeypatch):
    """A graph that is opened again is the session of before, which holds no state, but takes its time to make."""
    open_session = onnxruntime.InferenceSession

    def keep(path, *args, **options):
        key = path, path.stat().st_mtime_ns
        if key not in sessions:
            sessions[key] = open_session(path, *args, **options)
        return sessions[key]

    monkeypatch.setattr(onnxruntime, "InferenceSession", keep)


def save_graph(model, path):
    """Write a changed graph, and its checksum beside it, as an export would have."""
    onnx.save(model, path)
    sums, now = path.parent / "SHA256SUMS", f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
    sums.write_text(re.sub(f".*  {path.name}", now, sums.read_text()))


def give_nan(path):
    """Change a graph so that its first output is NaN everywhere."""
    model = onnx.load(path)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{name}_" if name == output else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["zero"], value_float=0.0))
    model.graph.node.append(onnx.helper.make_node("Mul", [f"{output}_", "zero"], ["none"]))
    model.graph.node.append(onnx.helper.make_node("Div", ["none", "zero"], [output]))
    save_graph(model, path)


@pytest.fixture(scope="session")
def clevr_run(tmp_path_factory):
    """A run of a few steps on the built-in scenes, with latents for the background, and its export."""
    return made(tmp_path_factory, "clevr", "--dataset", "clevr", "--steps", 3, "--N", 3, *TINY)


@pytest.fixture(scope="session")
def sprites_run(tmp_path_factory):
    """A run of a few steps on sprites, summed, and its export, of ONNX alone."""
    args = ["--dataset", "sprites", "--steps", 2, "--op", "sum", *TINY]
    return made(tmp_path_factory, "sprites", *args, export_args=["--no-torchscript"])


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
    return once(tmp_path_factory, "digits", write_digits)


@pytest.fixture(scope="session")
def vae_run(digits, tmp_path_factory):
    """A run of a few steps of the MLP on made-up digits, and its export in every form."""
    args = ["--data-root", digits, "--hidden", "16,8", "--D", 3, "--batch", 20, "--steps", 12, "--device", "cpu"]
    forms = ["--static", "--fp16", "--int8"]
    return made(tmp_path_factory, "vae", *args, "--eval-samples", 10, main=train_vae_mnist.main, export_args=forms)


def write_nsynth(root, names, form="wav", rate=16000, samples=64000, channels=1):
    """NSynth's three folders with a decaying sine for every (family, pitch) of `names`; returns the root."""
    t = np.arange(samples) / rate
    for split in common.SPLITS:
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
    """A run of one step on synthesised notes, conditional, and its export, of ONNX alone."""
    args = [*NOTES, "--condition", "both", "--channels", 16, "--steps", 1]
    return made(tmp_path_factory, "notes", *args, main=train_vae_audio.main, export_args=["--no-torchscript"])


@pytest.fixture(scope="session")
def wave_run(tmp_path_factory):
    """A run of one step on the waveforms of synthesised notes, and its export."""
    args = [*NOTES, "--representation", "waveform", "--channels", 16, "--steps", 1]
    return made(tmp_path_factory, "wave", *args, main=train_vae_audio.main)


@pytest.fixture(scope="session")
def duo_run(tmp_path_factory):
    """A run of one step on mixtures of synthesised notes, and its export, of ONNX alone."""
    args = ["--dataset", "nsynth-duo", "--size", 64, "--cells", 16, "--channels", 8, *NOTES, "--steps", 1]
    return made(tmp_path_factory, "duo", *args, export_args=["--no-torchscript", "--static"])

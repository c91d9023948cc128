"""A run folder -> ONNX and TorchScript graphs, each compared with the PyTorch model before it counts as written.

    python export.py runs/mvae-clevr-alpha-N6-seed0              # writes runs/.../export/
    python export.py runs/mvae-clevr-alpha-N6-seed0 --out models/clevr --no-torchscript

| a run of train_vae_mnist                                                                                        |
|----------|-------------------------------------------|----------------------------------------------------------|
| encoder  | image (B, 1, 28, 28) in [0, 1]            | mu, logvar (B, D), kl (B,)                               |
| decoder  | z (B, D)                                  | image (B, 1, 28, 28): the pixels' probabilities          |

| a run of train_vae_audio                                                                                        |
|----------|-------------------------------------------|----------------------------------------------------------|
| encoder  | waveform (B, 64000), pitch (B,) and       | mu, logvar (B, D), kl (B,)                               |
|          | family (B,) where the model has them      |                                                          |
| prior    | noise (B, D) of N(0, I), pitch, family    | z (B, D), a draw of the fitted prior                     |
| decoder  | z (B, D), pitch (B,), family (B,)         | spectrogram (B, bins, T): STFT magnitudes or mel bands   |
| vocoder  | spectrogram (B, bins, T), any T above 4   | waveform (B, (T - 1) hop): Griffin-Lim, 32 iterations    |

| a run of train_mvae                                                                                             |
|----------|-------------------------------------------|----------------------------------------------------------|
| encoder  | image (B, 3, H, W) in [0, 1]              | mu, logvar (B, N, D), cell (B, N, 2), kl (B, N),         |
|          |                                           | kl_map (B, H_l, W_l), background where the model has one |
| decoder  | z (B, N, D), cell (B, N, 2)               | layer (B, N, ...)                                        |
| composer | layer (B, M, ...), background if there is | image (B, 3, H, W)                                       |

| a run of train_mvae on sounds                                                                                   |
|----------|-------------------------------------------|----------------------------------------------------------|
| encoder  | waveform (B, 64000), of any loudness      | mu, logvar (B, N, D), cell (B, N, 2), kl (B, N),         |
|          |                                           | kl_map (B, H_l, 1)                                       |
| decoder  | z (B, N, D), cell (B, N, 2)               | layer (B, N, ...)                                        |
| composer | layer (B, M, ...)                         | spectrogram (B, 2049, 64): STFT magnitudes               |
| vocoder  | spectrogram (B, 2049, T), any T above 4   | waveform (B, (T - 1) 1024): Griffin-Lim, 32 iterations   |

B, N and M are free; pitch is a MIDI number, family an index into the `families` of model.json. A graph that differs
from PyTorch by more than its tolerance, at sizes other than it was exported with, is reported, the exit code is 1, and
an export folder written before is left as it was.
"""

import copy
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import train_mvae
import train_vae_audio
import train_vae_mnist
from common import (
    COMPRESSION,
    RATE,
    BlockSTFT,
    GriffinLim,
    Spectrogram,
    gaussian_kl,
    load_checkpoint,
    load_config,
    load_state,
    log_expand,
    random_generator,
    spectral_convergence,
    versions,
)
from train_mvae import LOUDNESS, MVAE, SOUND_FFT, SoundLevels, stft_of
from train_vae_audio import SAMPLES, NoteVAE
from train_vae_mnist import SIDE, VAE

OPSET = 18
TOLERANCE = 1e-4  # relative to the largest value of an output, where that exceeds 1
DECIBELS = 0.1  # tolerance of the vocoder, in spectral convergence: its iterations multiply rounding
MODELS = {
    "train_vae_mnist": (VAE, train_vae_mnist.MODEL_OPTIONS),
    "train_vae_audio": (NoteVAE, train_vae_audio.MODEL_OPTIONS),
    "train_mvae": (MVAE, train_mvae.MODEL_OPTIONS),
}
EXPORTED_SIZES = {"batch": 2, "slots": 3}  # sizes the graphs are traced with; "slots" is N or M
CHECKED_SIZES = ({"batch": 1, "slots": 1}, {"batch": 5, "slots": 7})

# ---------------------------------------------------------------- Graphs


def part(model, *names):
    """A copy of the model that keeps only the named parts, so that a graph's file holds no weights it does not use."""
    model = copy.deepcopy(model)
    for name, _ in list(model.named_children()):
        if name not in names:
            setattr(model, name, None)
    return model


class VAEEncoderGraph(nn.Module):
    outputs = ("mu", "logvar", "kl")

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "encoder")

    def forward(self, image):
        mu, logvar = self.model.encode(image.flatten(1))
        return mu, logvar, gaussian_kl(mu, logvar).sum(1)


class VAEDecoderGraph(nn.Module):
    outputs = ("image",)

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "decoder")

    def forward(self, z):
        return self.model.decode(z).sigmoid().unflatten(1, (1, SIDE, SIDE))


class BlockMagnitude(nn.Module):
    """STFT magnitudes as torchaudio's, in operations that ONNX knows: (B, samples) -> (B, F, T)."""

    def __init__(self, n_fft):
        super().__init__()
        self.stft = BlockSTFT(n_fft)

    def forward(self, waveform):
        return self.stft.magnitude(waveform)


class NoteEncoderGraph(nn.Module):
    outputs = ("mu", "logvar", "kl")

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "encoder", "spectrogram")
        self.model.spectrogram.magnitude = BlockMagnitude(model.spectrogram.n_fft)

    def forward(self, waveform, pitch=None, family=None):
        level = self.model.spectrogram(waveform)
        mu, logvar = self.model.encode(level, self.model.label(pitch, family))
        return mu, logvar, gaussian_kl(mu, logvar).sum(1)


class NoteDecoderGraph(nn.Module):
    outputs = ("spectrogram",)

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "decoder", "spectrogram")

    def forward(self, z, pitch=None, family=None):
        decoded = self.model.decode(z, self.model.label(pitch, family))
        return log_expand(self.model.spectrogram.unscale(decoded))


class NotePriorGraph(nn.Module):
    """Standard normal noise -> latents of a note of that label, for the decoder."""

    outputs = ("z",)

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "prior")

    def forward(self, noise, pitch=None, family=None):
        return self.model.prior(noise, pitch, family)


class VocoderGraph(nn.Module):
    outputs = ("waveform",)

    def __init__(self, spectrogram):
        super().__init__()
        self.spectrogram = spectrogram
        self.griffin_lim = GriffinLim(spectrogram.n_fft)

    def forward(self, spectrogram):
        return self.griffin_lim(self.spectrogram.stft_of(spectrogram))


class EncoderGraph(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model  # all of it: what slots draw decides which cells are chosen next
        self.outputs = ["mu", "logvar", "cell", "kl", "kl_map"] + ["background"] * (model.background is not None)

    def forward(self, image):
        encoding = self.model.encode(image)
        return tuple(getattr(encoding, name) for name in self.outputs)


class SoundEncoderGraph(EncoderGraph):
    def __init__(self, model):
        super().__init__(model)
        self.levels = SoundLevels(model.bands)
        self.levels.spectrogram.magnitude = BlockMagnitude(SOUND_FFT)

    def forward(self, waveform):
        return super().forward(self.levels(waveform))


class DecoderGraph(nn.Module):
    outputs = ("layer",)

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "slot_decoder", "to_layer")

    def forward(self, z, cell):
        return self.model.decode(z, cell)


class ComposerGraph(nn.Module):
    outputs = ("image",)

    def __init__(self, model):
        super().__init__()
        self.model = part(model, "to_image")

    def forward(self, layer, background=None):
        return self.model.compose(layer, background)


class SoundComposerGraph(nn.Module):
    outputs = ("spectrogram",)

    def __init__(self, model):
        super().__init__()
        self.model, self.levels = part(model, "to_image"), SoundLevels(model.bands)

    def forward(self, layer):
        return self.levels.stft_of(self.model.compose(layer))


def graphs_of(model):
    if isinstance(model, VAE):
        return {"encoder": VAEEncoderGraph(model), "decoder": VAEDecoderGraph(model)}
    if isinstance(model, NoteVAE):
        return {
            "encoder": NoteEncoderGraph(model),
            "prior": NotePriorGraph(model),
            "decoder": NoteDecoderGraph(model),
            "vocoder": VocoderGraph(model.spectrogram),
        }
    if model.domain:
        return {
            "encoder": SoundEncoderGraph(model),
            "decoder": DecoderGraph(model),
            "composer": SoundComposerGraph(model),
            "vocoder": VocoderGraph(Spectrogram("stft", SOUND_FFT, 0)),
        }
    return {"encoder": EncoderGraph(model), "decoder": DecoderGraph(model), "composer": ComposerGraph(model)}


def example_inputs(model, size, batch, slots, seed):
    """Random inputs of every graph: {graph: {input: tensor}}. Pictures hold blobs, so that cells differ in KL."""
    generator = random_generator("export", seed)
    if isinstance(model, VAE):
        image = torch.rand(batch, 1, size, size, generator=generator)
        return {"encoder": {"image": image}, "decoder": {"z": torch.randn(batch, model.d, generator=generator)}}
    if isinstance(model, NoteVAE):
        return example_notes(model, batch, 60 + 20 * slots, generator)
    z = torch.randn(batch, slots, model.d, generator=generator)
    cell = 2 * torch.rand(batch, slots, 2, generator=generator) - 1
    composer = {"layer": model.decode(z, cell)}
    if model.domain:
        waveform = chords(batch, generator)
        spectrogram = stft_of(waveform).abs()[:, :, : 8 + 8 * slots].contiguous()
        return {
            "encoder": {"waveform": waveform},
            "decoder": {"z": z, "cell": cell},
            "composer": composer,
            "vocoder": {"spectrogram": spectrogram},
        }
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    image = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    if model.background is not None:
        composer["background"] = model.encode(image).background.contiguous()
    return {"encoder": {"image": image}, "decoder": {"z": z, "cell": cell}, "composer": composer}


def chords(n, generator):
    """Decaying chords of six frequencies: (n, SAMPLES)."""
    t = torch.arange(SAMPLES) / RATE
    frequency = 80 + 1000 * torch.rand(n, 6, 1, generator=generator)
    return 0.1 * (torch.sin(2 * torch.pi * frequency * t) * torch.exp(-t)).sum(1)


def example_notes(model, batch, frames, generator):
    """Random inputs of a model of notes; the vocoder's are the magnitudes of a decaying chord, `frames` long."""
    label = {
        "pitch": torch.randint(30, 90, (batch,), generator=generator),
        "family": torch.randint(len(model.families), (batch,), generator=generator),
    }
    label = {} if model.condition == "none" else label
    chord = chords(batch, generator)
    level = model.spectrogram(chord)[:, :, :frames]
    return {
        "encoder": {"waveform": chord, **label},
        "prior": {"noise": torch.randn(batch, model.d, generator=generator), **label},
        "decoder": {"z": torch.randn(batch, model.d, generator=generator), **label},
        "vocoder": {"spectrogram": log_expand(level).contiguous()},
    }


def free_axes(inputs):
    """Which axes stay free: the batch, the slots of slots' latents, cells and layers, a spectrogram's frames."""
    batch, slots, frames = torch.export.Dim("batch"), torch.export.Dim("slots"), torch.export.Dim("frames", min=8)
    per_slot = {name for name, value in inputs.items() if name in ("z", "cell", "layer") and value.ndim > 2}
    others = {name: {1: slots} for name in per_slot} | {"spectrogram": {2: frames}}
    return {name: {0: batch} | others.get(name, {}) for name in inputs}


# ---------------------------------------------------------------- Writing and checking


def write_onnx(graph, inputs, path, info):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(free_axes(inputs).values()),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    program.model.metadata_props["model"] = json.dumps(info)
    program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)


def write_torchscript(graph, inputs, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated in PyTorch; here it is a promised artefact
        torch.jit.trace(graph, tuple(inputs.values()), check_trace=False).save(path)


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def run_torchscript(path, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = torch.jit.load(path)(*inputs.values())
    return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]


def largest_difference(graph, expected, actual):
    """The largest difference over all outputs; infinity where shapes differ, or slots stand elsewhere.

    Absolute for outputs within [-1, 1], as pictures are, and relative to the largest value for wider ones: mask logits
    and KLs run to tens, where the rounding of single precision alone is larger than TOLERANCE.
    """
    worst = 0.0
    for name, e, a in zip(graph.outputs, expected, actual, strict=True):
        e = e.numpy()
        if e.shape != a.shape or (name == "cell" and not np.allclose(e, a, atol=1e-3)) or not np.isfinite(a).all():
            return float("inf")
        worst = max(worst, float(np.abs(e - a).max()) / max(1.0, float(np.abs(e).max())))
    return worst


def convergence_difference(graph, inputs, expected, actual):
    """By how many dB the waveforms differ in spectral convergence, on average; infinity where shapes differ."""
    waveforms = (expected[0], torch.from_numpy(actual[0]))
    if waveforms[0].shape != waveforms[1].shape or not torch.isfinite(waveforms[1]).all():
        return float("inf")
    magnitude = graph.spectrogram.stft_of(inputs["spectrogram"])
    one, other = (spectral_convergence(graph.griffin_lim.stft.magnitude(w), magnitude) for w in waveforms)
    return float((one - other).abs().mean())


def check(name, graph, path, run, cases):
    """Compare one written graph with the PyTorch one on all cases, say the verdict, return whether it agrees."""
    worst, vocoder = 0.0, isinstance(graph, VocoderGraph)
    for inputs in cases:
        expected = graph(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        actual = run(path, inputs)
        difference = convergence_difference(graph, inputs, expected, actual) if vocoder else None
        worst = max(worst, largest_difference(graph, expected, actual) if difference is None else difference)
    agrees = worst <= (DECIBELS if vocoder else TOLERANCE)
    unit = " dB of spectral convergence" if vocoder else ""
    verdict = "agrees" if agrees else "DIFFERS"
    click.echo(f"{path.name:14} {verdict}: largest difference {worst:.1e}{unit} over {len(cases)} other sizes")
    return agrees


# ---------------------------------------------------------------- Command line


def load_model(folder):
    """The model of a run folder, its config, and the step of its checkpoint."""
    config = load_config(folder)
    if config["script"] not in MODELS:
        expected = " or ".join(f"{script}.py" for script in MODELS)
        raise click.UsageError(f"{folder} was written by {config['script']}.py; expected a run of {expected}")
    if config["options"].get("sweep_beta"):
        raise click.UsageError(f"{folder} is a sweep; name one of the runs in it, {folder}/beta-...")
    kind, names = MODELS[config["script"]]
    try:
        model = kind(**{name: config["options"][name] for name in names})
    except (KeyError, TypeError) as error:
        raise click.ClickException(f"{folder}/config.json is of another version: {error}") from error
    state = load_checkpoint(folder, "cpu")
    load_state(model, state["model"], f"{folder}/checkpoint.pt")
    return model.eval(), config, state["step"]


def describe(config, checkpoint_step):
    """What a program needs to know of the model: model.json, and the metadata of every ONNX file."""
    options = config["options"]
    if config["script"] == "train_vae_mnist":
        about = {
            "kind": "vae-image",
            "size": SIDE,
            "scaling": "grey / 255, then binarised" if options["binarize"] != "none" else "grey / 255",
            "D": options["d"],
            "arch": options["arch"],
            "binarize": options["binarize"],
        }
    elif config["script"] == "train_vae_audio":
        about = {
            "kind": "vae-sound",
            "scaling": f"log(1 + {COMPRESSION:g} magnitude), mean 0 and variance 1; inside the graphs",
            "sample_rate": RATE,
            "samples": SAMPLES,
            "representation": options["representation"],
            "n_fft": options["n_fft"],
            "hop": options["n_fft"] // 4,
            "n_mels": options["n_mels"] if options["representation"] == "mel" else None,
            "D": options["d"],
            "condition": options["condition"],
            "families": options["families"],
        }
    elif options["domain"]:
        about = {
            "kind": "mvae-sound",
            "scaling": f"root mean square {LOUDNESS:g}, log(1 + {COMPRESSION:g} magnitude); inside the graphs",
            "sample_rate": RATE,
            "samples": SAMPLES,
            "n_fft": SOUND_FFT,
            "hop": SOUND_FFT // 4,
            "bands": options["size"],
            "N": options["n_slots"],
            "D": options["d"],
            "op": options["op"],
            "compose": options["compose_at"],
            "domain": options["domain"],
            "cells": options["cells"],
            "families": options["families"],
        }
    else:
        about = {
            "kind": "mvae-image",
            "crop": config["data"]["crop"],
            "size": options["size"],
            "scaling": "colours / 255",
            "N": options["n_slots"],
            "D": options["d"],
            "op": options["op"],
            "compose": options["compose_at"],
            "cells": options["cells"],
            "background": options["background"],
        }
    return {
        "kind": about.pop("kind"),
        "dataset": config["data"]["name"],
        "data_source": config["data"]["source"],
        **about,
        "steps": checkpoint_step,
        "trained": config["history"],
        "exported": versions(),
    }


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), show_default="RUN_DIR/export", help="Folder to write.")
@click.option("--torchscript/--no-torchscript", default=True, help="Write .pt files beside the .onnx files.")
@torch.no_grad()
def main(run_dir, out, torchscript):
    """Export the model of RUN_DIR and compare every graph with it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, config, step = load_model(run_dir)
    info, out = describe(config, step), out or run_dir / "export"
    size = info.get("size")
    examples = example_inputs(model, size, **EXPORTED_SIZES, seed=0)
    cases = [example_inputs(model, size, **sizes, seed=i + 1) for i, sizes in enumerate(CHECKED_SIZES)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".partial", dir=out))
    except OSError as error:
        raise click.UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        agreed = True
        for name, graph in graphs_of(model).items():
            inputs = [case[name] for case in cases]
            write_onnx(graph, examples[name], made / f"{name}.onnx", info)
            agreed &= check(name, graph, made / f"{name}.onnx", run_onnx, inputs)
            if torchscript:
                write_torchscript(graph, examples[name], made / f"{name}.pt")
                agreed &= check(name, graph, made / f"{name}.pt", run_torchscript, inputs)
        if not agreed:
            raise click.ClickException("an exported graph differs from PyTorch; nothing was written")
        (made / "model.json").write_text(json.dumps(info, indent=2) + "\n")
        for stale in out.glob("*.pt"):  # of an export before, when this one has none
            stale.unlink()
        for file in sorted(made.iterdir()):
            file.replace(out / file.name)
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()

"""A run folder -> ONNX and TorchScript graphs, each compared with the trained model before it counts as written.

    python export.py runs/mvae-clevr-alpha-N6-seed0              # writes runs/.../export/
    python export.py runs/mvae-clevr-alpha-N6-seed0 --out models/clevr --no-torchscript

| graph    | inputs                                              | outputs                                            |
|----------|-----------------------------------------------------|----------------------------------------------------|
| a run of train_vae_mnist                                                                                            |
| encoder  | image (B, 1, 28, 28) in [0, 1]                      | mu, logvar (B, D), kl (B,)                         |
| decoder  | z (B, D)                                            | image (B, 1, 28, 28): the pixels' probabilities    |
| a run of train_vae_audio; pitch and family (B,) where the model is conditional                                      |
| encoder  | waveform (B, 64000), pitch, family                  | mu, logvar (B, D), kl (B,)                         |
| prior    | noise (B, D) of N(0, I), pitch, family              | z (B, D), a sample of the fitted prior             |
| decoder  | z (B, D), pitch, family                             | spectrogram (B, bins, T): magnitudes or mel bands  |
| vocoder  | spectrogram (B, bins, T), any T of at least 8       | waveform (B, (T - 1) hop): Griffin-Lim             |
| a run of train_mvae; on sounds the last line too                                                                    |
| encoder  | image (B, 3, H, W) in [0, 1] or waveform (B, 64000) | mu, logvar (B, N, D), cell (B, N, 2), kl (B, N),   |
|          | of any loudness; in ONNX, if other than the N that  | kl_map (B, H_l, W_l), background if there is one   |
|          | the model has are wanted, slots (N,): 0, 1, ... 11  |                                                    |
| decoder  | z (B, N, D), cell (B, N, 2)                         | layer (B, N, ...)                                  |
| composer | layer (B, M, ...), background if there is one       | image (B, 3, H, W) or spectrogram (B, 2049, 64)    |
| vocoder  | spectrogram (B, 2049, T), any T of at least 8       | waveform (B, (T - 1) 1024): Griffin-Lim            |

B, N, M and T are dynamic axes; pitch is a MIDI number, family an index into the `families` of model.json. A graph that
differs from the model by more than its tolerance, at other sizes than it was traced with, on zeros, silence, full scale
or noise, or gives NaN or infinity, is reported, the exit code is 1, and an export folder of before is left as it was.
"""

import importlib
import json
import logging
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch._higher_order_ops.scan import scan
from torch.export import Dim

from common import RUN_OPTIONS, Graph, Vocoder, load_config, random_generator, versions, write_json

OPSET = 18
TOLERANCE = 1e-4  # relative to the largest value of an output, where that exceeds 1
DECIBELS = 0.1  # of a vocoder, in spectral convergence: its iterations multiply rounding
SCRIPTS = ("train_vae_mnist", "train_vae_audio", "train_mvae")
OF_SLOTS = ("mu", "logvar", "cell", "kl")  # outputs that a tie of two cells' KL may exchange, and so what is near them
BATCHES = ((1, 1), (5, 7))  # and slots, that graphs are checked with; they are traced with 2 and 3

# ---------------------------------------------------------------- Inputs


def dynamic_axes(inputs):
    """{input: {axis: name}}: the batch, the slots of slots' latents, cells and layers, a spectrogram's frames."""
    axes = {name: {0: "slots" if name == "slots" else "batch"} for name in inputs}
    for name, value in inputs.items():
        if name in ("z", "cell", "layer") and value.ndim > 2:
            axes[name][1] = "slots"
        if name == "spectrogram":
            axes[name][2] = "frames"
    return axes


def resized(inputs, batch, slots, generator):
    """The example inputs at another batch and number of slots (of frames, a multiple), each entry somewhat changed."""
    sizes, axes, other = {"batch": batch, "slots": slots, "frames": 8 + 8 * slots}, dynamic_axes(inputs), {}
    for name, value in inputs.items():
        for axis, kind in axes[name].items():
            repeated = torch.arange(sizes[kind])
            value = repeated if name == "slots" else value.index_select(axis, repeated % value.shape[axis])
        if value.is_floating_point():
            value = value * (0.7 + 0.3 * torch.rand(value.shape[:1] + (1,) * (value.ndim - 1), generator=generator))
        other[name] = value.contiguous()
    return other


def extremes(inputs, generator):
    """Inputs no training sees: zeros (silence), full scale (of latents thrice as much), noise, an end of silence."""
    full = {"image": torch.ones_like, "waveform": torch.sign, "spectrogram": lambda value: 1000 * value}
    floats = {name: value for name, value in inputs.items() if value.is_floating_point()}
    noise = {name: torch.rand(v.shape, generator=generator) * 2 - (v.min() < 0).float() for name, v in floats.items()}
    cases = {
        "zeros": {name: torch.zeros_like(value) for name, value in floats.items()},
        "full scale": {name: full.get(name, lambda v: 3 * v)(value) for name, value in floats.items()},
        "noise": noise,
        "silent end": {name: F.pad(v[..., :-6], (0, min(6, v.shape[-1]))) for name, v in floats.items()}
    }  # fmt: skip
    return {what: inputs | case for what, case in cases.items()}


# ---------------------------------------------------------------- STFT and Griffin-Lim in real arithmetic


class BlockSTFT(nn.Module):
    """The STFT and its inverse in products of real matrices, which export to ONNX: magnitudes (B, F, T) of waveforms.

    As `torch.stft` with a Hann window, centred frames, hop = n_fft / 4: a frame is four blocks a, b, c, d of one hop.
    One decimation in frequency by four, as in an FFT, leaves products with n_fft / 4 samples: bins 4 m see only
    a + b + c + d, bins 4 m + 2 a - b + c - d, odd bins a - c and b - d. Signals are held in blocks (B, T + 3, hop),
    spectra in the order of `bins`, real and imaginary part (B, T, F) each.
    """

    def __init__(self, n_fft):
        super().__init__()
        self.n_fft, self.hop = n_fft, n_fft // 4
        groups = [torch.arange(start, n_fft // 2 + 1, 4) for start in (0, 2, 1, 3)]
        bins = torch.cat(groups)
        self.sizes = [len(group) for group in groups]
        self.register_buffer("window", torch.hann_window(n_fft).view(4, 1, self.hop), persistent=False)
        self.register_buffer("bins", bins, persistent=False)
        self.register_buffer("places", bins.argsort(), persistent=False)
        self.register_buffer("weight", torch.where(bins % (n_fft // 2) == 0, 1.0, 2.0) / n_fft, persistent=False)

    def matrices(self):
        """Cosines and sines (hop, F) of all bins, computed when needed: a graph would store megabytes of them."""
        turns = torch.arange(self.hop, device=self.bins.device)[:, None] * self.bins % self.n_fft
        angle = turns.to(self.weight.dtype) * (2 * math.pi / self.n_fft)
        return angle.cos(), angle.sin()

    def transform(self, blocks, matrices):
        """Blocks (B, T + 3, hop), `matrices()` -> the spectrum, real and imaginary."""
        frames = blocks.shape[1] - 3
        a, b, c, d = (blocks.narrow(1, j, frames) * self.window[j] for j in range(4))
        even, odd, across = a + c, a - c, b - d
        (c0, c2, c1, c3), (s0, s2, s1, s3) = (matrix.split(self.sizes, dim=1) for matrix in matrices)
        first, second = even + (b + d), even - (b + d)
        re = [first @ c0, second @ c2, odd @ c1 - across @ s1, odd @ c3 + across @ s3]
        im = [first @ s0, second @ s2, odd @ s1 + across @ c1, odd @ s3 - across @ c3]
        return torch.cat(re, dim=2), -torch.cat(im, dim=2)

    def inverse(self, re, im, matrices):
        """A spectrum -> its windowed frames added up, in blocks (B, T + 3, hop): to be divided by `overlap`."""
        parts = ((value * self.weight).split(self.sizes, dim=2) for value in (re, im))
        (re0, re2, re1, re3), (im0, im2, im1, im3) = parts
        (c0, c2, c1, c3), (s0, s2, s1, s3) = (matrix.mT.split(self.sizes, dim=0) for matrix in matrices)
        first, second = re0 @ c0 - im0 @ s0, re2 @ c2 - im2 @ s2
        odd = re1 @ c1 - im1 @ s1 + re3 @ c3 - im3 @ s3
        across = re3 @ s3 + im3 @ c3 - re1 @ s1 - im1 @ c1
        even, mixed = first + second, first - second
        quarters = (even + odd, mixed + across, even - odd, mixed - across)
        return sum(F.pad(quarter * self.window[j], (0, 0, j, 3 - j)) for j, quarter in enumerate(quarters))

    def overlap(self, like):
        """What the squared windows of T frames add up to: (1, T + 3, hop); `like` is of shape (1, T)."""
        ones = torch.ones_like(like)[:, :, None]
        return sum(F.pad(ones * w.square(), (0, 0, j, 3 - j)) for j, w in enumerate(self.window)).clamp(min=1e-8)

    def reflect(self, blocks):
        """Replace the two blocks beyond either end by the signal's mirror image, as `torch.stft` pads a signal."""
        n, length = blocks.shape[1], 2 * self.hop
        first = blocks.narrow(1, 2, 3).flatten(1).narrow(1, 1, length)
        last = blocks.narrow(1, n - 5, 3).flatten(1).narrow(1, self.hop - 1, length)
        left, right = (end.flip(1).unflatten(1, (2, self.hop)) for end in (first, last))
        return torch.cat([left, blocks.narrow(1, 2, n - 4), right], dim=1)

    def forward(self, waveform):
        """(B, samples), at least three hops, of which what is beyond a whole hop is dropped -> magnitudes (B, F, T)."""
        whole = waveform[:, : waveform.shape[1] // self.hop * self.hop].unflatten(1, (-1, self.hop))
        re, im = self.transform(self.reflect(F.pad(whole, (0, 0, 2, 2))), self.matrices())
        return (re.square() + im.square()).sqrt().transpose(1, 2).index_select(1, self.places)


class GriffinLim(nn.Module):
    """The fast Griffin-Lim algorithm (Perraudin et al. 2013) from zero phases, in real arithmetic.

    It agrees with torchaudio's in spectral convergence.
    """

    def __init__(self, n_fft, iterations=32, momentum=0.99):
        super().__init__()
        self.stft, self.iterations, self.momentum = BlockSTFT(n_fft), iterations, momentum / (1 + momentum)

    def iterate(self, carry, magnitude, norm, matrices):
        """(blocks, the spectrum before) -> the same, one step nearer to `magnitude`."""
        blocks, *before = carry
        spectrum = self.stft.transform(self.stft.reflect(blocks), matrices)
        re, im = (now - self.momentum * then for now, then in zip(spectrum, before, strict=True))
        # A floor, not a tiny summand: exporters fold "+ 1e-20" away, and silence becomes 0 / 0.
        scale = magnitude / (re * re + im * im).sqrt().clamp(min=1e-10)
        return self.stft.inverse(re * scale, im * scale, matrices) * norm, *spectrum

    def forward(self, magnitude):
        """STFT magnitudes (B, F, T), T at least 4 -> waveform (B, (T - 1) * hop)."""
        frames = magnitude.shape[2]
        magnitude = magnitude.index_select(1, self.stft.bins).transpose(1, 2).contiguous()  # (B, T, F)
        norm, zero = 1 / self.stft.overlap(magnitude[:1, :, 0]), torch.zeros_like(magnitude)
        settings = {"magnitude": magnitude, "norm": norm, "matrices": self.stft.matrices()}
        carry = (self.stft.inverse(magnitude, zero, settings["matrices"]) * norm, zero, zero.clone())
        if torch.compiler.is_exporting():  # one Scan node, whose body is written once
            steps = torch.zeros(self.iterations)
            carry, _ = scan(lambda carry, i: (self.iterate(carry, **settings), i.clone()), carry, steps)
        for _ in range(0 if torch.compiler.is_exporting() else self.iterations):
            carry = self.iterate(carry, **settings)
        return carry[0].narrow(1, 2, frames - 1).flatten(1)


def in_real_arithmetic(graph):
    """Replace, in place, torchaudio's STFTs (`magnitude`) and Griffin-Lims (`inverse`), whose numbers are complex."""
    for module in list(graph.modules()):
        if hasattr(module, "magnitude"):
            module.magnitude = BlockSTFT(module.magnitude.n_fft)
        if isinstance(module, Vocoder):
            module.inverse = GriffinLim(module.inverse.n_fft, module.inverse.n_iter)


# ---------------------------------------------------------------- Writing and running


def write_onnx(graph, inputs, path, info):
    """One file without side data, opset OPSET, its batch, slots and frames dynamic; `info` is in its metadata."""
    dims = {"batch": Dim("batch"), "slots": Dim("slots"), "frames": Dim("frames", min=8)}
    axes = {name: {axis: dims[kind] for axis, kind in kinds.items()} for name, kinds in dynamic_axes(inputs).items()}
    program = torch.onnx.export(
        graph, tuple(inputs.values()), input_names=list(inputs), output_names=list(graph.outputs), opset_version=OPSET,
        dynamic_shapes=(tuple(axes.values()),) if isinstance(graph, Graph) else tuple(axes.values()), dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    for value in (value for value in program.model.graph.inputs if value.name in getattr(graph, "optional", ())):
        value.const_value = onnx_ir.tensor(inputs[value.name].numpy(), name=value.name)
        program.model.graph.register_initializer(value)  # of an input: its default
    program.model.metadata_props["model"] = json.dumps(info)
    program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def write_torchscript(graph, inputs, path, info):
    """The traced graph, frozen out of gradients, with `info` inside."""
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    traced = torch.jit.trace(graph, tuple(inputs.values()), check_trace=False)
    traced.save(path, _extra_files={"model.json": json.dumps(info)})


def run_torchscript(path, inputs):
    return [output.numpy() for output in as_tuple(torch.jit.load(path)(*inputs.values()))]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


# ---------------------------------------------------------------- Checking


def largest_difference(names, expected, actual):
    """The largest difference over all outputs; infinity where shapes differ, or an output is not finite.

    Absolute for outputs within [-1, 1], as pictures are, and relative to the largest value for wider ones: mask logits
    and KLs run to tens, where the rounding of single precision alone is larger than TOLERANCE. Where slots stand in
    other cells, which is right only when the cells' KLs tie, all but what belongs to the slots is compared.
    """
    cells = [(e.numpy(), a) for name, e, a in zip(names, expected, actual, strict=True) if name == "cell"]
    tied = any(e.shape == a.shape and not np.allclose(e, a, atol=1e-3) for e, a in cells)
    worst = 0.0
    for name, e, a in zip(names, expected, actual, strict=True):
        e = e.numpy()
        if e.shape != a.shape or not np.isfinite(a).all():
            return float("inf")
        if not (tied and name in OF_SLOTS):
            worst = max(worst, float(np.abs(e - a).max()) / max(1.0, float(np.abs(e).max())))
    return worst


def convergence_difference(graph, inputs, expected, actual):
    """By how many dB waveforms differ in spectral convergence, on average; infinity where they are not finite."""
    target, scores = graph.to_stft_magnitude(inputs["spectrogram"]), []
    n_fft = 2 * (target.shape[1] - 1)
    magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4, power=1)
    for waveform in (expected[0], torch.from_numpy(actual[0])):
        if waveform.shape != expected[0].shape or not torch.isfinite(waveform).all():
            return float("inf")
        error = (magnitude(waveform) - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1).clamp(min=1e-12)
        scores.append(20 * torch.log10(error.clamp(min=1e-6)))
    return float((scores[0] - scores[1]).abs().mean())


def check(graph, path, run, cases, trained):
    """Compare one written graph with what the trained model gave, {case: outputs}; say and return if it agrees."""
    worst, where, vocoder = 0.0, "", graph.outputs == ("waveform",)
    for what, inputs in cases.items():
        expected, actual = trained[what], run(path, inputs)
        if vocoder and what == "noise":  # no sound has such magnitudes: only that the result is finite
            difference = 0.0 if np.isfinite(actual[0]).all() else float("inf")
        elif vocoder:
            difference = convergence_difference(graph, inputs, expected, actual)
        else:
            difference = largest_difference(graph.outputs, expected, actual)
        worst, where = max((worst, where), (difference, what))
    agrees, unit = worst <= (DECIBELS if vocoder else TOLERANCE), " dB of spectral convergence" if vocoder else ""
    difference = f"{'agrees' if agrees else 'DIFFERS'}: largest difference {worst:.1e}{unit} ({where})"
    click.echo(f"{path.name:14} {difference} over {len(cases)} other inputs")
    return agrees


# ---------------------------------------------------------------- Command line


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), show_default="RUN_DIR/export", help="Folder to write.")
@click.option("--torchscript/--no-torchscript", default=True, help="Write .pt files beside the .onnx files.")
@torch.no_grad()
def main(run_dir, out, torchscript):
    """Export the model of RUN_DIR and compare every graph with it."""
    # 1. The model, by the script that trained it.
    warnings.simplefilter("ignore")  # TorchScript is deprecated in PyTorch; here it is a promised artefact
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    name = load_config(run_dir)["script"]
    if name not in SCRIPTS:
        raise click.UsageError(f"{run_dir} was written by {name}.py; expected a run of {' or '.join(SCRIPTS)}")
    script = importlib.import_module(name)
    model, out, agreed = script.load(run_dir), out or run_dir / "export", True
    config, options = model.config, model.config["options"]
    hidden = {"resume", *script.main.foreign.get(options["dataset"], ()), *(p.name for p in RUN_OPTIONS)}
    info = {p.opts[0][2:]: options[p.name] for p in script.main.params if p.name in options.keys() - hidden}
    info |= script.describe(model) | {"dataset": config["data"]["name"], "data_source": config["data"]["source"]}
    info |= {"steps": config["step"], "trained": config["history"], "exported": versions()}

    # 2. Write every graph into a new folder, and compare it; 3. replace the old export when all agree.
    try:
        out.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".partial", dir=out))
    except OSError as error:
        raise click.UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        for name, (graph, inputs) in script.graphs(model).items():
            generator = random_generator("export", name)
            cases = {f"batch {b}": resized(inputs, b, slots, generator) for b, slots in BATCHES}
            cases |= extremes(resized(inputs, *BATCHES[0], generator), generator)
            trained = {what: as_tuple(graph(*case.values())) for what, case in cases.items()}
            in_real_arithmetic(graph)
            write_onnx(graph, inputs, made / f"{name}.onnx", info)
            agreed &= check(graph, made / f"{name}.onnx", run_onnx, cases, trained)
            if torchscript:
                write_torchscript(graph, inputs, made / f"{name}.pt", info)
                agreed &= check(graph, made / f"{name}.pt", run_torchscript, cases, trained)
        if not agreed:
            raise click.ClickException("an exported graph differs from the trained model; nothing was written")
        write_json(made / "model.json", info)
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

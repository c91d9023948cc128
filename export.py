"""A run folder -> ONNX and TorchScript graphs, each compared with the trained model before it counts as written.

    python export.py runs/mvae-clevr-alpha-N6-seed0              # writes runs/.../export/
    python export.py runs/mvae-clevr-alpha-N6-seed0 --out models/clevr --no-torchscript --static --fp16

A run of train_vae_mnist gives encoder and decoder; of train_vae_audio these and vocoder (Griffin-Lim), or, of
waveforms, nn_tilde.ts for Max and Pure Data; of train_mvae encoder, decoder (of one slot), composer (of any), of sounds
vocoder; and each its fitted prior. docs/contract.json, what tensors mean, stands in model.json and every file. A graph
that differs from the model by more than its tolerance, at other sizes than it was traced with, on zeros, full scale or
noise, or gives NaN or infinity, is reported, exit code 1, and an export of before is left alone.
"""

import hashlib
import importlib
import json
import logging
import math
import tempfile
import warnings
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
import torch.nn.functional as F
import torchaudio
from filelock import FileLock, Timeout
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from common import RUN_OPTIONS, Graph, Vocoder, load_config, random_generator, versions, write_json

OPSET = 18
TOLERANCE = 1e-4  # relative to the largest value of an output, where that exceeds 1
ROUNDED = 0.05  # the same of weights of fewer bits: a graph that differs more is left out
DECIBELS = 3.0  # that a vocoder may lose in spectral convergence on any one input; on average it gains
OF_SLOTS = ("mu", "logvar", "cell", "kl")  # outputs that a tie of two cells' KL may exchange, and so what is near them
CONTRACT = json.loads((Path(__file__).parent / "docs" / "contract.json").read_text(encoding="utf-8"))
BATCHES = ((1, 1), (5, 7))  # and slots, that graphs are checked with; they are traced with 2 and 3

# ---------------------------------------------------------------- Inputs


def dynamic_axes(inputs):
    """{input: {axis: name}}: the batch, the slots of slots' latents, cells and layers, frames, blocks of a stream."""
    known, stream = {"slots": {0: "slots"}, "spectrogram": {0: "batch", 2: "frames"}}, "cache" in inputs
    blocks = {"z": {0: "batch", 2: "blocks"}, "waveform": {0: "batch", 1: "samples"}}
    slots = {n: {0: "batch", 1: "slots"} for n in ("z", "cell", "layer") if n in inputs and inputs[n].ndim > 2}
    return {name: (known | (blocks if stream else slots)).get(name, {0: "batch"}) for name in inputs}


def resized(inputs, batch, slots, generator, frames=None):
    """The example inputs at another batch, number of slots and of frames, each entry somewhat changed."""
    sizes = {"batch": batch, "slots": slots, "frames": frames or 8 + 8 * slots, "blocks": slots, "samples": 512 * slots}
    axes, other = dynamic_axes(inputs), {}
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
    cases = {
        "zeros": {name: torch.zeros_like(value) for name, value in floats.items()},
        "full scale": {name: full.get(name, lambda v: 3 * v)(value) for name, value in floats.items()},
        "noise": {n: torch.rand(v.shape, generator=generator) * 2 - (v.min() < 0).float() for n, v in floats.items()},
        "silent end": {name: F.pad(v[..., :-6], (0, min(6, v.shape[-1]))) for name, v in floats.items()}
    }  # fmt: skip
    return {what: inputs | case for what, case in cases.items()}


# ---------------------------------------------------------------- STFT and Griffin-Lim in real arithmetic


class RealSTFT(nn.Module):
    """`torch.stft` with a Hann window, hop = n_fft / 4, and its inverse, in products of small real matrices, for ONNX.

    A frame of N = R * C samples, in R rows, is transformed in steps (Bailey 1990): down its columns, by twiddle
    factors, along its rows. That gives bins r + R c; rows 0 to R / 2 hold all that a real signal has. Spectra are
    (B, T, R / 2 + 1, 2 C), real parts before imaginary ones. N = 4096 takes 0.8 million multiplications a frame.
    """

    def __init__(self, n_fft):
        super().__init__()
        self.n_fft, self.hop, self.rows = n_fft, n_fft // 4, 2 ** math.ceil(math.log2(n_fft) / 2)
        r, c, kept = torch.arange(self.rows), torch.arange(n_fft // self.rows), torch.arange(self.rows // 2 + 1)

        def turn(i, k, n):  # exp(-2 pi i k / n), of integers i (I,) and k (K,): cosines and sines (I, K)
            angle = (i[:, None] * k % n).double() * (2 * math.pi / n)
            return angle.cos().float(), -angle.sin().float()

        (re, im), twiddle, bins = turn(c, c, len(c)), turn(kept, c, n_fft), kept[:, None] + self.rows * c
        nearest = torch.minimum(bins, n_fft - bins).flatten()  # a bin k above N / 2 is the conjugate of N - k
        for name, value in {
            "window": torch.hann_window(n_fft),
            "down": torch.cat(turn(kept, r, self.rows)),  # (R + 2, R)
            "up": torch.cat(turn(kept, r, self.rows)).T.contiguous(),  # OpenVINO mixes up a constant and its .mT
            "along": torch.cat([torch.cat([re, im], dim=1), torch.cat([-im, re], dim=1)]),  # (2 C, 2 C)
            "back": torch.cat([torch.cat([re, -im], dim=1), torch.cat([im, re], dim=1)]),
            "cos": twiddle[0], "sin": twiddle[1],  # (R / 2 + 1, C)
            "bins": nearest, "sign": (bins <= n_fft // 2).float() * 2 - 1,  # (R / 2 + 1, C), flat and not
            "places": torch.zeros(n_fft // 2 + 1, dtype=torch.long).scatter(0, nearest, torch.arange(len(nearest))),
            "weight": torch.where(kept % (self.rows // 2) == 0, 1.0, 2.0)[:, None] / n_fft,  # conjugates left out
        }.items():  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def transform(self, waveform):
        """Waveforms (B, (T - 1) hop), of at least three hops -> the spectrum (B, T, R / 2 + 1, 2 C)."""
        ends = F.pad(waveform[:, None], (self.n_fft // 2, self.n_fft // 2), mode="reflect")[:, 0]
        blocks = ends.unflatten(1, (-1, self.hop))  # (B, T + 3, hop)
        frames = torch.cat([blocks[:, j : blocks.shape[1] - 3 + j] for j in range(4)], dim=2) * self.window  # (B, T, N)
        re, im = (self.down @ frames.unflatten(2, (self.rows, -1))).chunk(2, dim=2)  # (B, T, R / 2 + 1, C) each
        return torch.cat([re * self.cos - im * self.sin, re * self.sin + im * self.cos], dim=3) @ self.along

    def inverse(self, spectrum):
        """A spectrum -> its windowed frames added up, (B, (T - 1) hop): to be divided by that of a constant's."""
        re, im = (self.weight * (spectrum @ self.back)).chunk(2, dim=3)  # the transposes of the steps, backwards
        turned = torch.cat([re * self.cos + im * self.sin, im * self.cos - re * self.sin], dim=2)  # (B, T, R + 2, C)
        quarters = ((self.up @ turned).flatten(2) * self.window).chunk(4, dim=2)  # (B, T, hop) each
        blocks = sum(F.pad(quarter, (0, 0, j, 3 - j)) for j, quarter in enumerate(quarters))  # (B, T + 3, hop)
        return blocks[:, 2:-2].flatten(1)

    def magnitude(self, spectrum):
        """A spectrum (B, T, R / 2 + 1, 2 C) -> (B, T, R / 2 + 1, C)."""
        re, im = spectrum.chunk(2, dim=3)
        return (re.square() + im.square()).sqrt()

    def forward(self, waveform):
        """(B, samples), of which what is beyond a whole hop is dropped -> magnitudes (B, F, T)."""
        spectrum = self.transform(waveform[:, : waveform.shape[1] // self.hop * self.hop])
        return self.magnitude(spectrum).flatten(2).index_select(2, self.places).transpose(1, 2)


class GriffinLim(nn.Module):
    """Accelerated Griffin-Lim (Nenov et al. 2023), from phases that partials have (Beauregard et al. 2015)."""

    def __init__(self, n_fft, iterations=12, alpha=0.9, beta=0.8, gamma=1.3):  # from gamma 1.4 on it diverges
        super().__init__()
        self.stft, self.iterations, self.alpha, self.beta, self.gamma = RealSTFT(n_fft), iterations, alpha, beta, gamma

    def quarter_turns(self, magnitude):
        """Phases (B, F, T): by how much a bin moves on from frame to frame is what the peak that it belongs to says."""
        level = (magnitude / magnitude.amax((1, 2), keepdim=True).clamp(min=1e-10)).clamp(min=1e-6).log()
        left, right = (F.pad(level, pad, value=-20.0) for pad in ((0, 0, 1, 0), (0, 0, 0, 1)))
        left, right = left[:, :-1], right[:, 1:]
        to_left, to_right = (left > level) & (left >= right), (right > level) & (right > left)  # where it goes uphill
        stays, to_left, to_right = (kind.float() for kind in (~(to_left | to_right), to_left, to_right))
        peak = (left - right) / (2 * (left - 2 * level + right)).clamp(max=-1e-6)  # of a parabola
        beside = stays * peak.clamp(-0.5, 0.5)  # how many bins away the frequency is
        for _ in range(2):  # so many bins on each side belong to a peak, with a Hann window
            lower, higher = F.pad(beside, (0, 0, 1, 0))[:, :-1], F.pad(beside, (0, 0, 0, 1))[:, 1:]
            beside = to_left * (lower - 1) + to_right * (higher + 1) + stays * beside
        k, t = (torch.arange(n, dtype=torch.int32) for n in magnitude.shape[1:])
        moved = beside.cumsum(2) - 0.5 * (beside + beside[:, :, :1])  # in quarters: a hop is a quarter of a frame
        return moved + k[:, None] * (t + 2) % 4  # whole quarters of the bin itself; frames' origin is their middle

    def forward(self, magnitude):
        """STFT magnitudes (B, F, T), T at least 4 -> waveform (B, (T - 1) * hop)."""
        stft, phase = self.stft, math.pi / 2 * self.quarter_turns(magnitude)
        polar = magnitude, magnitude * phase.cos(), magnitude * phase.sin()
        polar = [value.index_select(1, stft.bins).transpose(1, 2) for value in polar]  # (B, T, (R / 2 + 1) C)
        target, re, im = (value.unflatten(2, stft.sign.shape) for value in polar)
        start = stft.inverse(torch.cat([re, stft.sign * im], dim=3))  # (B, (T - 1) hop)
        norm = 1 / stft.inverse(stft.transform(torch.ones_like(start[:1]))).clamp(min=1e-8)

        def project(waveform):
            spectrum = stft.transform(waveform)
            # A floor, not a tiny summand: exporters fold "+ 1e-20" away, and silence becomes 0 / 0.
            scale = target / stft.magnitude(spectrum).clamp(min=1e-10)
            return norm * stft.inverse(spectrum * torch.cat([scale, scale], dim=3))

        ahead = before = damped = norm * start  # c, t, d of the paper, here of waveforms, in which all of it is linear
        for _ in range(self.iterations - 1):
            now = damped + self.gamma * (project(ahead) - damped)
            ahead, before, damped = now + self.alpha * (now - before), now, now + self.beta * (now - before)
        return project(ahead)


def in_real_arithmetic(graph):
    """Replace, in place, torchaudio's STFTs (`magnitude`) and Griffin-Lims (`inverse`), whose numbers are complex."""
    for module in list(graph.modules()):
        if hasattr(module, "magnitude") and not isinstance(module, RealSTFT):
            module.magnitude = RealSTFT(module.magnitude.n_fft)
        if isinstance(module, Vocoder):
            module.inverse = GriffinLim(module.inverse.n_fft)


# ---------------------------------------------------------------- Writing and running


def write_onnx(graph, inputs, path, info, static=False):
    """One file without side data, opset OPSET, `info` in its metadata; some axes dynamic, if not `static`."""
    axes = None if static else tuple(dynamic_axes(inputs).values())
    program = torch.onnx.export(
        graph, tuple(inputs.values()), input_names=list(inputs), output_names=list(graph.outputs), opset_version=OPSET,
        dynamic_shapes=(axes,) if axes and isinstance(graph, Graph) else axes, dynamo=True, verbose=False,
    )  # fmt: skip
    DeduplicateInitializersPass(2**30)(program.model)  # transposed weights, again for every time that they are used
    written = program.model.graph
    for value in (value for value in written.inputs if value.name in getattr(graph, "optional", ())):
        value.const_value = onnx_ir.tensor(inputs[value.name].numpy(), name=value.name)
        written.register_initializer(value)  # of an input: its default
    for node in written:  # what some runtimes refuse, or cannot unify; and no traces of our code
        node.attributes.pop("allowzero", None)
        node.metadata_props.clear()
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in (*written.inputs, *written.outputs):
        value.doc_string = meaning(info["kind"], [value.name])[value.name]
    program.model.metadata_props["model"] = json.dumps(info)
    program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)


def write_small(source, path, form):
    """`source` in half precision, but for inputs and outputs, or with weights of eight bits."""
    if form == "fp16":
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)
    else:
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8)


def meaning(kind, names):
    """{tensor: shape, unit and meaning}, as docs/contract.json has them of a kind of model."""
    return {name: CONTRACT["tensors"].get(f"{name} ({kind})") or CONTRACT["tensors"][name] for name in names}


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


def largest_difference(names, expected, actual, ties=True):
    """The largest difference over all outputs; infinity where shapes differ, or an output is not finite.

    Absolute for outputs within [-1, 1], relative to the largest value for wider ones, as logits and KLs, which run to
    tens. Where slots stand in other cells, right only when their KLs tie, `ties` leaves out what belongs to slots.
    """
    cells, worst = [(e.numpy(), a) for name, e, a in zip(names, expected, actual, strict=True) if name == "cell"], 0.0
    tied = ties and "kl" in names and any(e.shape == a.shape and not np.allclose(e, a, atol=1e-3) for e, a in cells)
    for name, e, a in zip(names, expected, actual, strict=True):
        e = e.numpy()
        if e.shape != a.shape or not np.isfinite(a).all():
            return float("inf")
        if not (tied and name in OF_SLOTS):
            worst = max(worst, float(np.abs(e - a).max()) / max(1.0, float(np.abs(e).max())))
    return worst


def convergence_difference(graph, inputs, expected, actual):
    """How many dB waveforms are worse in spectral convergence, on average; infinity where they are not finite."""
    if largest_difference(graph.outputs, expected, actual) == float("inf"):
        return float("inf")
    target = graph.to_stft_magnitude(inputs["spectrogram"])
    n_fft, scores = 2 * (target.shape[1] - 1), []
    magnitude = torchaudio.transforms.Spectrogram(n_fft, hop_length=n_fft // 4, power=1)
    for waveform in (expected[0], torch.from_numpy(actual[0])):
        error = (magnitude(waveform) - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1).clamp(min=1e-12)
        scores.append(20 * torch.log10(error.clamp(min=1e-6)))
    return float((scores[1] - scores[0]).mean())


def check(graph, path, run, cases, trained, rounded=False):
    """Compare one written graph with what the trained model gave, {case: outputs}; say and return if it agrees."""
    worst, where, vocoder = 0.0, "", graph.outputs == ("waveform",)
    for what, inputs in cases.items():
        pair = trained[what], run(path, inputs)
        if vocoder:
            difference = convergence_difference(graph, inputs, *pair)
        else:
            difference = largest_difference(graph.outputs, *pair, ties=not rounded)
        worst, where = max((worst, where), (difference, what))
    agrees = worst <= (DECIBELS if vocoder else ROUNDED if rounded else TOLERANCE)
    verdict = "agrees" if agrees else "DIFFERS, left out" if rounded else "DIFFERS"
    click.echo(f"{path.name:20} {verdict}: {worst:.1e}{' dB' * vocoder} at most ({where}), over {len(cases)} inputs")
    return agrees


def write_graph(stem, graph, inputs, info, forms):
    """Write STEM.onnx and other `forms`, each compared with what the trained model gives: do those promised agree?"""
    generator, path = random_generator("export", stem.name), stem.with_suffix(".onnx")
    cases = {f"batch {b}": resized(inputs, b, slots, generator) for b, slots in BATCHES}
    cases |= extremes(resized(inputs, *BATCHES[0], generator), generator)
    one = {name: value for name, value in inputs.items() if name not in getattr(graph, "optional", ())}
    one = resized(one, 1, info.get("N", 1), generator, info.get("frames"))
    fixed = extremes(one, generator) if "static" in forms else {}
    trained = {what: as_tuple(graph(*given.values())) for what, given in cases.items()}
    trained_fixed = {what: as_tuple(graph(*given.values())) for what, given in fixed.items()}
    in_real_arithmetic(graph)
    write_onnx(graph, inputs, path, info)
    agreed = check(graph, path, run_onnx, cases, trained)
    if "static" in forms:
        write_onnx(graph, one, stem.with_suffix(".static.onnx"), info, static=True)
        agreed &= check(graph, stem.with_suffix(".static.onnx"), run_onnx, fixed, trained_fixed)
    if "torchscript" in forms:
        write_torchscript(graph, inputs, stem.with_suffix(".pt"), info)
        agreed &= check(graph, stem.with_suffix(".pt"), run_torchscript, cases, trained)
    for form in [form for form in ("fp16", "int8") if form in forms and list(graph.parameters())]:
        small = stem.with_suffix(f".{form}.onnx")
        write_small(path, small, form)
        if not check(graph, small, run_onnx, cases, trained, rounded=True):  # other cells win, say
            small.unlink()
    return agreed


# ---------------------------------------------------------------- Command line


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), show_default="RUN_DIR/export", help="Folder to write.")
@click.option("--torchscript/--no-torchscript", default=True, help="Write .pt files beside the .onnx files.")
@click.option("--static", is_flag=True, help="Write NAME.static.onnx too: one example, the model's slots and length.")
@click.option("--fp16", is_flag=True, help="Write NAME.fp16.onnx too, of half the bytes, where it is near enough.")
@click.option("--int8", is_flag=True, help="Write NAME.int8.onnx too, of a third or so, likewise.")
@torch.no_grad()
def main(run_dir, out, **forms):
    """Export the model of RUN_DIR and compare every graph with it."""
    # 1. The model, by the script that trained it.
    warnings.simplefilter("ignore")  # TorchScript is deprecated in PyTorch; here it is a promised artefact
    logging.disable(logging.WARNING)  # of what exporters fold and leave
    onnxruntime.set_default_logger_severity(3)  # errors alone
    name = load_config(run_dir)["script"]
    if name not in (scripts := ("train_vae_mnist", "train_vae_audio", "train_mvae")):
        raise click.UsageError(f"{run_dir} was written by {name}.py; expected a run of {' or '.join(scripts)}")
    script = importlib.import_module(name)
    model, out, forms = script.load(run_dir), out or run_dir / "export", [form for form in forms if forms[form]]
    config, options = model.config, model.config["options"]
    hidden = {"resume", *script.main.foreign.get(options["dataset"], ()), *(p.name for p in RUN_OPTIONS)}
    info = {p.opts[0][2:]: options[p.name] for p in script.main.params if p.name in options.keys() - hidden}
    info |= script.describe(model) | {"dataset": config["data"]["name"], "data_source": config["data"]["source"]}
    info |= {"steps": config["step"], "trained": config["history"], "exported": versions(), "axes": CONTRACT["axes"]}
    graphs, said, info = script.graphs(model), partial(meaning, info["kind"]), info | CONTRACT["kinds"][info["kind"]]
    info["graphs"] = {k: {"inputs": said(given), "outputs": said(g.outputs)} for k, (g, given) in graphs.items()}
    sums, there = out / "SHA256SUMS", [path.name for graph in graphs for path in out.glob(f"{graph}.*")]
    if there and not sums.exists():  # which says what files are an export's
        raise click.UsageError(f"--out {out}: {there[0]} is there, which no export wrote; expected another folder")

    # 2. Write every graph into a new folder, and compare it; 3. replace the old export when all agree.
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.absolute().with_name(f".{out.absolute().name}.lock"), timeout=0)
        with lock, tempfile.TemporaryDirectory(prefix=".partial", dir=out) as folder:
            agreed = [write_graph(Path(folder) / name, *pair, info, forms) for name, pair in graphs.items()]
            for name, (module, given, expected) in getattr(script, "scripted", lambda _: {})(model).items():
                module.save(str(Path(folder) / f"{name}.ts"), _extra_files={"model.json": json.dumps(info)})
                agreed.append(largest_difference(("waveform",), (expected,), (module(given).numpy(),)) < TOLERANCE)
            if not all(agreed):
                raise click.ClickException("an exported graph differs from the trained model; nothing was written")
            write_json(Path(folder) / "model.json", info)
            made = {file.name: hashlib.sha256(file.read_bytes()) for file in sorted(Path(folder).iterdir())}
            (Path(folder) / "SHA256SUMS").write_text("".join(f"{d.hexdigest()}  {name}\n" for name, d in made.items()))
            sums.touch()  # so that these are known as an export's, even if it is killed now
            before, (first, *rest) = {Path(line[66:]).name for line in sums.read_text().splitlines()}, made
            for file in (first, sums.name, *rest):  # killed between, it leaves graphs of both, which are refused
                (Path(folder) / file).replace(out / file)
            for stale in {name for name in before if name.split(".")[0] in CONTRACT["graphs"]} - made.keys():
                (out / stale).unlink(missing_ok=True)
    except Timeout as error:
        raise click.UsageError(f"--out {out}: another export is at work there") from error
    except OSError as error:
        raise click.UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    click.echo(f"written: {out}")


if __name__ == "__main__":
    main()

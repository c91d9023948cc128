"""Stage 2 on waveforms: filters, narrow bands, oscillators, streams of blocks, the start, runs, graphs, nn~."""

import json
import math

import nn_tilde
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import train

import train_vae_audio as audio
from common import RATE, SAMPLES, built_in_notes, log_spectral_distance, random_generator, synthesise
from train_vae_audio import BLOCK, DELAY, MIDDLES, PQMF, NarrowBands, Oscillators, WaveVAE, nearest_partials

LATE = 177  # samples, of the filters


def decibels(error, signal):
    return 20 * math.log10(error.norm() / signal.norm())


def sine(hertz, samples=RATE):
    return 0.1 * torch.cos(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / RATE).float()


def tiny_model(condition="none", d=4, seed=0):
    torch.manual_seed(seed)
    return WaveVAE(d=d, channels=16, condition=condition, families=["bass", "flute"])


def some_notes(n=6):
    notes = built_in_notes("train", ["bass", "flute"])
    notes = notes[:: len(notes) // n][:n]
    family = torch.tensor([int(note.family == "flute") for note in notes])
    return torch.stack([synthesise(n) for n in notes]), torch.tensor([note.pitch for note in notes]), family


def disturbed(model, by=0.05):
    """A model whose every weight does something."""
    generator = random_generator("disturbed")
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=generator) * (p.abs().mean() + by)
    return model.eval()


# ---------------------------------------------------------------- Filters, bands, oscillators


def test_bands_give_back_what_was_split_into_them():
    x = torch.randn(2, RATE, generator=random_generator("bands"))
    for signal in (x, some_notes(2)[0][:, :RATE], F.pad(torch.ones(1, 1), (0, RATE - 1))):
        bands = PQMF(synthesis=False)(F.pad(signal, (0, 192)))
        assert bands.shape == (len(signal), 16, (RATE + 192) // 16)
        assert decibels(PQMF(synthesis=True)(bands)[:, LATE : LATE + RATE] - signal, signal) < -60
    for hertz, band in ((100, 0), (3250, 6), (7900, 15)):
        power = PQMF(synthesis=False)(sine(hertz)[None])[0, :, 100:].square().mean(1)
        assert power.argmax() == band and power.sort(descending=True).values[2] < 1e-5 * power[band]


def test_narrow_bands_tell_how_loud_a_sine_is_and_where_it_lies():
    """Up to what a partial beside the middle loses in the window, and the sine of an angle instead of the angle."""
    look = torch.nn.Sequential(PQMF(synthesis=False), NarrowBands())
    for k, off in ((3, 0.0), (24, 0.8), (39, 0.4), (103, -0.7), (248, 0.2)):
        level, shift = look(sine(MIDDLES[k] + off * RATE / 1024)[None])[0, :, :, 60]
        assert level.argmax() == k
        assert abs(level[k] - math.log(1 + 100 * 256 * 0.1)) < 0.1 + 0.7 * abs(off)
        assert 4 * shift[k] / level[k] == pytest.approx(math.sin(off * math.pi / 4) * 2**0.5, abs=0.02)


@pytest.mark.parametrize("shift", [0.0, 0.7, -0.9])
def test_an_oscillator_plays_a_clean_sine_in_tune(shift):
    """Wherever it lies in its band, at edges too, where it is in two of them."""
    play, join = Oscillators(), PQMF(synthesis=True)
    for k in (1, 9, 15, 16, 100, 128, 255):
        loud, shifts = torch.zeros(2, 1, 256, 200)
        loud[:, k], shifts[:, k] = 256 * 0.1, shift
        found = join(play(loud, shifts))[0, 4000:].double()
        turn = 2 * math.pi * (MIDDLES[k] + shift * RATE / 1024) / RATE * torch.arange(len(found))
        basis = torch.stack([turn.cos(), turn.sin()], dim=1)
        parts = torch.linalg.lstsq(basis, found[:, None]).solution
        assert parts.norm() == pytest.approx(0.1, rel=0.02)
        assert decibels(found - (basis @ parts)[:, 0], found) < -45


@pytest.mark.parametrize("pitch", [28, 45, 69, 101])
def test_every_partial_of_a_pitch_asked_for_has_a_sine_in_its_band(pitch):
    """Before the net has said anything; other sines stay within their bands. Between two labels, the pitch between."""
    label, hertz = tiny_model("both").label, 440 * 2 ** ((pitch - 69) / 12)
    shift = nearest_partials(label(torch.tensor([pitch]), torch.tensor([1])))
    assert shift.shape == (1, 256) and shift.abs().max() <= 1
    played = (MIDDLES + shift[0] * RATE / 1024).double()
    for partial in range(1, int(8000 / hertz) + 1):
        assert (played - partial * hertz).abs().min() < 0.01, "50 cents are 1.2 Hz at the lowest"
    between = label(torch.tensor([pitch - 2, pitch + 2]), torch.tensor([0, 1])).mean(0, keepdim=True)
    torch.testing.assert_close(nearest_partials(between), shift, atol=1e-3, rtol=0)


@torch.no_grad()
def test_a_model_plays_the_partials_of_the_pitch_that_it_is_asked_for():
    """Told by its label alone, before training; a model without one plays the middles of the bands."""
    told = {}
    for condition, pitch in (("none", None), ("both", 45), ("both", 57)):
        model = tiny_model(condition)
        label = model.label(torch.tensor([pitch or 0]), torch.tensor([0]))
        model.oscillators.register_forward_pre_hook(lambda _, given, pitch=pitch: told.update({pitch: given[1]}))
        model.synthesise(torch.zeros(1, model.d, 4), label)
        wanted = torch.zeros(1, 256) if label is None else nearest_partials(label)
        torch.testing.assert_close(told[pitch], wanted[:, :, None].expand_as(told[pitch]))
    assert not told[45].equal(told[57])


# ---------------------------------------------------------------- Streams


@pytest.mark.parametrize("condition", ["none", "both"])
@pytest.mark.parametrize("blocks", [1, 4, 8])
@torch.no_grad()
def test_blocks_one_after_another_give_what_the_whole_gives(condition, blocks):
    model, (x, pitch, family) = tiny_model(condition), some_notes(2)
    label = model.label(pitch, family)
    model.start_at(x, label)
    disturbed(model, 0.02)
    whole = super(WaveVAE, model).encode(x, label)[0]
    played = model.synthesise(whole, label)
    graphs = audio.graphs(model)
    (encoder, given), (decoder, given_z) = graphs["encoder"], graphs["decoder"]
    cache, parts, labels = torch.zeros(2, given["cache"].shape[1]), [], () if label is None else (pitch, family)
    for block in x.split(blocks * BLOCK, dim=1):
        mu, _, _, cache = encoder(block, cache, *labels)
        parts.append(mu)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-4, rtol=1e-5)
    cache, parts = torch.zeros(2, given_z["cache"].shape[1]), []
    for block in whole.split(blocks, dim=2):
        waveform, cache = decoder(block, cache, *labels)
        parts.append(waveform)
    assert played.abs().max() > 0.1
    torch.testing.assert_close(torch.cat(parts, dim=1), played, atol=1e-5, rtol=0)
    assert all(layer.past is None for layer in model.modules() if isinstance(layer, audio.Causal))


@torch.no_grad()
def test_what_is_to_come_changes_nothing_that_was():
    model, (x, _, _) = disturbed(tiny_model()), some_notes(2)
    other = x.clone()
    other[:, 20 * BLOCK :] = 0.3
    a, b = (super(WaveVAE, model).encode(waveform, None)[0] for waveform in (x, other))
    torch.testing.assert_close(a[:, :, :20], b[:, :, :20])
    assert (a[:, :, 20:] - b[:, :, 20:]).abs().max() > 1e-2
    a, b = model.synthesise(a, None), model.synthesise(b, None)
    torch.testing.assert_close(a[:, : 20 * BLOCK], b[:, : 20 * BLOCK])


@torch.no_grad()
def test_a_steady_sound_has_steady_latents_and_sounds_steady():
    """A decoder whose output repeats with its latents could play multiples of 31.25 Hz alone."""
    model = disturbed(tiny_model())
    z = torch.randn(1, 4, 1, generator=random_generator("steady")).expand(1, 4, 100)
    spectrum = torch.fft.rfft(model.synthesise(z, None)[0, -16384:] * torch.hann_window(16384)).abs()
    top = spectrum.topk(200).indices * RATE / 16384
    assert (top / 31.25).frac().sub(0.5).abs().min() < 0.3, "partials lie between multiples"


# ---------------------------------------------------------------- The start, the objective, the prior


@torch.no_grad()
def test_the_untrained_model_plays_what_it_heard_in_time_and_does_not_depend_on_the_seed():
    x, pitch, family = some_notes(12)
    decoded = []
    for seed in (1, 2):
        model = tiny_model(d=8, seed=seed)
        model.start_at(x, None)
        decoded.append(model.reconstruct(x, None)[0])
    torch.testing.assert_close(*decoded, atol=1e-4, rtol=0)
    mu, logvar = model.encode(x, None)
    assert mu.shape == logvar.shape == (len(x), 8, SAMPLES // BLOCK + 2) and (logvar < 0).all()
    torch.testing.assert_close(mu.transpose(0, 1).flatten(1).std(1), torch.ones(8), atol=0.2, rtol=0)
    distance = [log_spectral_distance(model.level(y), model.level(x)) for y in (decoded[0], x.roll(1, 0))]
    assert distance[0].mean() < 0.6 * distance[1].mean(), "nearer than another note"
    late = [log_spectral_distance(model.level(decoded[0].roll(k, 1)), model.level(x)).mean() for k in (-512, 0, 512)]
    assert late[1] < min(late[0], late[2])
    conditional = tiny_model("both", d=8)
    conditional.start_at(x, conditional.label(pitch, family))
    given, _ = conditional.encode(x, conditional.label(pitch, family))
    apart = [(v[family == 0].mean((0, 2)) - v[family == 1].mean((0, 2))).norm() for v in (mu, given)]
    assert apart[1] < 0.8 * apart[0], "the label explains the family; the latents need not"


def test_every_parameter_gets_a_gradient_from_sound_and_silence():
    x, pitch, family = some_notes(4)
    x = x[:, : 8 * BLOCK]
    x[-1] = 0
    model = tiny_model("both")
    label = model.label(pitch, family)
    model.start_at(x, label)
    noise = torch.randn(len(x), *model.latents, generator=random_generator("noise"))
    for _ in range(3):  # the residual blocks start as the identity: their first layers wait for the last ones
        loss, terms = audio.objective(model, x, label, noise, 1.0)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
    assert all(p.grad.abs().sum() > 0 and torch.isfinite(p.grad).all() for p in model.parameters())
    assert all(torch.isfinite(v) for v in terms.values())


@pytest.mark.parametrize("band, shift", [(5, 0.5), (20, -0.5), (40, 0.9), (41, 0.0), (101, -1.0), (250, 0.3)])
def test_what_is_heard_of_a_steady_sine_is_known_without_playing_it(band, shift):
    model, bands = tiny_model(), slice(band - 2, band + 3)
    loud, off = torch.zeros(1, 256, 64), torch.zeros(1, 256, 64)
    loud[:, band], off[:, band] = 4.0, shift
    heard = model.analysis(model.synthesis(model.oscillators(loud, off)))[0, :, bands, -1]
    assert torch.allclose(model.analysis[1].of_sines(loud, off)[0, :, bands, -1], heard, atol=0.03)


def test_sines_at_middles_and_ends_of_bands_or_nearly_have_finite_gradients():
    """Where sincs are 0 / 0; a partial of a pitch may be a whole band off, too."""
    middles, near = torch.arange(-2, 3), torch.tensor([0, 1e-7, -1e-7, 6e-8, 1e-5, -9.99e-5, 1e-4])
    shift = (middles[:, None] + near).flatten().tile(1, 256, 1).requires_grad_()  # (1, 256, 35)
    loud = torch.rand(shift.shape, generator=random_generator("loud")).requires_grad_()
    off = NarrowBands().of_sines(loud, shift)[:, 1]
    exact = NarrowBands().of_sines(loud.double(), shift.double() + 2e-4)[:, 1]
    assert (off - exact).abs().max() < 0.01
    off.sum().backward()
    assert torch.isfinite(shift.grad).all() and torch.isfinite(loud.grad).all() and shift.grad.abs().max() < 100


@torch.no_grad()
def test_what_is_heard_of_many_sines_is_known_on_average_over_phases():
    """Of their powers: where neighbours beat, a single set of phases is far off."""
    model, generator = tiny_model(), random_generator("many")
    loud = torch.rand(1, 256, 1, generator=generator).expand(-1, -1, 640).contiguous()
    shift = 2 * torch.rand(1, 256, 1, generator=generator).expand(-1, -1, 640).contiguous() - 1
    level, _ = model.analysis(model.synthesis(model.oscillators(loud, shift)))[0, :, :, 40:].unbind(0)
    power = (level.exp() - 1).square().mean(1)
    expected = (model.analysis[1].of_sines(loud, shift)[0, 0, :, -1].exp() - 1).square()
    ratio = 10 * torch.log10(expected / power)
    assert ratio.abs().median() < 0.3


def test_a_frequency_that_is_wrong_gets_a_gradient_towards_the_right_one():
    """And none from spectra, where phases would decide its direction."""
    model, wanted = tiny_model(), sine(MIDDLES[40] + 6.0, 16 * BLOCK)[None]
    for start, sign in ((-0.5, -1), (-0.1, -1), (0.1, -1), (0.9, 1)):
        loud, shift = torch.zeros(1, 256, 64), torch.full((1, 256, 64), start, requires_grad=True)
        loud[:, 40] = 256 * 0.1
        off = (model.analysis[1].of_sines(loud, shift) - model.analysis(wanted))[:, 1, :, 12:]
        off.square().mean().backward()
        assert (shift.grad[0, 40, 12:].sign() == sign).all()
    x, model = some_notes(2)[0], disturbed(tiny_model())
    *spectra, (off, _) = model.compared(x, torch.randn(2, *model.latents), None)
    sum(decoded.mean() for decoded, _ in spectra).backward(retain_graph=True)
    assert all(p.grad is None for p in model.shift.parameters())
    off.mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.shift.parameters())


@torch.no_grad()
def test_half_precision_leaves_pitches_asked_for_as_they_are():
    model = tiny_model("both")
    label = model.label(torch.tensor([28, 101]), torch.tensor([0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        _, shift = model.controls(torch.zeros(2, model.d, 4), label)
    assert torch.equal(shift, nearest_partials(label)[:, :, None].expand_as(shift))


@torch.no_grad()
def test_half_precision_leaves_filters_and_oscillators_as_they_are():
    """Of bfloat16, phases would be wrong by percents of a turn; nets may have it."""
    model, (x, _, _) = tiny_model(), some_notes(2)
    model.start_at(x, None)
    z = model.encode(x, None)[0]
    decoded, notes = zip(*model.compared(x, z, None), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        scaled = model.scaled(x)
        half, same = zip(*model.compared(x, z, None), strict=True)
    assert torch.equal(scaled, model.scaled(x)) and all(map(torch.equal, notes, same))
    assert all((a - b).abs().mean() < 0.1 for a, b in zip(decoded, half, strict=True))


@torch.no_grad()
def test_the_prior_of_many_latents_gives_sequences_as_the_posteriors_are():
    generator = random_generator("sequences")
    basis, n = torch.linalg.qr(torch.randn(200, 3, generator=generator))[0], audio.EXEMPLARS
    scores = torch.randn(n, 3, generator=generator) * torch.tensor([5.0, 3.0, 2.0])
    mu = 1.5 + scores @ basis.T
    prior = audio.ExemplarPrior((50, 4), False)
    assert prior.d == audio.SCORES
    number = torch.zeros(n).long()
    prior.fit(mu, torch.full((n, 200), -9.0), number, number)
    z = prior(torch.randn(n, 1 + prior.d, generator=generator))
    assert z.shape == (n, 50, 4)
    z = z.flatten(1)
    torch.testing.assert_close(z.mean(0), mu.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(((z - 1.5) @ basis).std(0), torch.tensor([5.0, 3.0, 2.0]), rtol=0.1, atol=0)
    rest = (z - 1.5) - (z - 1.5) @ basis @ basis.T
    assert rest.square().mean() < 0.01 * z.var()


# ---------------------------------------------------------------- Runs and graphs


def test_a_run_on_waveforms_leaves_numbers_pictures_and_sounds(wave_run):
    metrics = json.loads((wave_run / "metrics.json").read_text())
    assert {"lsd", "lsd_sound", "step_0/lsd", "kl"} <= metrics.keys()
    assert metrics["lsd"] == pytest.approx(metrics["lsd_sound"], rel=1e-3), "its levels are those of its sound"
    pictures = {path.stem for path in (wave_run / "figures").glob("*.png")}
    assert pictures - {"latents"} == {"reconstructions", "samples", "interpolations"}  # an experiment adds it
    assert (wave_run / "sounds" / "samples-fitted-0.wav").is_file()


def test_a_conditional_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    for name in ("show_reconstructions", "show_latents", "fit_prior"):
        monkeypatch.setattr(audio, name, lambda *_: None)
    monkeypatch.setattr(audio, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(audio, "START_NOTES", 8)
    args = ["--families", "bass", "--channels", 16, "--D", 3, "--batch", 2, "--device", "cpu", "--condition", "both"]
    args += ["--representation", "waveform"]
    train(*args, "--steps", 3, "--out", tmp_path / "whole", main=audio.main)
    real, done = audio.optimizer_step, []

    def optimizer_step(*arguments):
        if len(done) == 2:
            raise audio.click.UsageError("a damaged file")
        done.append(None)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(audio, "optimizer_step", optimizer_step)
        with pytest.raises(AssertionError):
            train(*args, "--steps", 3, "--out", tmp_path / "parts", main=audio.main)
    train("--resume", tmp_path / "parts", main=audio.main)
    whole, parts = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def chord(seconds):
    t = torch.arange(seconds * RATE // BLOCK * BLOCK) / RATE
    tones = [torch.sin(2 * math.pi * f * t) * torch.exp(-((t % 1.7) * f / 500)) for f in (220.0, 331.0, 884.0)]
    return 0.2 * sum(tones)[None]


def onnx_stream(folder, name, blocks, outputs):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    shapes = {i.name: i.shape for i in session.get_inputs()}
    first, cache, found = next(iter(shapes)), np.zeros((1, shapes["cache"][1]), np.float32), []
    for block in blocks:
        *out, cache = session.run([*outputs, "next_cache"], {first: np.ascontiguousarray(block), "cache": cache})
        found.append(out[0])
    return found


@torch.no_grad()
def test_exported_streams_agree_with_pytorch_over_ten_seconds(wave_run):
    model, x = audio.load(wave_run), chord(10)
    mu, _ = super(WaveVAE, model).encode(x, None)
    waveform = model.synthesise(mu, None)
    blocks = x[:, : 308 * BLOCK].numpy().reshape(-1, 1, 4 * BLOCK)
    found = np.concatenate(onnx_stream(wave_run / "export", "encoder", blocks, ["mu"]), axis=2)
    np.testing.assert_allclose(found, mu[:, :, : found.shape[2]], atol=1e-4)
    blocks = np.split(found, 77, axis=2)
    played = np.concatenate(onnx_stream(wave_run / "export", "decoder", blocks, ["waveform"]), axis=1)
    assert played.shape == (1, 308 * BLOCK)
    np.testing.assert_allclose(played, waveform[:, : played.shape[1]], atol=1e-4)
    assert json.loads((wave_run / "export" / "model.json").read_text())["delay"] == DELAY


class Host(nn_tilde.Module):
    """What nn~'s own package makes of our module: it checks the shapes that methods give."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        for name in module.get_methods():
            self.register_method(name, *getattr(module, f"{name}_params").tolist())

    def encode(self, x):
        return self.module.encode(x)

    def decode(self, x):
        return self.module.decode(x)

    def forward(self, x):
        return self.module(x)


@torch.no_grad()
def test_the_module_for_nn_tilde_keeps_its_contract_and_plays_what_the_model_plays(wave_run):
    module = torch.jit.load(wave_run / "export" / "nn_tilde.ts")
    model, x = audio.load(wave_run), chord(1)
    assert module.get_methods() == ["encode", "decode", "forward"] and module.get_attributes() == []
    assert module.encode_params.tolist() == [1, 1, 3, BLOCK] and module.decode_params.tolist() == [3, BLOCK, 1, 1]
    expected = model.synthesise(super(WaveVAE, model).encode(x, None)[0], None)
    found = torch.cat([module(block[:, None])[:, 0] for block in x.split(2 * BLOCK, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert Host(torch.jit.load(wave_run / "export" / "nn_tilde.ts")).get_methods() == module.get_methods()
    assert module(torch.zeros(3, 1, 2048)).shape == (3, 1, 2048), "as many channels as the host has"

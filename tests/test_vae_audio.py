"""Stage 2: the start at principal components, the objective, labels, the fitted prior, interpolation, runs, graphs."""

import json
import math
import signal
from types import SimpleNamespace

import click
import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import train, write_nsynth

import common
import export
import train_vae_audio as audio
from common import (
    BUILT_IN,
    RATE,
    SAMPLES,
    NoteSplit,
    Run,
    built_in_notes,
    random_generator,
    synthesise,
    versions,
)
from train_vae_audio import Spectrogram, SpectrumVAE, spectral_convergence

TINY = ["--channels", "16", "--D", "3", "--batch", "4", "--steps", "1", "--device", "cpu"]
TWO = [("flute", 60), ("guitar", 48), ("flute", 64), ("guitar", 52)]


def run(*args):
    return CliRunner().invoke(audio.main, [str(a) for a in args])


def tiny_model(condition="none", d=3, representation="stft", n_fft=1024, seed=0):
    torch.manual_seed(seed)
    about = {"n_fft": n_fft, "n_mels": 64, "d": d, "channels": 16, "families": ["bass", "flute"]}
    return SpectrumVAE(representation=representation, condition=condition, **about)


def some_levels(n=12):
    notes = built_in_notes("train", ["bass", "flute"])[:n]
    waveforms = torch.stack([synthesise(note) for note in notes])
    pitch = torch.tensor([note.pitch for note in notes])
    return Spectrogram("stft", 1024, 0)(waveforms), pitch, torch.tensor([int(n.family == "flute") for n in notes])


# ---------------------------------------------------------------- Model


def test_principal_components_are_those_of_an_svd_on_either_side():
    for shape in ((30, 7), (7, 30)):
        x = torch.randn(*shape, generator=random_generator("pca"))
        mean, scales, directions = audio.principal(x, 4)
        _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        torch.testing.assert_close(scales, s[:4] / len(x) ** 0.5, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close((directions.T @ v[:4].T).abs(), torch.eye(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(mean, x.mean(0))
    assert audio.principal(torch.randn(3, 50), 6)[2].shape == (50, 6)


@torch.no_grad()
def test_the_untrained_model_is_a_principal_component_analysis():
    level, pitch, family = some_levels()
    model = tiny_model(d=8)
    model.start_at(level, None)
    mu, logvar = model.encode(level, None)
    torch.testing.assert_close(mu.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(mu.std(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)
    assert (logvar < 0).all()
    decoded, _, _ = model.reconstruct(level, None)
    explained = 1 - (decoded - level).square().mean() / (level - level.mean(0)).square().mean()
    assert explained > 0.7
    conditional = tiny_model("both", d=8)
    conditional.start_at(level, conditional.label(pitch, family))
    given, _ = conditional.encode(level, conditional.label(pitch, family))
    apart = [(v[family == 0].mean(0) - v[family == 1].mean(0)).norm() for v in (mu, given)]
    assert apart[1] < 0.8 * apart[0], "the label explains the family; the latents need not"


@torch.no_grad()
def test_the_start_does_not_depend_on_the_seed():
    """So that what a run started from can be had again when it has been trained."""
    level, _, _ = some_levels(4)
    decoded = []
    for seed in (1, 2):
        model = tiny_model(seed=seed)
        model.start_at(level, None)
        decoded.append(model.reconstruct(level, None)[0])
    torch.testing.assert_close(*decoded)


def test_every_parameter_gets_a_gradient_and_the_label_changes_what_is_decoded():
    level, pitch, family = some_levels()
    for condition in ("none", "both"):
        model = tiny_model(condition)
        label = model.label(pitch, family)
        model.start_at(level, label)
        for _ in range(2):  # the residual blocks start as the identity: their first layers wait for the last ones
            loss, terms = audio.objective(model, level, label, torch.randn(12, 3), 1.0)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        assert all(torch.isfinite(v) for v in terms.values())
    z = torch.randn(1, 3).expand(2, 3)
    one, two = model.decode(z, model.label(pitch[[0, -1]], family[[0, -1]])).detach()
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
@torch.no_grad()
def test_every_size_of_frame_that_is_offered_encodes_decodes_and_sounds(n_fft):
    model, waveform = tiny_model(n_fft=n_fft), synthesise(built_in_notes("test", ["flute"])[0])[None]
    level = model.front(waveform)
    model.start_at(level, None)
    decoded, _, _ = model.reconstruct(level, None)
    assert decoded.shape == level.shape == (1, n_fft // 2 + 1, SAMPLES // (n_fft // 4) + 1)
    assert model.sound(decoded).shape == (1, SAMPLES)


# ---------------------------------------------------------------- Objective


@torch.no_grad()
def test_the_objective_is_the_negative_elbo_at_beta_1():
    level, _, _ = some_levels(4)
    model = tiny_model()
    model.start_at(level, None)
    noise = torch.randn(4, 3, generator=random_generator("noise"))
    loss, _ = audio.objective(model, level, None, noise, 1.0)
    mu, logvar = model.encode(level, None)
    decoded = model.scaled(model.decode(mu + (0.5 * logvar).exp() * noise, None))
    x = model.scaled(level)
    sigma = (decoded - x).square().mean().sqrt()
    log_likelihood = torch.distributions.Normal(decoded, sigma).log_prob(x).sum((1, 2)).mean()
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum(1).mean()
    assert loss.item() * level[0].numel() == pytest.approx((kl - log_likelihood).item(), rel=1e-4)


def gradient(model, *batch):
    model.zero_grad()
    loss, terms = audio.objective(model, *batch, 1.0)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item(), terms["loss/sigma"]


def test_two_processes_of_four_notes_have_the_gradient_of_one_of_eight(monkeypatch):
    level, _, _ = some_levels(8)
    level[4:] *= 0.2  # the halves' errors differ, and with them their own variances
    model, noise = tiny_model(), torch.randn(8, 3, generator=random_generator("noise"))
    model.start_at(level, None)
    whole, loss, sigma = gradient(model, level, None, noise)
    halves = [(level[part], None, noise[part]) for part in (slice(0, 4), slice(4, 8))]
    own = [gradient(model, *half)[2].square() for half in halves]
    assert max(own) > 1.3 * min(own)

    monkeypatch.setattr(audio.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(audio.dist, "get_world_size", lambda: 2)
    both = []
    for half, other in zip(halves, reversed(own), strict=True):  # whose message adds what the other process has
        monkeypatch.setattr(audio.dist, "all_reduce", lambda value, other=other: value.add_(other / 2))
        both.append(gradient(model, *half))
    torch.testing.assert_close((both[0][0] + both[1][0]) / 2, whole, rtol=1e-3, atol=1e-5)
    assert (both[0][1] + both[1][1]) / 2 == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(both[0][2], sigma)


def test_the_gradient_is_that_of_the_log_of_the_error():
    """The variance is held constant where it is the most likely one, which the envelope theorem allows."""
    level, _, _ = some_levels(4)
    model, noise = tiny_model(), torch.zeros(4, 3)
    model.start_at(level, None)
    found, _, _ = gradient(model, level, None, noise)
    model.zero_grad()
    mu, logvar = model.encode(level, None)
    error = model.scaled(model.decode(mu, None) - level + model.mean).square().mean()
    (0.5 * error.log() + audio.gaussian_kl(mu, logvar).sum(1).mean() / level[0].numel()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- Prior, interpolation


@torch.no_grad()
def test_the_fitted_prior_gives_what_the_posteriors_add_up_to():
    generator = random_generator("posteriors")
    n, factor = audio.EXEMPLARS, torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    pitch, family = (torch.randint(low, high, (n,), generator=generator) for low, high in ((48, 73), (0, 2)))
    x = (pitch - 60) / 12
    curve = torch.stack([2 * x + 1, x.square()], dim=1) * (1 - 2 * family[:, None])  # of family 1 the opposite
    mu = curve + torch.randn(n, 2, generator=generator) @ factor.T
    logvar = torch.full((n, 2), 0.3).log()
    prior = audio.ExemplarPrior((2,), True)
    noise = torch.randn(n, 3, generator=generator)
    torch.testing.assert_close(prior(noise, pitch, family), noise[:, 1:])

    prior.fit(mu, logvar, pitch, family)
    rest = prior(noise, pitch, family) - curve
    torch.testing.assert_close(rest.mean(0), torch.zeros(2), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(rest.T), factor @ factor.T + 0.3 * torch.eye(2), atol=0.25, rtol=0)
    rare = torch.cat([torch.full((1, 1), -5.0), torch.zeros(1, 2)], dim=1)
    first = prior(rare.expand(2, -1), torch.tensor([60, 60]), torch.tensor([0, 1]))
    assert (first[0] - first[1]).abs().max() > 0.5, "the first note is of one family alone, the least noise of each"
    ends = prior(noise[:1].expand(2, -1), torch.tensor([80, 127]), torch.tensor([0, 0]))
    torch.testing.assert_close(ends[0], ends[1])  # beyond what is known, the nearest notes

    alike = audio.ExemplarPrior((2,), False)
    alike.fit(mu, logvar, pitch, family)
    torch.testing.assert_close(alike(noise).mean(0), mu.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(alike(noise).T), torch.cov(mu.T) + 0.3 * torch.eye(2), atol=0.3, rtol=0)
    torch.testing.assert_close(alike(noise, pitch, family), alike(noise))


@torch.no_grad()
def test_the_fitted_prior_has_nothing_between_notes_that_differ_and_is_as_wide_as_makes_others_likely():
    generator = random_generator("apart")
    mu = torch.randn(1000, 1, generator=generator) + 20 * torch.randint(-1, 2, (1000, 1), generator=generator)
    nothing, prior = torch.zeros(1000).long(), audio.ExemplarPrior((1,), False)
    prior.fit(mu, torch.full((1000, 1), -9.0), nothing, nothing)
    z = prior(torch.randn(3000, 2, generator=generator))
    near = (z - 20 * (z / 20).round()).abs()
    assert near.max() < 8 and (z.abs() > 10).float().mean() == pytest.approx(2 / 3, abs=0.05)
    assert 0.9 < near.square().mean().sqrt() < 2.2  # 1, and a tenth of the distances, the least that is tried


@torch.no_grad()
def test_a_label_asks_for_notes_of_its_family_near_its_pitch():
    pitch, family = torch.arange(40, 80).repeat(2), torch.tensor([0, 1]).repeat_interleave(40)
    mu, prior = torch.stack([pitch, 100.0 * family], dim=1), audio.ExemplarPrior((2,), True)
    prior.fit(mu, torch.full((80, 2), -9.0), pitch, family)
    asked = torch.tensor([40, 60, 79]).repeat_interleave(100)
    for kind in (0, 1):
        noise = torch.randn(300, 3, generator=random_generator("asked", kind))
        z = prior(noise, asked, torch.full_like(asked, kind))
        assert (z[:, 1] - 100 * kind).abs().max() < 20, "of this family"
        assert (z[:, 0] - asked).abs().mean() < 2 * audio.NEAR and (z[:, 0] - asked).abs().max() < 8 * audio.NEAR


@torch.no_grad()
def test_noise_of_zero_picks_the_same_note_however_weights_are_rounded():
    """Notes as far below a pitch as above it weigh alike, so that one half of all weights ends between two of them."""
    pitch, prior = torch.tensor([50, 52, 54, 56, 58, 60, 62, 64, 66, 68, 70]), audio.ExemplarPrior((1,), True)
    prior.fit(pitch[:, None].float(), torch.full((11, 1), -9.0), pitch, torch.zeros(11).long())
    asked = torch.arange(50, 71)
    z = prior(torch.zeros(21, 2), asked, torch.zeros(21).long())
    exact = prior.double()(torch.zeros(21, 2).double(), asked, torch.zeros(21).long())
    torch.testing.assert_close(z.double(), exact, atol=1e-3, rtol=0)


@torch.no_grad()
def test_every_note_counts_once_however_many_there_are():
    mu, nothing = torch.randn(1500, 2, generator=random_generator("once")), torch.zeros(1500).long()
    for conditional in (False, True):
        prior = audio.ExemplarPrior((2,), conditional)
        prior.fit(mu, torch.full((1500, 2), -2.0), nothing + 60, nothing)
        weight = prior.log_weights(nothing[:1] + 60 * conditional, nothing[:1]).softmax(1)[0]
        torch.testing.assert_close(weight, torch.tensor([1 / 1500] * 1500 + [0.0] * 501))


@torch.no_grad()
def test_a_prior_fitted_to_one_note_is_a_distribution():
    for conditional in (False, True):
        prior = audio.ExemplarPrior((4,), conditional)
        label = torch.tensor([60]), torch.tensor([1])
        prior.fit(torch.full((1, 4), 3.0), torch.full((1, 4), -9.0), *label)
        z = prior(torch.randn(50, 5, generator=random_generator("one")), *(v.expand(50) for v in label))
        assert torch.isfinite(z).all() and (z.std(0) > 0.03).all()
        assert (z.mean(0) - 3).abs().max() < 1, "around the note"


def test_interpolations_end_at_their_ends_and_slerp_keeps_the_norm_law():
    a, b = torch.randn(2, 64, generator=random_generator("ends"))
    b = 2 * b
    share = torch.linspace(0, 1, 9)[:, None]
    for way in (torch.lerp, audio.slerp):
        torch.testing.assert_close(way(a, b, share)[[0, -1]], torch.stack([a, b]), atol=1e-5, rtol=1e-4)
    lengths = audio.slerp(a, b, share).norm(dim=1)
    torch.testing.assert_close(lengths, ((1 - share) * a.norm() + share * b.norm())[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.lerp(a, b, share).norm(dim=1)[4] < 0.9 * lengths[4]
    angles = torch.nn.functional.normalize(audio.slerp(a, b, share), dim=1)
    steps = (angles[1:] * angles[:-1]).sum(1)
    torch.testing.assert_close(steps, steps[:1].expand(8), atol=1e-4, rtol=0)
    assert torch.isfinite(audio.slerp(a, a, share)).all() and torch.isfinite(audio.slerp(a, -a, share)).all()


# ---------------------------------------------------------------- Runs


def test_a_run_leaves_numbers_pictures_and_sounds(notes_run):
    metrics = json.loads((notes_run / "metrics.json").read_text())
    names = {f"{form}{n}" for form in ("", "step_0/") for n in ("lsd", "kl", "lsd_sound", "convergence_sound", "notes")}
    assert all(math.isfinite(metrics[name]) for name in names)
    assert set(metrics) == {*names, "split", "step", "minutes", "data"}
    assert (metrics["data"], metrics["split"]) == (BUILT_IN, "test")
    curve = json.loads((notes_run / "curve.json").read_text())
    assert [point["step"] for point in curve] == [0, 1]
    pictures = {path.stem for path in (notes_run / "figures").glob("*.png")}
    assert pictures == {"reconstructions", "samples", "interpolations", "scale"}
    for name in ("reconstructions-decoded", "samples-fitted-0", "interpolations-linear", "interpolations-spherical-3"):
        waveform, rate = soundfile.read(notes_run / "sounds" / f"{name}.wav")
        assert rate == RATE and len(waveform) >= RATE and np.isfinite(waveform).all()


def test_sounds_of_nested_families_lie_side_by_side_and_no_git_is_no_fault(tmp_path, monkeypatch):
    Run.sound(SimpleNamespace(folder=tmp_path), "scale-strings/violin-0", torch.zeros(100))
    assert [path.name for path in (tmp_path / "sounds").iterdir()] == ["scale-strings-violin-0.wav"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["commit"] == "not a git checkout"


def without_reports(monkeypatch):
    for name in ("show_reconstructions", "show_latents"):
        monkeypatch.setattr(audio, name, lambda *_: None)
    monkeypatch.setattr(audio, "evaluate", lambda *_, **__: {})


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    without_reports(monkeypatch)
    args = ["--families", "bass", "--channels", 16, "--D", 3, "--batch", 4, "--steps", 5, "--device", "cpu"]
    args += ["--condition", "both"]
    train(*args, "--out", tmp_path / "whole", main=audio.main)
    real, done = audio.optimizer_step, []

    def optimizer_step(*arguments):
        if len(done) == 3:
            raise click.UsageError("a damaged file")
        done.append(None)
        return real(*arguments)

    monkeypatch.setattr(audio, "optimizer_step", optimizer_step)
    assert run(*args, "--out", tmp_path / "parts").exit_code == 1
    done.clear()
    monkeypatch.setattr(audio, "optimizer_step", lambda *_: 1 / 0)  # before there is a checkpoint
    assert isinstance(run(*args, "--out", tmp_path / "start").exception, ZeroDivisionError)
    assert not (tmp_path / "start" / "checkpoint.pt").exists()
    monkeypatch.setattr(audio, "optimizer_step", real)
    for name in ("parts", "start"):
        assert "done" in train("--resume", tmp_path / name, main=audio.main).output
    whole, *others = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "parts", "start")
    )
    assert all(torch.equal(whole[name], other[name]) for name in whole for other in others)


def test_who_asks_to_stop_during_an_evaluation_gets_one_more_step_and_a_prior_fitted_to_it(tmp_path, monkeypatch):
    without_reports(monkeypatch)
    fitted, scored, fit_prior = [], [], audio.fit_prior

    def evaluate(*_, **__):
        scored.append(None)
        if len(scored) == 2:  # after step 1 of 5; the first is of the start
            signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(audio, "evaluate", evaluate)
    monkeypatch.setattr(audio, "fit_prior", lambda *a: fitted.append(None) or fit_prior(*a))
    args = ["--families", "bass", *TINY[:-4], "--device", "cpu", "--steps", 5, "--out", tmp_path / "run"]
    assert "stopped at step 2" in train(*args, main=audio.main).output
    assert len(fitted) == 2 and torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_figures_are_drawn_of_one_valid_note_and_of_the_highest_pitches(monkeypatch):
    families, drawn = ["bass", "flute"], {}
    monkeypatch.setattr(audio, "show", lambda model, run, name, title, rows: drawn.update({name: rows}))
    splits = {split: NoteSplit(built_in_notes(split, families)[:1], families, split) for split in ("train", "valid")}
    model = tiny_model("both")
    model.prior.fit(torch.randn(3, 3), torch.zeros(3, 3), torch.tensor([125, 126, 127]), torch.tensor([1, 1, 1]))
    audio.show_latents(model, splits, SimpleNamespace(options={"families": families}))
    assert len(drawn["interpolations"]["linear"][0]) == 7
    assert drawn["scale"]["flute"][1][-1] == "MIDI 127" and "bass" not in drawn["scale"]


def test_a_run_on_files_with_transposed_notes_and_mel_bands(tmp_path):
    root = write_nsynth(tmp_path / "nsynth", [("flute", p) for p in range(60, 76)], form="flac")
    out = tmp_path / "run"
    args = ["--data-root", root, "--families", "flute", "--transpose", 1, "--representation", "mel", "--n-mels", 64]
    train(*args, "--condition", "both", *TINY, "--eval", "quick", "--out", out, main=audio.main)
    assert (out / "figures" / "scale.png").is_file() and (out / "sounds" / "scale-flute.wav").is_file()
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["source"] == "notes in NSynth's layout, folder nsynth"
    assert config["data"]["notes"] == {"train": 48, "valid": 16, "test": 16}
    about = audio.describe(audio.load(out))
    assert about["kind"] == "vae-sound" and about["hop"] == 256


def test_runs_on_own_notes_that_names_label_or_nothing_does(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "START_NOTES", 8)
    monkeypatch.setattr(audio, "show", lambda *_: None)
    monkeypatch.setattr(audio, "evaluate", lambda *_, **__: {})
    root, t = tmp_path / "mine", np.arange(RATE) / RATE
    for i in range(60):
        path = root / ("flute", "oboe")[i % 2] / f"{i}_{'CDEFGAB'[i % 7]}{3 + i % 2}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.5 * np.exp(-t) * np.sin(2 * np.pi * (220 + 5 * i) * t), RATE)
    args = ["--data-root", root, *TINY, "--n-fft", 512, "--eval", "quick"]
    train(*args, "--condition", "both", "--out", tmp_path / "labelled", main=audio.main)
    config = json.loads((tmp_path / "labelled" / "config.json").read_text())
    assert config["options"]["families"] == ["flute", "oboe"] and config["data"]["source"] == "own sounds, folder mine"
    assert set(audio.load(tmp_path / "labelled").prior.labels[1].tolist()) == {-1, 0, 1}
    for path in list(root.rglob("*.wav")):
        path.rename(root / path.name.replace("_", "x"))  # no label, and a single folder
    result = run(*args, "--condition", "both")
    assert result.exit_code == 2 and "60 files carry no pitch, such as" in " ".join(result.output.split())
    captions, real = [], audio.captions_of
    monkeypatch.setattr(audio, "captions_of", lambda *a: captions.extend(real(*a)) or real(*a))
    train(*args, "--transpose", 1, "--out", tmp_path / "unlabelled", main=audio.main)
    assert set(captions) == {"mine"}
    assert torch.isfinite(audio.load(tmp_path / "unlabelled").prior.factor).all()


def test_wrong_options_and_folders_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "NOTES_EACH", 1)
    root = write_nsynth(tmp_path / "nsynth", TWO)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "nsynth-train").mkdir(parents=True)
    (tmp_path / "damaged" / "nsynth-train" / "examples.json").write_text('{"a": {"pitch"')
    cases = [
        (["--data-root", tmp_path / "nowhere"], "no such folder"),
        (["--data-root", tmp_path / "empty"], "0 files .wav, .flac"),
        (["--data-root", tmp_path / "damaged"], "examples.json"),
        (["--data-root", root, "--families", "organ"], "no note of organ"),
        (["--families", "organ"], "vocal, each once; others need --data-root"),
        (
            ["--data-root", root, "--families", "flute,tuba"],
            "expected some of bass, brass, flute",
        ),
        (["--families", "bass,tuba"], "vocal, each once; others need --data-root"),
        (["--families", "bass,bass"], "vocal, each once; others need --data-root"),
        (["--download"], "--data-root"),
        (["--representation", "mel", "--n-mels", 400], "too many for n_fft 1024"),
        (["--n-fft", 1536], "not one of '512', '1024', '2048'"),
        (["--channels", 20], "must be a multiple of 8"),
        (["--condition", "pitch"], "not one of 'none', 'both'"),
        (["--gain-db", "nan"], "expected a finite number"),
        (["--resume", tmp_path], "config.json"),
    ]
    for args, message in cases:
        result = run(*args, *([] if "--channels" in args or "--resume" in args else TINY))
        assert result.exit_code == 2, (args, result.output, result.exception)
        assert message in " ".join(result.output.split()), (args, result.output)


# ---------------------------------------------------------------- Graphs


@pytest.mark.parametrize("representation", ["stft", "mel"])
@torch.no_grad()
def test_graphs_agree_with_the_trained_model_on_silence_noise_and_full_scale(representation):
    level, pitch, family = some_levels(4)
    model = tiny_model("both", representation=representation).eval()
    model.start_at(level[:, : model.front.bins], model.label(pitch, family))
    graphs = audio.graphs(model)
    assert list(graphs) == ["encoder", "prior", "decoder", "vocoder"]
    trained, (graph, inputs) = audio.graphs(model)["encoder"][0], graphs["encoder"]
    export.in_real_arithmetic(graph)
    chord = inputs["waveform"]
    noise = 0.3 * torch.randn(2, SAMPLES, generator=random_generator("noise"))
    for waveform in (chord, noise, noise.sign(), torch.zeros_like(noise)):
        found, expected = (f(waveform, pitch[:2], family[:2]) for f in (graph, trained))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert not any("decoder" in name for name, _ in graph.named_parameters())
    graph, inputs = graphs["vocoder"]
    magnitude = model.front.to_stft_magnitude(inputs["spectrogram"])
    trained = graph(**inputs)
    export.in_real_arithmetic(graph)
    heard = [audio.stft_magnitude(waveform) for waveform in (graph(**inputs), trained)]
    scores = [spectral_convergence(h, magnitude[:, :, : h.shape[2]]) for h in heard]
    assert (scores[0] < scores[1] + 3).all()


def session_of(notes_run, graph):
    return onnxruntime.InferenceSession(notes_run / "export" / f"{graph}.onnx", providers=["CPUExecutionProvider"])


@torch.no_grad()
def test_a_runs_checkpoint_and_export_hold_the_fitted_prior(notes_run):
    model = audio.load(notes_run)
    assert (model.prior.factor - torch.eye(3)).abs().max() > 1e-3 and model.prior.scores.std(0).max() > 0.01
    noise, pitch, family = torch.randn(5, 4), torch.full((5,), 40), torch.tensor([0, 1, 0, 1, 1])
    inputs = {"noise": noise.numpy(), "pitch": pitch.numpy(), "family": family.numpy()}
    (z,) = session_of(notes_run, "prior").run(None, inputs)
    np.testing.assert_allclose(z, model.prior(noise, pitch, family), atol=1e-5)


def test_a_label_outside_the_models_is_refused_by_the_exported_decoder(notes_run):
    session, z = session_of(notes_run, "decoder"), np.zeros((2, 3), np.float32)
    (one,) = session.run(None, {"z": z, "pitch": np.array([40, 70]), "family": np.array([0, 1])})
    assert one.shape == (2, 513, 251) and (one >= 0).all() and not np.allclose(one[0], one[1])
    for pitch, family in (([40, 300], [0, 1]), ([-1, 40], [0, 1]), ([40, 70], [0, 2]), ([40, 70], [0, -1])):
        with pytest.raises(Exception, match=r"invalid index|out of (data )?bounds"):
            session.run(None, {"z": z, "pitch": np.array(pitch), "family": np.array(family)})


@torch.no_grad()
def test_the_exported_vocoder_sounds_other_lengths_and_batches(notes_run):
    session, model = session_of(notes_run, "vocoder"), audio.load(notes_run)
    graph, inputs = audio.graphs(model)["vocoder"]
    for batch, frames in ((1, 60), (4, 113)):
        magnitude = 0.5 * inputs["spectrogram"][:, :, :frames].repeat(2, 1, 1)[:batch]
        (waveform,) = session.run(None, {"spectrogram": magnitude.numpy()})
        assert waveform.shape == (batch, 256 * (magnitude.shape[2] - 1))
        heard = [audio.stft_magnitude(w) for w in (torch.from_numpy(waveform), graph(magnitude))]
        scores = [spectral_convergence(h, magnitude) for h in heard]
        assert (scores[0] < scores[1] + 3).all()

"""Stage 2: reading notes, the cache, the start at principal components, labels, interpolation, bad input."""

import base64
import hashlib
import http.server
import json
import math
import tarfile
import threading

import click
import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import train, write_nsynth

import export
import train_vae_audio as audio
from common import RATE, random_generator, write_json
from train_vae_audio import FAMILIES, Notes, NoteVAE, Spectrogram, UnusableError

TINY = ["--channels", "16", "--D", "3", "--batch", "4", "--steps", "1", "--device", "cpu"]
TWO = [("flute", 60), ("guitar", 48), ("flute", 64), ("guitar", 52)]


def run(*args):
    return CliRunner().invoke(audio.main, [str(a) for a in args])


def notes_of(root, cache, families=("flute", "guitar"), semitones=0, representation="stft"):
    return Notes(root, list(families), semitones, Spectrogram(representation, 1024, 64), cache)


def sine(midi, samples=audio.SAMPLES, partials=1):
    t = torch.arange(samples) / RATE
    f = 440 * 2 ** ((midi - 69) / 12)
    return sum(torch.sin(2 * math.pi * f * h * t) / h for h in range(1, partials + 1) if h * f < RATE / 2)


# ---------------------------------------------------------------- Reading


def write(path, samples, rate=RATE, **kwargs):
    soundfile.write(path, samples, rate, **kwargs)
    return path


def test_a_note_in_nsynths_form_is_read_as_it_is(tmp_path):
    wave = 0.5 * sine(60).numpy()
    for form in ("wav", "flac"):
        waveform, changes = audio.read_note(write(tmp_path / f"a.{form}", wave))
        assert changes == []
        torch.testing.assert_close(waveform, torch.from_numpy(wave), atol=1e-4, rtol=0)


def test_other_files_are_changed_and_the_change_is_named(tmp_path):
    stereo = np.stack([np.full(64000, 0.2), np.full(64000, 0.4)], axis=1)
    waveform, changes = audio.read_note(write(tmp_path / "stereo.wav", stereo))
    assert changes == ["mixed down to one channel"]
    torch.testing.assert_close(waveform, torch.full((64000,), 0.3), atol=1e-4, rtol=0)
    waveform, changes = audio.read_note(write(tmp_path / "cd.wav", 0.5 * sine(69, 4 * 44100).numpy(), 44100))
    assert changes == ["resampled from 44100 Hz"]
    expected = 69 + 12 * math.log2(44100 / RATE)  # `sine` counts its samples at RATE
    assert audio.detect_pitch(waveform[None]).item() == pytest.approx(expected, abs=0.05)
    assert audio.read_note(write(tmp_path / "short.wav", np.ones(100) * 0.1))[1] == ["padded to 4 s"]
    waveform, changes = audio.read_note(write(tmp_path / "long.wav", np.ones(70000) * 0.1))
    assert changes == ["cut to 4 s"] and waveform.shape == (64000,)


def test_files_that_cannot_be_learnt_from_are_refused_by_kind(tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound")
    whole = write(tmp_path / "whole.flac", 0.5 * sine(60).numpy()).read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "silent.wav", np.zeros(64000))
    write(tmp_path / "empty.wav", np.zeros(0))
    write(tmp_path / "nan.wav", np.full(64000, np.nan), subtype="FLOAT")
    faults = {
        "missing.wav": "not there", "text.wav": "no audio", "cut.flac": "damaged", "silent.wav": "silent",
        "empty.wav": "silent", "nan.wav": "no numbers",
    }  # fmt: skip
    for name, fault in faults.items():
        with pytest.raises(UnusableError, match=fault):
            audio.read_note(tmp_path / name)


def test_transposing_moves_the_pitch_by_semitones():
    for semitones in (-3, -1, 1, 2, 12):
        moved = audio.transpose(sine(60, partials=4), semitones)
        assert moved.shape == (audio.SAMPLES,)
        assert audio.detect_pitch(moved[None]).item() == pytest.approx(60 + semitones, abs=0.05)


@pytest.mark.parametrize("midi", [28, 33, 45, 60, 74, 89, 105])
def test_the_pitch_estimator_knows_pitches_with_and_without_a_strong_fundamental(midi):
    waveforms = [sine(midi), sine(midi, partials=8)]
    if midi < 80:  # above, two partials are left, and the second alone is another note
        waveforms.append(sine(midi, partials=8) - 0.9 * sine(midi))
    found = audio.detect_pitch(torch.stack(waveforms))
    torch.testing.assert_close(found, torch.full_like(found, midi), atol=0.15, rtol=0)


def test_built_in_notes_have_the_pitch_they_are_named_by_and_instruments_are_held_out():
    notes = {split: audio.built_in_notes(split, list(audio.TIMBRES)) for split in audio.SPLITS}
    instruments = [{note.instrument for note in split} for split in notes.values()]
    assert not instruments[0] & instruments[1] and not instruments[1] & instruments[2]
    for note in notes["train"][::5]:
        waveform = audio.synthesise(note)
        assert waveform.shape == (audio.SAMPLES,) and waveform.abs().max() < 1.1
        assert torch.equal(waveform, audio.synthesise(note))
        assert audio.detect_pitch(waveform[None]).item() == pytest.approx(note.pitch, abs=0.5), note.name


# ---------------------------------------------------------------- The cache


def test_the_cache_is_reused_and_made_anew_when_something_changes(tmp_path, monkeypatch):
    root, cache = write_nsynth(tmp_path / "n", TWO), tmp_path / "cache"
    first = notes_of(root, cache)
    assert first.train.levels.shape == (4, 513, 251)
    expected = Spectrogram("stft", 1024, 0)(first.train.waveforms([2]))[0]
    np.testing.assert_allclose(first.train.levels[2], expected, atol=4e-3)
    made = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    monkeypatch.setattr(audio, "write_cache", lambda *_: pytest.fail("the cache is there"))
    notes_of(root, cache)
    assert made == {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    monkeypatch.undo()
    notes_of(root, cache, representation="mel")
    notes_of(root, cache, families=["flute"])
    assert len(list(cache.glob("train-*.f16"))) == 3
    write(root / "nsynth-train" / "audio" / "flute_acoustic_000-060-100.wav", 0.5 * sine(60, 32000).numpy())
    notes_of(root, cache)
    assert len(list(cache.glob("train-*.f16"))) == 4
    write(root / "nsynth-train" / "audio" / "flute_acoustic_000-060-100.wav", 0.5 * sine(64, 32000).numpy())
    notes_of(root, cache)
    assert len(list(cache.glob("train-*.f16"))) == 5, "another note of the same length"
    assert not list(cache.glob("*.partial"))


def test_half_a_cache_is_not_believed(tmp_path):
    root, cache = write_nsynth(tmp_path / "n", TWO), tmp_path / "cache"
    notes = notes_of(root, cache)
    whole = np.array(notes.train.levels)
    data = next(cache.glob("train-*.f16"))
    data.write_bytes(data.read_bytes()[:-100])
    np.testing.assert_array_equal(notes_of(root, cache).train.levels, whole)
    data.with_suffix(".json").unlink()
    np.testing.assert_array_equal(notes_of(root, cache).train.levels, whole)


def test_a_full_disk_ends_in_one_line_and_leaves_no_cache(tmp_path, monkeypatch):
    class FullDisk:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(28, "No space left on device")

    root, cache = write_nsynth(tmp_path / "n", TWO), tmp_path / "cache"
    real = audio.Path.open
    monkeypatch.setattr(
        audio.Path, "open", lambda self, *a, **k: FullDisk() if self.suffix == ".partial" else real(self, *a, **k)
    )
    result = run("--data-root", root, "--families", "flute,guitar", "--cache", cache, *TINY, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert not list(cache.iterdir())


def test_notes_that_are_missing_or_unusable_are_counted_and_left_out(tmp_path, capsys):
    root = write_nsynth(tmp_path / "n", TWO)
    folder = root / "nsynth-train" / "audio"
    (folder / "flute_acoustic_000-060-100.wav").unlink()
    (folder / "flute_acoustic_002-064-100.wav").write_text("no sound")
    notes = notes_of(root, tmp_path / "cache")
    assert [note.pitch for note in notes.train.notes] == [48, 52]
    assert notes.train.family.tolist() == [1, 1]
    said = capsys.readouterr().out
    assert "train: 1 of 4 notes that examples.json lists are not there" in said
    assert "train: 1 of 3 notes left out: no audio, or damaged, flute_acoustic_002-064-100 for one" in said
    for path in folder.iterdir():
        path.write_text("no sound")
    with pytest.raises(click.ClickException, match="none of 3 notes can be used"):
        notes_of(root, tmp_path / "cache")
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(click.UsageError, match=r"none of the 4 notes of flute, guitar it lists is in audio/"):
        notes_of(root, tmp_path / "cache")


def test_transposed_notes_join_the_training_notes_with_their_own_pitch(tmp_path):
    notes = notes_of(write_nsynth(tmp_path / "n", TWO), tmp_path / "cache", semitones=1)
    assert notes.train.pitch.tolist()[:3] == [59, 60, 61] and len(notes.test.notes) == 4
    assert audio.untransposed(notes.train, 100).tolist() == [1, 4, 7, 10]
    found = audio.detect_pitch(notes.train.waveforms([0, 1, 2]))
    torch.testing.assert_close(found, torch.tensor([59.0, 60, 61]), atol=0.05, rtol=0)


# ---------------------------------------------------------------- Model


def tiny_model(condition="none", d=3, representation="stft"):
    torch.manual_seed(0)
    families = ["bass", "flute"]
    return NoteVAE(
        representation=representation, n_fft=1024, n_mels=64, d=d, channels=16, condition=condition, families=families
    )


def some_levels(n=12):
    notes = audio.built_in_notes("train", ["bass", "flute"])[:n]
    waveforms = torch.stack([audio.synthesise(note) for note in notes])
    pitch = torch.tensor([note.pitch for note in notes])
    return Spectrogram("stft", 1024, 0)(waveforms), pitch, torch.tensor([int(n.family == "flute") for n in notes])


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
    decoded = model.spectrogram.unscale(model.decode(mu, None))
    explained = 1 - (decoded - level).square().mean() / (level - level.mean(0)).square().mean()
    assert explained > 0.7
    conditional = tiny_model("both", d=8)
    conditional.start_at(level, conditional.label(pitch, family))
    given, _ = conditional.encode(level, conditional.label(pitch, family))
    apart = [(v[family == 0].mean(0) - v[family == 1].mean(0)).norm() for v in (mu, given)]
    assert apart[1] < 0.8 * apart[0], "the label explains the family; the latents need not"


def test_every_parameter_gets_a_gradient_and_the_label_changes_what_is_decoded():
    level, pitch, family = some_levels()
    for condition in ("none", "pitch", "family", "both"):
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
        if label is None:
            continue
        z = torch.randn(1, 3).expand(2, 3)
        one, two = model.decode(z, model.label(pitch[[0, -1]], family[[0, -1]])).detach()
        assert (one - two).abs().max() > 0.1


@torch.no_grad()
def test_the_objective_is_the_negative_elbo_at_beta_1():
    level, _, _ = some_levels(4)
    model = tiny_model()
    model.start_at(level, None)
    noise = torch.randn(4, 3, generator=random_generator("noise"))
    loss, _ = audio.objective(model, level, None, noise, 1.0)
    mu, logvar = model.encode(level, None)
    decoded = model.decode(mu + (0.5 * logvar).exp() * noise, None)
    x = model.spectrogram.scale(level)
    sigma = (decoded - x).square().mean().sqrt()
    log_likelihood = torch.distributions.Normal(decoded, sigma).log_prob(x).sum((1, 2)).mean()
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum(1).mean()
    assert loss.item() * level[0].numel() == pytest.approx((kl - log_likelihood).item(), rel=1e-4)


@torch.no_grad()
def test_the_fitted_prior_draws_what_the_posteriors_add_up_to():
    generator = random_generator("posteriors")
    n, factor = 20_000, torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    pitch, family = (torch.randint(low, high, (n,), generator=generator) for low, high in ((48, 73), (0, 2)))
    x = (pitch - 60) / 12
    curve = torch.stack([2 * x + 1, x.square()], dim=1) * (1 - 2 * family[:, None])  # of family 1 the opposite
    mu = curve + torch.randn(n, 2, generator=generator) @ factor.T
    logvar = torch.full((n, 2), 0.3).log()
    prior = audio.FittedPrior(2, "both", 3)
    noise = torch.randn(n, 2, generator=generator)
    torch.testing.assert_close(prior(noise, pitch, family), noise)

    prior.fit(mu, logvar, pitch, family)
    torch.testing.assert_close(prior(torch.zeros(n, 2), pitch, family), curve, atol=0.1, rtol=0)
    drawn = prior(noise, pitch, family)
    torch.testing.assert_close(torch.cov((drawn - curve).T), factor @ factor.T + 0.3 * torch.eye(2), atol=0.05, rtol=0)
    torch.testing.assert_close(prior(noise[:9], pitch[:9], torch.full((9,), 2)), noise[:9])  # no notes of it
    ends = prior(torch.zeros(2, 2), torch.tensor([72, 100]), torch.tensor([0, 0]))
    torch.testing.assert_close(ends[0], ends[1])


@torch.no_grad()
def test_a_prior_fitted_to_one_note_or_without_a_label_is_a_distribution():
    for condition in ("none", "pitch", "family", "both"):
        prior = audio.FittedPrior(4, condition, 2)
        label = torch.tensor([60]), torch.tensor([1])
        prior.fit(torch.full((1, 4), 3.0), torch.full((1, 4), -9.0), *label)
        z = prior(torch.randn(50, 4, generator=random_generator("one")), *(v.expand(50) for v in label))
        assert torch.isfinite(z).all() and (z.std(0) > 0.3).all()
        assert (z.mean(0) > 0.5).all(), "drawn towards the note"


def test_making_a_note_louder_scales_its_magnitudes():
    level, _, _ = some_levels(2)
    gain = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(
        audio.log_expand(audio.louder(level, gain)), audio.log_expand(level) * gain[:, None, None], rtol=1e-4, atol=1e-5
    )


def test_interpolations_end_at_their_ends_and_slerp_keeps_the_norm_law():
    a, b = torch.randn(2, 64, generator=random_generator("ends"))
    b = 2 * b
    share = torch.linspace(0, 1, 9)
    for way in (audio.lerp, audio.slerp):
        torch.testing.assert_close(way(a, b, share)[[0, -1]], torch.stack([a, b]), atol=1e-5, rtol=1e-4)
    lengths = audio.slerp(a, b, share).norm(dim=1)
    torch.testing.assert_close(lengths, (1 - share) * a.norm() + share * b.norm(), rtol=1e-4, atol=1e-4)
    assert audio.lerp(a, b, share).norm(dim=1)[4] < 0.9 * lengths[4]
    angles = torch.nn.functional.normalize(audio.slerp(a, b, share), dim=1)
    steps = (angles[1:] * angles[:-1]).sum(1)
    torch.testing.assert_close(steps, steps[:1].expand(8), atol=1e-4, rtol=0)
    assert torch.isfinite(audio.slerp(a, a, share)).all() and torch.isfinite(audio.slerp(a, -a, share)).all()


def test_the_classifier_learns_families_apart(monkeypatch):
    monkeypatch.setattr(audio.FamilyClassifier, "STEPS", 60)
    monkeypatch.setattr(audio, "NOTES_EACH", 12)
    notes = [n for split in ("train", "test") for n in audio.built_in_notes(split, ["bass", "flute"])]
    classifier = audio.FamilyClassifier(2)
    features = classifier.features(audio.stft(torch.stack([audio.synthesise(n) for n in notes])))
    family = torch.tensor([int(n.family == "flute") for n in notes])
    train_part = torch.tensor([i for i, n in enumerate(notes) if int(n.instrument[-3:]) < 2])
    held_out = torch.tensor([i for i, n in enumerate(notes) if int(n.instrument[-3:]) >= 2])
    torch.manual_seed(0)
    classifier.fit(features[train_part], family[train_part])
    assert (classifier(features[held_out]) == family[held_out]).float().mean() > 0.9


# ---------------------------------------------------------------- Runs


def test_a_run_leaves_numbers_pictures_and_sounds(notes_run):
    metrics = json.loads((notes_run / "metrics.json").read_text())
    for name in (
        "lsd", "lsd_pca", "lsd_sound", "lsd_sound_ceiling", "convergence_sound_ceiling", "lsd_below_pca",
        "pitch_within_50_cents", "pitch_within_50_cents_real", "family_agreement", "family_agreement_real",
    ):  # fmt: skip
        assert math.isfinite(metrics[name]), name
    assert metrics["lsd_sound_ceiling"] < metrics["lsd_sound"]
    assert metrics["pitch_within_50_cents_real"] > 0.9
    assert metrics["data"] == audio.BUILT_IN
    pictures = {path.stem for path in (notes_run / "figures").glob("*.png")}
    assert pictures == {"reconstructions", "samples", "interpolations", "latents"}  # no octave of pitches: no scale
    for name in ("reconstructions", "samples", "sample-00", "interpolation-linear", "interpolation-spherical-3"):
        waveform, rate = soundfile.read(notes_run / "sounds" / f"{name}.wav")
        assert rate == RATE and len(waveform) >= RATE and np.isfinite(waveform).all()


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "explore", lambda *_: None)
    monkeypatch.setattr(audio, "evaluate", lambda *_: {})
    args = ["--families", "bass", "--cache", tmp_path / "cache", "--channels", 16, "--D", 3, "--batch", 4, "--steps", 5]
    args += ["--device", "cpu", "--condition", "pitch"]
    train(*args, "--out", tmp_path / "whole", main=audio.main)
    real, done = audio.update, []

    def update(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(None)
        return real(*arguments)

    monkeypatch.setattr(audio, "update", update)
    CliRunner().invoke(audio.main, [str(a) for a in [*args, "--out", tmp_path / "parts"]])
    monkeypatch.setattr(audio, "update", real)
    result = train("--resume", tmp_path / "parts", main=audio.main)
    assert "done" in result.output
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_on_files_with_transposed_notes_and_mel_bands(tmp_path):
    root = write_nsynth(tmp_path / "nsynth", [("flute", p) for p in range(60, 76)], form="flac")
    out = tmp_path / "run"
    args = ["--data-root", root, "--families", "flute", "--transpose", 1, "--representation", "mel", "--n-mels", 64]
    train(*args, "--condition", "pitch", *TINY, "--cache", tmp_path / "c", "--out", out, main=audio.main)
    assert (out / "figures" / "scale.png").is_file() and (out / "sounds" / "scale-flute.wav").is_file()
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["source"] == "notes in NSynth's layout, folder nsynth"
    assert config["data"]["notes"] == {"train": 48, "valid": 16, "test": 16}


# ---------------------------------------------------------------- Bad input


def test_wrong_options_and_folders_end_in_one_line(tmp_path):
    root = write_nsynth(tmp_path / "nsynth", TWO)
    (tmp_path / "damaged" / "nsynth-train").mkdir(parents=True)
    (tmp_path / "damaged" / "nsynth-train" / "examples.json").write_text('{"a": {"pitch"')
    cases = [
        (["--data-root", tmp_path / "nowhere"], "no such folder"),
        (["--data-root", tmp_path], "no examples.json"),
        (["--data-root", tmp_path / "damaged"], "is damaged, or not NSynth's"),
        (["--data-root", root, "--families", "organ"], "none of the 0 notes of organ"),
        (["--families", "organ"], "the built-in synthesiser has bass"),
        (["--families", "bass,tuba"], "expected different ones of bass"),
        (["--families", "bass,bass"], "expected different ones of bass"),
        (["--download"], "it needs --data-root"),
        (["--representation", "mel", "--n-mels", 400], "too many for n_fft 1024"),
        (["--n-fft", 1001], "no multiple of 8"),
        (["--channels", 20], "multiple of 8"),
        (["--gain-db", "nan"], "no finite number"),
        (["--resume", tmp_path], "is no run folder"),
    ]
    for args, message in cases:
        result = run(*args, *([] if "--channels" in args or "--resume" in args else TINY), "--cache", tmp_path / "c")
        assert result.exit_code == 2, (args, result.output, result.exception)
        assert message in " ".join(result.output.split()), (args, result.output)
    assert FAMILIES.index("vocal") == 10


@torch.no_grad()
def test_a_runs_checkpoint_and_export_hold_the_fitted_prior(notes_run):
    import onnxruntime

    model, _, _ = export.load_model(notes_run)
    assert (model.prior.factor - torch.eye(3)).abs().amax((1, 2)).min() > 1e-3
    session = onnxruntime.InferenceSession(notes_run / "export" / "prior.onnx")
    noise, pitch, family = torch.randn(5, 3), torch.full((5,), 40), torch.tensor([0, 1, 0, 1, 1])
    (z,) = session.run(None, {"noise": noise.numpy(), "pitch": pitch.numpy(), "family": family.numpy()})
    np.testing.assert_allclose(z, model.prior(noise, pitch, family), atol=1e-5)


def test_a_label_outside_the_models_is_refused_by_the_exported_decoder(notes_run):
    import onnxruntime

    session = onnxruntime.InferenceSession(notes_run / "export" / "decoder.onnx")
    z = np.zeros((2, 3), np.float32)
    (one,) = session.run(None, {"z": z, "pitch": np.array([40, 70]), "family": np.array([0, 1])})
    assert one.shape == (2, 513, 251) and (one >= 0).all() and not np.allclose(one[0], one[1])
    for pitch, family in (([40, 300], [0, 1]), ([-1, 40], [0, 1]), ([40, 70], [0, 2]), ([40, 70], [0, -1])):
        with pytest.raises(Exception, match=r"invalid index|out of (data )?bounds"):
            session.run(None, {"z": z, "pitch": np.array(pitch), "family": np.array(family)})


def test_the_exported_vocoder_sounds_other_lengths_and_batches(notes_run):
    import onnxruntime

    model, _, _ = export.load_model(notes_run)
    session = onnxruntime.InferenceSession(notes_run / "export" / "vocoder.onnx")
    for batch, frames in ((1, 251), (4, 30)):
        inputs = export.example_notes(model, batch, frames, random_generator("lengths", frames))["vocoder"]
        (waveform,) = session.run(None, {"spectrogram": inputs["spectrogram"].numpy()})
        assert waveform.shape == (batch, 256 * (frames - 1))
        graph = export.VocoderGraph(model.spectrogram)
        with torch.no_grad():
            expected = (graph(inputs["spectrogram"]),)
        assert export.convergence_difference(graph, inputs, expected, (waveform,)) < 0.1


# ---------------------------------------------------------------- Download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges and Google's checksum header, and cuts the first answer short."""

    content, cut, served = b"", True, []

    def do_GET(self):
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        part = self.content[begin:]
        self.served.append(begin)
        if begin >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(part)))
        digest = base64.b64encode(hashlib.md5(self.content).digest()).decode()
        self.send_header("x-goog-hash", "crc32c=AAAAAA==")
        self.send_header("x-goog-hash", f"md5={digest}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if type(self).cut else part)
        type(self).cut = False

    def log_message(self, *_):
        pass


def test_a_download_goes_on_where_it_stopped_and_is_checked(tmp_path, monkeypatch):
    packed = write_nsynth(tmp_path / "official", [("flute", 60)])
    archive = tmp_path / "nsynth-train.jsonwav.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(packed / "nsynth-train", "nsynth-train")
    Server.content, Server.cut, Server.served = archive.read_bytes(), True, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/nsynth-{{split}}.jsonwav.tar.gz"
    monkeypatch.setattr(audio, "ARCHIVES", url)
    monkeypatch.setattr(audio, "SPLITS", ("train",))
    root = tmp_path / "fetched"
    with pytest.raises(click.ClickException, match="goes on from"):
        audio.download_nsynth(root)
    audio.download_nsynth(root)
    assert Server.served[0] == 0 and 0 < Server.served[1] < len(Server.content)
    assert (root / "nsynth-train" / "examples.json").is_file()
    assert sorted(path.name for path in root.iterdir()) == ["nsynth-train"]
    Server.content = b"y" * 100
    with pytest.raises(click.ClickException, match="MD5"):
        (root / "f.partial").write_bytes(b"something else")
        audio.fetch(url.format(split="f"), root / "f")
    assert not (root / "f").exists()
    (root / "g.partial").write_bytes(b"z" * 200)
    with pytest.raises(click.ClickException, match="was not the beginning"):
        audio.fetch(url.format(split="g"), root / "g")
    assert not (root / "g").exists() and not (root / "g.partial").exists()
    server.shutdown()


def test_write_json_is_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", [float("nan")])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]

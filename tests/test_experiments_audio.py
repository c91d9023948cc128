"""The judges of sampled notes against tones, librosa and held-out instruments; tiny runs of the audio experiments."""

import math

import librosa
import pytest
import torch
from click.testing import CliRunner
from conftest import write_nsynth
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

import common
import train_vae_audio as audio
from common import RATE, SPLITS, built_in_notes, load_notes, random_generator, synthesise
from tests.experiments import adversarial, conditional, griffin_lim, judges, latents, rough, waveforms
from tests.experiments.judges import FamilyClassifier, detect_pitch
from train_vae_audio import ExemplarPrior


def tone(midi, partials=1, samples=RATE):
    t = torch.arange(samples) / RATE
    f = 440 * 2 ** ((midi - 69) / 12)
    return sum(torch.sin(2 * math.pi * f * h * t) / h for h in range(1, partials + 1) if h * f < RATE / 2)


@pytest.mark.parametrize("midi", [28, 45, 60, 74, 105])
def test_the_pitch_estimator_knows_pitches_with_and_without_a_strong_fundamental(midi):
    waveforms = [tone(midi), tone(midi, partials=8)]
    if midi < 80:  # above, two partials are left, and the second alone is another note
        waveforms.append(tone(midi, partials=8) - 0.9 * tone(midi))
    found = detect_pitch(torch.stack(waveforms))
    torch.testing.assert_close(found, torch.full_like(found, midi), atol=0.15, rtol=0)


def test_the_pitch_estimator_agrees_with_librosas_yin():
    for midi in (33.0, 57.3, 81.6):
        waveform = tone(midi, partials=6)
        hertz = librosa.yin(waveform.numpy(), fmin=27, fmax=4500, sr=RATE, frame_length=8192)
        theirs = librosa.hz_to_midi(sorted(hertz)[len(hertz) // 2])
        assert detect_pitch(waveform[None]).item() == pytest.approx(theirs, abs=0.15)


def test_the_classifier_learns_families_apart_and_silence_comes_in_at_the_ends(monkeypatch):
    monkeypatch.setattr(FamilyClassifier, "STEPS", 40)
    monkeypatch.setattr(common, "NOTES_EACH", 8)
    notes = [n for split in ("train", "test") for n in built_in_notes(split, ["bass", "flute"])]
    waveform, family = torch.stack([synthesise(n) for n in notes]), torch.tensor([n.family == "flute" for n in notes])
    held_out = torch.tensor([int(n.instrument[-3:]) >= 2 for n in notes])
    seen, real = [], judges.log_expand
    monkeypatch.setattr(judges, "log_expand", lambda level: seen.append(level) or real(level))
    torch.manual_seed(0)
    classifier = FamilyClassifier(2)
    classifier.fit(classifier.features(waveform[~held_out]), family[~held_out].long())
    assert (classifier(waveform[held_out]) == family[held_out]).float().mean() > 0.8
    ends = [bool(x[:, :, :2].any()) for x in seen], [bool(x[:, :, -2:].any()) for x in seen]
    assert all(low or high for low, high in zip(*ends, strict=True)) and not all(ends[0]), "bands do not wrap"


def test_the_conditional_experiment_judges_a_run_its_start_and_real_notes(notes_run, monkeypatch):
    monkeypatch.setattr(FamilyClassifier, "STEPS", 5)
    result = CliRunner().invoke(conditional.main, [str(notes_run), "--samples", "6"])
    assert result.exit_code == 0, (result.output, result.exception)
    head, _, single, pitch, family, nats = result.output.strip().splitlines()[-6:]
    columns = "fitted prior | one Gaussian | N(0, I) | reconstructions | step 0, fitted prior | step 0, N(0, I)"
    assert head == f"| | {columns} | real notes |"
    assert pitch.startswith("| pitch within 50 cents | ") and pitch.endswith(" 100.0% |")
    assert single.startswith("| one pitch | ") and family.count("%") == 7
    cells = [cell.strip() for cell in nats.split("|")[1:-1]]
    assert cells[0] == "log p, nats" and [bool(cell) for cell in cells[1:]] == [True] * 3 + [False, True, True, False]
    assert float(cells[5]) > float(cells[6]), "step 0 is fitted to latents; N(0, I) is not"
    result = CliRunner().invoke(conditional.main, [str(notes_run.parent), "--samples", "6"])
    assert result.exit_code == 2 and "config.json" in result.output


@torch.no_grad()
@pytest.mark.parametrize("conditional_model", [True, False])
def test_the_density_of_a_prior_of_notes_is_that_of_a_mixture_of_gaussians(conditional_model):
    prior, generator = ExemplarPrior((3,), conditional_model), random_generator("density")
    mu, pitch = torch.randn(40, 3, generator=generator), torch.randint(40, 80, (40,), generator=generator)
    family = torch.arange(40) % 2
    prior.fit(mu, torch.full((40, 3), -2.0), pitch, family)
    z, asked = torch.randn(5, 3, generator=generator), (pitch[:5], family[:5])
    notes = MultivariateNormal(prior.scores, scale_tril=prior.factor)
    picked = Categorical(logits=prior.log_weights(*(number * conditional_model for number in asked)))
    expected = MixtureSameFamily(picked, notes.expand((5, audio.EXEMPLARS))).log_prob(z)
    torch.testing.assert_close(conditional.log_prob(prior, z, *asked), expected, atol=1e-3, rtol=1e-4)
    prior.typical += 0.7
    normal = conditional.log_prob(conditional.standard(prior), z, *asked)
    torch.testing.assert_close(normal, Normal(-0.7, 1.0).log_prob(z).sum(1))


def test_distances_of_sounds_are_none_of_the_same_and_si_sdr_finds_a_shift():
    sound = torch.stack([tone(60, 6), tone(41, 9)])
    late = sound.roll(300, 1)
    assert waveforms.multi_resolution(sound, sound).max() < 1e-3 < waveforms.multi_resolution(late * 0.5, sound).min()
    noise = torch.randn(sound.shape, generator=random_generator("noise"))
    noise *= 0.1 * sound.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    expected = scale_invariant_signal_distortion_ratio(0.3 * sound + noise, sound)
    torch.testing.assert_close(waveforms.si_sdr(0.3 * sound + noise, sound), expected, atol=0.3, rtol=0)
    padded = torch.nn.functional.pad(sound, (0, 400))
    torch.testing.assert_close(waveforms.si_sdr(padded.roll(300, 1), padded) > 60, torch.tensor([True, True]))


def test_codes_are_judged_beside_lines(wave_run, notes_run, monkeypatch):
    monkeypatch.setattr(waveforms, "LEARNT", 4)
    monkeypatch.setattr(waveforms, "COMPONENTS", {"frame": (2,), "note": (4,)})
    result = CliRunner().invoke(waveforms.main, [str(wave_run), "--notes", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = result.output.strip().splitlines()[-8:]
    assert [row.split(" | ")[1] for row in rows] == ["95", "95", "125", "1", "32062", "125", "1", "12000"]
    result = CliRunner().invoke(latents.main, [str(wave_run)])
    assert result.exit_code == 0 and (wave_run / "figures" / "latents.png").is_file()


def test_a_second_phase_trains_the_decoder_alone_and_is_judged(wave_run, notes_run, monkeypatch):
    monkeypatch.setattr(adversarial, "UPDATES", 2)
    monkeypatch.setattr(adversarial, "TOLD", 2)
    monkeypatch.setattr(adversarial, "BATCH", 2)
    result = CliRunner().invoke(adversarial.main, [str(wave_run), "--notes", "2", "--minutes", "0.01"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [row.split(" | ") for row in result.output.splitlines() if row.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| the run", "| objective alone", "| adversarial"]
    assert len({tuple(row[2:5]) for row in rows}) == 3, "either phase changes what is played"
    model, split = audio.load(wave_run), load_notes({"data_root": None, "families": ["bass"], "download": False})[0]
    after, steps = adversarial.go_on(model, split["train"], 0.001, adversarial=True)
    before, now = model.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], now[name])}
    assert steps > 0 and changed == {"latent_layer", "decoder", "loudness", "shift"}
    result = CliRunner().invoke(adversarial.main, [str(notes_run)])
    assert result.exit_code == 2 and "no run of waveforms" in result.output


def test_a_net_that_tells_apart_tells_noise_from_notes(wave_run, monkeypatch):
    monkeypatch.setattr(adversarial, "UPDATES", 30)
    monkeypatch.setattr(adversarial, "TOLD", 16)
    monkeypatch.setattr(adversarial, "BATCH", 4)
    model = audio.load(wave_run)
    splits, _ = load_notes({"data_root": None, "families": ["bass"], "download": False})
    noise = random_generator("noise")
    monkeypatch.setattr(model, "reconstruct", lambda x, _: (torch.randn(x.shape, generator=noise) * 0.1, None, None))
    assert adversarial.told_apart(model, splits) > 0.9


def test_the_griffin_lim_study_prints_its_tables():
    result = CliRunner().invoke(griffin_lim.main, ["--notes", "1"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = result.output.splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == 4 + 9 + 9 + 6 + 14
    assert "| iterations | momentum | convergence | LSD |" in rows


@pytest.mark.parametrize("command", [conditional.main, griffin_lim.main])
def test_the_experiments_have_a_help(command):
    assert "--data-root" in CliRunner().invoke(command, ["--help"]).output


# ---------------------------------------------------------------- Roughened and made-up notes


def test_made_up_notes_have_the_pitch_asked_for_and_no_two_are_alike():
    pitch = torch.tensor([40, 52, 60, 60, 67, 76])
    notes = rough.make_up(pitch, random_generator("made"))
    assert notes.isfinite().all() and notes[:, -800:].abs().max() < 0.2 * notes.abs().max()
    found = detect_pitch(notes)
    assert (((found - pitch) + 6) % 12 - 6).abs().median() < 0.2  # in some the octave is louder
    assert torch.nn.functional.cosine_similarity(notes[2], notes[3], dim=0).abs() < 0.9


def test_roughened_notes_keep_their_pitch_and_differ_from_what_they_were():
    notes = torch.stack([tone(midi, partials=6, samples=4 * RATE) for midi in (48, 57, 64, 71)])
    changed, same, higher = (rough.roughen(notes, torch.full((4,), k), random_generator("rough")) for k in (0, 0, 3))
    assert torch.equal(changed, same) and changed.isfinite().all()
    assert (detect_pitch(changed) - detect_pitch(notes)).abs().median() < 0.2
    assert (detect_pitch(higher) - detect_pitch(notes) - 3).abs().median() < 0.2
    alike = torch.nn.functional.cosine_similarity(changed, notes).abs()
    assert alike.min() < 0.99 and alike.max() > 0.3


def test_a_roughened_folder_is_read_as_nsynths_and_has_clean_notes_to_train_on_alone(tmp_path):
    root = write_nsynth(tmp_path / "nsynth", [("bass", 40), ("flute", 74)])
    args = ["--data-root", str(root), "--out", str(tmp_path / "out"), "--variants", "2", "--made", "1"]
    for _ in range(2):  # again, over what is there
        printed = CliRunner().invoke(rough.main, args, catch_exceptions=False).output
    assert f"{tmp_path / 'out'}: 8 train, 2 valid, 2 test" in printed
    options = {"data_root": tmp_path / "out", "families": ["bass", "flute"], "download": False}
    notes = load_notes(options)[0]
    assert [len(notes[split].notes) for split in SPLITS] == [8, 2, 2]
    names = {note.name for note in notes["train"].notes}
    assert {"bass_acoustic_000-040-100", "bass_acoustic_000-040-100-1", "flute_acoustic_001-074-100-made0"} <= names
    assert all(note.pitch == 40 for note in notes["test"].notes if note.family == "bass")
    assert len({note.instrument for note in notes["train"].notes}) == 4  # two, and a made-up one for each note
    assert notes["train"].waveform(torch.arange(8)).isfinite().all()
    assert CliRunner().invoke(rough.main, ["--data-root", str(root), "--out", str(root)]).exit_code == 2

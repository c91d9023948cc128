"""Two notes at once: mixtures, masks, scores by hand, the run folder, and recomposition of sounds."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

import recompose
import train_mvae
from common import Spectrogram, log_bands, random_generator
from tests.test_mvae import build
from train_mvae import LOUDNESS, SAMPLES, SPLITS, NoteDuos, SoundLevels


@pytest.fixture(scope="module")
def duos(tmp_path_factory):
    options = {
        "data_root": None, "download": False, "families": ["bass", "flute", "vocal"], "seed": 0, "size": 64,
        "cache": tmp_path_factory.mktemp("cache"), "intervals": "musical", "max_gain_db": 6.0,
    }  # fmt: skip
    return NoteDuos(options, torch.device("cpu"))


def tones(*frequencies, amplitude=0.1):
    """Sines one after another along the first axis: (n, SAMPLES)."""
    t = torch.arange(SAMPLES) / 16000
    return amplitude * torch.stack([torch.sin(2 * math.pi * f * t) for f in frequencies])


# ---------------------------------------------------------------- Mixtures


def test_mixtures_keep_the_sum_of_their_stems_and_the_difference_asked_for(duos):
    pair, decibels = duos.draw("train", 50, random_generator("x"))
    stems, before = duos.stems("train", pair, decibels)
    loudness = train_mvae.root_mean_square(stems)[..., 0]
    torch.testing.assert_close(train_mvae.root_mean_square(stems.sum(1))[:, 0], torch.full((50,), LOUDNESS))
    difference = 20 * torch.log10(loudness[:, 0] / loudness[:, 1])
    torch.testing.assert_close(difference, decibels[:, 0] - decibels[:, 1], atol=1e-3, rtol=0)
    assert difference.abs().max() <= 6 and difference.abs().max() > 3
    note = duos.notes.train.batch(pair[3, 1:])[0][0, 0]  # as it was, but for its loudness
    torch.testing.assert_close(stems[3, 1] * (before[3, 1] / loudness[3, 1]), note, atol=1e-5, rtol=1e-4)


def test_notes_of_a_mixture_are_of_two_instruments_at_the_intervals_asked_for(duos):
    for split in SPLITS:
        pair, _ = duos.draw(split, 200, random_generator("y"))
        notes = getattr(duos.notes, split).notes
        assert all(notes[a].instrument != notes[b].instrument for a, b in pair.tolist())
        assert {abs(notes[a].pitch - notes[b].pitch) % 12 for a, b in pair.tolist()} <= {3, 4, 5, 7, 8, 9}


def test_few_held_out_mixtures_are_the_first_of_many(duos):
    few, many = duos.held_out("test", 2), duos.held_out("test", 6)
    assert all(torch.equal(a, b[:2]) for a, b in zip(few, many, strict=True))


def test_batches_hang_on_the_step_alone_and_processes_share_them(duos):
    whole = duos.batch(5, 0, 4, 4)
    assert whole.shape == (4, train_mvae.FRAMES, 64, 1)
    assert torch.equal(whole, duos.batch(5, 0, 4, 4)) and not torch.equal(whole, duos.batch(6, 0, 4, 4))
    torch.testing.assert_close(torch.cat([duos.batch(5, 0, 2, 4), duos.batch(5, 2, 4, 4)]), whole)


def test_notes_of_one_instrument_cannot_be_mixed(duos, tmp_path):
    lonely = object.__new__(NoteDuos)
    lonely.notes, lonely.max_gain_db, lonely.apart = duos.notes, 0.0, duos.apart
    lonely.instrument = {"train": torch.zeros_like(duos.instrument["train"])}
    with pytest.raises(train_mvae.click.UsageError, match="two notes of different instruments"):
        lonely.draw("train", 1, random_generator("z"))


# ---------------------------------------------------------------- Levels, masks, scores


def test_logarithmic_bands_average_and_stand_at_equal_steps_of_pitch():
    bank = log_bands(4096, 192)
    torch.testing.assert_close(bank.sum(1), torch.ones(192))
    heaviest = bank.argmax(1) * 16000 / 4096
    ratio = heaviest[150:].diff() / heaviest[150:-1]
    assert (ratio - (2 ** (math.log2(8000 / 32.7) / 192) - 1)).abs().max() < 0.01
    spectrogram = Spectrogram("log", 4096, 192)
    flat = spectrogram.stft_of(torch.full((1, 192, 2), 3.0))
    torch.testing.assert_close(flat[:, 20:-20], torch.full_like(flat[:, 20:-20], 3.0))  # interpolation keeps a constant


def test_levels_have_one_loudness_and_show_a_tone_in_its_band():
    levels = SoundLevels(192)
    one, louder = levels(tones(440.0)), levels(tones(440.0, amplitude=0.9))
    torch.testing.assert_close(one, louder, atol=1e-4, rtol=1e-4)
    assert one.shape == (1, train_mvae.FRAMES, 192, 1)
    band = int(one[0, 10, :, 0].argmax())
    assert abs(32.7 * 2 ** (band * math.log2(8000 / 32.7) / 192) / 440 - 1) < 0.03
    assert levels.stft_of(one).shape == (1, 2049, 64)


def test_si_sdr_against_a_hand_computed_case():
    target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    across = torch.tensor([1.0, 1.0, -1.0, -1.0])  # orthogonal to it, as long
    assert train_mvae.si_sdr(target + 0.1 * across, target).item() == pytest.approx(20.0, abs=1e-4)
    assert train_mvae.si_sdr(-3 * (target + 0.1 * across), 5 * target).item() == pytest.approx(20.0, abs=1e-4)
    assert train_mvae.si_sdr(target + across, target).item() == pytest.approx(0.0, abs=1e-4)


def test_slots_go_to_stems_by_the_best_permutation():
    score = torch.tensor([[[9.0, 8.0], [7.0, 0.0]], [[5.0, 0.0], [0.0, 5.0]]])  # (B, N, S)
    assert train_mvae.assign(score).tolist() == [[1, 0], [0, 1]]  # 8 + 7 above 9 + 0
    three = torch.tensor([[[0.0, 1.0], [9.0, 9.0], [8.0, 2.0]]])
    assert train_mvae.assign(three).tolist() == [[2, 1]]


def test_masks_sum_to_one_and_what_they_let_through_to_the_mixture():
    mixture = tones(440.0, 623.0).sum(0, keepdim=True)
    magnitude = torch.rand(1, 3, 2049, 64, generator=random_generator("m"))
    magnitude[:, :, :30] = 0
    masks = train_mvae.soft_masks(magnitude)
    torch.testing.assert_close(masks.sum(1), torch.ones(1, 2049, 64))
    torch.testing.assert_close(train_mvae.masked(mixture, masks).sum(1), mixture, atol=1e-5, rtol=0)


def test_true_magnitudes_part_two_tones():
    stems = tones(440.0, 623.0)[None]  # (1, 2, SAMPLES)
    parts = train_mvae.masked(stems.sum(1), train_mvae.soft_masks(train_mvae.stft_of(stems).abs()))
    gained = train_mvae.si_sdr(parts, stems) - train_mvae.si_sdr(stems.sum(1)[:, None], stems)
    assert gained.min() > 30


def sound_model(**changes):
    wide = {
        "size": 64, "cells": 16, "n_slots": 2, "op": "sum", "domain": "magnitude", "suppress": "window",
        "coords": "both", "background": "none", "shift": 0.0, "reach": 0.0, "explore": False,
    }  # fmt: skip
    return build(**wide | changes)


@pytest.mark.parametrize(
    ("op", "domain", "by_hand"),
    [
        ("sum", "magnitude", lambda a, b: math.log(1 + 100 * (a + b))),
        ("sum", "power", lambda a, b: math.log(1 + 100 * math.hypot(a, b))),
        ("mean", "log", lambda a, b: (math.log(1 + 100 * a) + math.log(1 + 100 * b)) / 2),
        ("max", "log", lambda a, b: math.log(1 + 100 * max(a, b))),
        ("min", "power", lambda a, b: math.log(1 + 100 * min(a, b))),
    ],
)
def test_layers_are_combined_in_the_domain_asked_for(op, domain, by_hand):
    model = sound_model(op=op, domain=domain)
    layer = torch.tensor([0.3, 0.7]).log()[None, :, None, None, None].expand(1, 2, train_mvae.FRAMES, 64, 1)
    level = model.compose(layer)
    torch.testing.assert_close(level, torch.full_like(level, by_hand(0.3, 0.7)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("op", "domain"), [("sum", "magnitude"), ("sum", "power"), ("sum", "log"), ("mean", "log"), ("max", "power")]
)
@torch.no_grad()
def test_all_operators_start_from_the_mean_of_the_data(op, domain):
    model = sound_model(op=op, domain=domain)
    mean = torch.linspace(0, 2, train_mvae.FRAMES)[:, None, None].expand(-1, 32, 1)  # and silence at the first time
    model.start_from(mean)
    model.to_layer[1].weight.zero_()
    layer = model.decode(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2))
    level = model.compose(layer)[0, :, 0, 0]
    assert torch.isfinite(layer).all()
    torch.testing.assert_close(level[1:], mean[1:, 0, 0], atol=1e-3, rtol=1e-3)
    assert level[0] < 0.05


@pytest.mark.parametrize("compose_at", ["data", "feature"])
def test_a_model_of_sounds_is_the_same_class_and_all_of_it_learns(compose_at):
    model = sound_model(compose_at=compose_at)
    level = torch.rand(3, train_mvae.FRAMES, 64, 1, generator=random_generator("l"))
    encoding, mean, _ = model(level, torch.randn(3, model.noise_size, generator=random_generator("n")))
    assert encoding.kl_map.shape == (3, 16, 1) and mean.shape == level.shape
    (mean.square().sum() + encoding.kl_map.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---------------------------------------------------------------- The run


def test_a_run_on_sounds_leaves_scores_figures_and_sounds(duo_run):
    metrics = json.loads((duo_run / "metrics.json").read_text())
    assert (metrics["split"], metrics["mixtures"]) == ("test", 6) and metrics["data"] == "built-in additive synthesiser"
    shares = ("own_instrument", "family_slot", "family_masked", "family_mixture", "family_stem")
    assert all(0 <= metrics[name] <= 1 for name in shares)
    assert {"si_sdr_gained", "si_sdr_gained_median", "lsd", "lsd_recomposed", "kl"} <= metrics.keys()
    assert {p.stem for p in (duo_run / "figures").iterdir()} == {"separation", "remix", "curve"}
    mixture, rate = soundfile.read(duo_run / "sounds" / "mixture0.wav")
    parts = [soundfile.read(duo_run / "sounds" / f"mixture0-slot{k}-masked.wav")[0] for k in range(2)]
    assert rate == 16000
    np.testing.assert_allclose(sum(parts), mixture, atol=1e-3)  # masks sum to one; 16 bits a sample


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "alpha"], "no --background"),
        (["--background", "picture"], "no --background"),
        (["--suppress", "drawn"], "for pictures"),
        (["--shift", "0.3"], "for pictures"),
        (["--N", "1"], "two notes need two slots"),
        (["--families", "mallet,bass"], "the built-in synthesiser has"),
        (["--compose", "feature", "--domain", "log"], "in no --domain"),
        (["--data-root", "nowhere"], "no such folder"),
    ],
)
def test_wrong_options_of_sounds_end_in_one_clear_line(args, message):
    result = CliRunner().invoke(train_mvae.main, ["--dataset", "nsynth-duo", "--steps", "1", *args])
    assert result.exit_code == 2 and message in result.output, result.output


def test_domains_are_for_sounds():
    result = CliRunner().invoke(train_mvae.main, ["--dataset", "sprites", "--domain", "power", "--steps", "1"])
    assert result.exit_code == 2 and "--domain is for sounds" in result.output


# ---------------------------------------------------------------- Recomposition


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """a.wav, of four seconds, and b.flac, shorter."""
    folder = tmp_path_factory.mktemp("sounds")
    soundfile.write(folder / "a.wav", tones(220.0, 277.0, amplitude=0.02).sum(0).numpy(), 16000)
    soundfile.write(folder / "b.flac", tones(330.0, 495.0, 990.0, amplitude=0.02).sum(0)[:40000].numpy(), 16000)
    return folder


def run(*args):
    return CliRunner().invoke(recompose.main, [str(a) for a in args])


def test_stft_and_its_inverse_are_those_of_torch():
    waveform = tones(440.0, 623.0).sum(0)
    mine = recompose.stft(waveform.numpy(), 4096, 1024)
    np.testing.assert_allclose(mine, train_mvae.stft_of(waveform[None])[0].numpy(), atol=1e-3)
    np.testing.assert_allclose(recompose.inverse_stft(mine, 4096, 1024, SAMPLES), waveform.numpy(), atol=1e-6)
    magnitude = np.random.default_rng(0).random((3, 20, 5))
    theirs = train_mvae.soft_masks(torch.from_numpy(magnitude)[None])[0]
    np.testing.assert_allclose(recompose.soft_masks(magnitude), theirs.numpy(), atol=1e-7)


def test_all_slots_of_a_sound_are_the_sound(duo_run, sounds, tmp_path):
    for name in ("a.wav", "b.flac"):
        result = run(sounds / name, "--model", duo_run / "export", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        whole = soundfile.read(sounds / name)[0]
        back, rate = soundfile.read(tmp_path / name)
        assert rate == 16000 and len(back) == SAMPLES
        np.testing.assert_allclose(back[: len(whole)], whole, atol=1e-4)
        assert (tmp_path / f"{name[0]}_figure.png").is_file()


@torch.no_grad()
def test_a_slot_of_each_sound_is_what_pytorch_makes(duo_run, sounds, tmp_path):
    args = [sounds / "a.wav", sounds / "b.flac", "--slots", "1", "--slots", "0", "--model", duo_run / "export"]
    assert run(*args, "--out", tmp_path / "m.wav").exit_code == 0
    model, _, _ = recompose_model(duo_run)
    levels, expected = SoundLevels(64), 0
    for name, slot in (("a.wav", 1), ("b.flac", 0)):
        read = torch.from_numpy(soundfile.read(sounds / name, dtype="float32")[0])
        waveform = torch.nn.functional.pad(read, (0, SAMPLES - len(read)))[None]
        encoding = model.encode(levels(waveform))
        layer = model.decode(encoding.mu, encoding.cell)
        alone = torch.cat([levels.stft_of(model.compose(layer[:, k : k + 1])) for k in range(2)])[None]
        expected = expected + train_mvae.masked(waveform, train_mvae.soft_masks(alone))[0, slot]
    np.testing.assert_allclose(soundfile.read(tmp_path / "m.wav")[0], expected.numpy(), atol=1e-4)
    assert run(*args, "--vocoder", "--out", tmp_path / "v.wav").exit_code == 0
    loud = [np.square(soundfile.read(tmp_path / f"{name}.wav")[0]).mean() for name in "mv"]
    assert loud[1] == pytest.approx(loud[0], rel=0.01)


def test_by_the_vocoder_inputs_keep_their_levels(duo_run, sounds, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        recompose.Model, "vocode", lambda self, spectrum: heard.append(spectrum) or np.ones((1, SAMPLES))
    )
    soft = 1e-3 * soundfile.read(sounds / "b.flac")[0]
    soundfile.write(tmp_path / "soft.wav", soft, 16000, subtype="FLOAT")
    args = ["--vocoder", "--model", duo_run / "export", "--out", tmp_path / "o.wav"]
    for inputs in (
        [sounds / "a.wav"],
        [sounds / "a.wav", tmp_path / "soft.wav"],
        [sounds / "a.wav", sounds / "b.flac"],
    ):
        assert run(*inputs, *args).exit_code == 0
    one, with_soft, with_loud = (spectrum.sum() for spectrum in heard)
    assert with_soft == pytest.approx(one, rel=0.01) and with_loud > 1.3 * one


def test_a_sound_that_cannot_be_written_ends_in_one_clear_line(duo_run, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(recompose.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    result = run(sounds / "a.wav", "--model", duo_run / "export", "--out", tmp_path / "o.wav")
    assert result.exit_code == 1 and "cannot be written: No space left" in result.output
    assert not list(tmp_path.glob("o.wav*"))


def recompose_model(folder):
    import export

    return export.load_model(folder)


def test_what_is_no_sound_for_this_model_is_refused_in_one_line(duo_run, sounds, tmp_path):
    wave = 0.1 * np.sin(np.arange(SAMPLES))
    soundfile.write(tmp_path / "rate.wav", wave, 44100)
    soundfile.write(tmp_path / "long.wav", np.concatenate([wave, wave]), 16000)
    soundfile.write(tmp_path / "silent.wav", 0 * wave, 16000)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(SAMPLES) == 7, np.nan, wave), 16000, subtype="FLOAT")
    (tmp_path / "half.wav").write_bytes((tmp_path / "long.wav").read_bytes()[:20])
    recompose.Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    model = ["--model", duo_run / "export"]
    for args, message in (
        ([tmp_path / "rate.wav", *model], "44100 samples a second; this model takes 16000"),
        ([tmp_path / "long.wav", *model], "8.00 s; this model takes up to 4 s"),
        ([tmp_path / "silent.wav", *model], "silent"),
        ([tmp_path / "nan.wav", *model], "no numbers"),
        ([tmp_path / "half.wav", *model], "damaged"),
        ([tmp_path / "none.wav", *model], "no such file"),
        ([tmp_path / "song.mp3", *model], "WAV and FLAC files alone"),
        ([sounds / "a.wav", tmp_path / "p.png", *model], "cannot be recomposed together"),
        ([sounds / "a.wav", "--slots", "2", *model], "this model has slots 0 to 1"),
        ([sounds / "a.wav", "--out", tmp_path / "x.png", *model], "ends in .wav or .flac"),
        ([sounds / "a.wav", "--out", sounds / "a.wav", *model], "would overwrite an input"),
        ([tmp_path / "p.png", "--vocoder", "--out", tmp_path / "q.png"], "--vocoder is for sounds"),
    ):
        result = run(*args, *([] if "--out" in args else ["--out", tmp_path / "o.wav"]))
        assert result.exit_code == 2 and message in result.output, (args, result.output)
        assert not (tmp_path / "o.wav").exists()


def test_a_model_of_pictures_is_refused_for_sounds(clevr_run, sounds, tmp_path):
    result = run(sounds / "a.wav", "--model", clevr_run / "export", "--out", tmp_path / "o.wav")
    assert result.exit_code == 2 and "a model of kind 'mvae-image'; expected 'mvae-sound'" in result.output

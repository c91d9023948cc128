"""Two notes at once: mixtures, levels, masks, scores by hand and by torchmetrics, the model and its run folder."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from click.testing import CliRunner
from conftest import train
from test_mvae import build, noise_for
from torchmetrics.audio import ScaleInvariantSignalDistortionRatio

import train_mvae
from common import log_compress, log_expand, random_generator
from export import GriffinLim
from tests.experiments import judges, slots
from train_mvae import FRAMES, LOUDNESS, MVAE, SAMPLES, SPLITS, Mixtures, SoundLevels


@pytest.fixture(scope="module")
def duos():
    options = {
        "dataset": "nsynth-duo", "data_root": None, "download": False, "families": ["bass", "flute", "vocal"],
        "seed": 0, "size": 64, "voices": (2, 2),
    }  # fmt: skip
    return Mixtures(options, torch.device("cpu"))


def tones(*frequencies, amplitude=0.1):
    """Sines one after another along the first axis: (n, SAMPLES)."""
    t = torch.arange(SAMPLES) / 16000
    return amplitude * torch.stack([torch.sin(2 * math.pi * f * t) for f in frequencies])


# ---------------------------------------------------------------- Mixtures


def test_mixtures_keep_the_sum_of_their_stems_and_the_difference_asked_for(duos):
    pair, decibels = duos.sample("train", 50, random_generator("x"))
    stems = duos.stems("train", pair, decibels)
    loudness = train_mvae.root_mean_square(stems)[..., 0]
    torch.testing.assert_close(train_mvae.root_mean_square(stems.sum(1))[:, 0], torch.full((50,), LOUDNESS))
    difference = 20 * torch.log10(loudness[:, 0] / loudness[:, 1])
    torch.testing.assert_close(difference, decibels[:, 0] - decibels[:, 1], atol=1e-3, rtol=0)
    assert 3 < difference.abs().max() <= train_mvae.MAX_GAIN_DB
    note = duos.notes["train"].waveform(pair[3, 1:])[0]  # as it was, but for its loudness
    scaled = stems[3, 1] / loudness[3, 1] * train_mvae.root_mean_square(note)
    torch.testing.assert_close(scaled, note, atol=1e-5, rtol=1e-4)


def test_notes_of_a_mixture_are_of_two_instruments_and_share_not_all_harmonics(duos):
    for split in SPLITS:
        notes = duos.notes[split].notes
        for a, b in duos.sample(split, 100, random_generator("y"))[0].tolist():
            assert notes[a].instrument != notes[b].instrument and (notes[a].pitch - notes[b].pitch) % 12


def test_of_two_to_four_notes_every_pair_is_of_two_instruments_and_those_left_out_are_silent(duos):
    band = copy.copy(duos)
    band.fewest, band.parts = 2, 4
    chosen, decibels = band.sample("train", 200, random_generator("band"))
    notes, counts = duos.notes["train"].notes, decibels.isfinite().sum(1)
    assert counts.unique().tolist() == [2, 3, 4] and counts.bincount()[2:].min() > 40
    assert (decibels.isfinite() == (torch.arange(4) < counts[:, None])).all()
    for some in chosen.tolist():
        for a, b in itertools.combinations(some, 2):
            assert notes[a].instrument != notes[b].instrument and (notes[a].pitch - notes[b].pitch) % 12
    stems = band.stems("train", chosen[:20], decibels[:20])
    assert torch.equal(stems.abs().amax(2) == 0, decibels[:20].isinf())
    torch.testing.assert_close(train_mvae.root_mean_square(stems.sum(1))[:, 0], torch.full((20,), LOUDNESS))


def test_few_mixtures_of_a_split_are_the_first_of_many_and_no_instrument_is_in_two_splits(duos):
    assert torch.equal(duos.mixtures("test", 2), duos.mixtures("test", 6)[:2])
    instruments = [name for split in SPLITS for name in {note.instrument for note in duos.notes[split].notes}]
    assert len(set(instruments)) == len(instruments)


def test_batches_depend_on_the_step_alone_and_processes_share_them(duos):
    whole = duos.batch(5, slice(0, 4), 4)
    assert whole.shape == (4, FRAMES, 64, 1)
    assert torch.equal(whole, duos.batch(5, slice(0, 4), 4))
    assert not torch.equal(whole, duos.batch(6, slice(0, 4), 4))
    torch.testing.assert_close(torch.cat([duos.batch(5, own, 4) for own in (slice(0, 2), slice(2, 4))]), whole)


def test_notes_of_one_instrument_cannot_be_mixed(duos, monkeypatch):
    monkeypatch.setattr(duos.notes["train"], "instrument", torch.zeros_like(duos.notes["train"].instrument))
    with pytest.raises(train_mvae.click.UsageError, match="are of different instruments"):
        duos.sample("train", 1, random_generator("z"))


# ---------------------------------------------------------------- One's own sounds


def write_tones(root, names, seconds=1):
    """Decaying tones at `names`, relative paths without suffix, k semitones above 220 Hz; returns the root."""
    t = np.arange(int(16000 * seconds)) / 16000
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.5 * np.exp(-t) * np.sin(2 * np.pi * 220 * 2 ** (k % 24 / 12) * t)
        soundfile.write(root / f"{name}.wav", wave, 16000)
    return root


def own(root, mix=True):
    options = {"dataset": "sounds", "mix": mix, "data_root": root, "download": False, "families": None, "seed": 0}
    return Mixtures(options | {"size": 64, "voices": (2, 2)}, torch.device("cpu"))


def pairs(data, split):
    notes = data.notes[split].notes
    return [(notes[a], notes[b]) for a, b in data.sample(split, 60, random_generator("pairs"))[0].tolist()]


def test_own_sounds_are_mixed_across_folders_never_in_unison_where_pitches_are_known(tmp_path):
    notes = ("C", "C#", "D", "D#", "E", "F")
    names = [f"{folder}/{notes[i % 6]}{3 + i % 3} take {i}" for i in range(30) for folder in ("piano", "flute")]
    data = own(write_tones(tmp_path, names))
    for split in SPLITS:
        for a, b in pairs(data, split):
            assert a.family != b.family and a.pitch > 0 and (a.pitch - b.pitch) % 12
    stems = data.mixtures("valid", 3)
    assert stems.shape == (3, 2, SAMPLES)
    torch.testing.assert_close(train_mvae.root_mean_square(stems.sum(1))[:, 0], torch.full((3,), LOUDNESS))


def test_own_sounds_without_folders_or_pitches_are_mixed_across_files_but_none_that_is_damaged(tmp_path):
    root = write_tones(tmp_path, [f"rec {i}" for i in range(60)], seconds=9)
    data = own(root)
    assert all(a.path != b.path and a.pitch == -1 for split in SPLITS for a, b in pairs(data, split))
    bad = {note.path for note in data.notes["train"].notes[:20]}
    for path in bad:
        soundfile.write(path, np.full(16000 * 9, np.nan), 16000, subtype="FLOAT")
    again = own(root)
    assert not bad & {note.path for pair in pairs(again, "train") for note in pair} and again.notes["train"].left_out
    whole, halves = (again.batch(3, part, 8) for part in (slice(0, 8), slice(4, 8)))
    torch.testing.assert_close(whole[4:], halves)
    single = own(root, mix=False)
    assert single.batch(0, slice(0, 3), 3).shape == (3, FRAMES, 64, 1)
    assert single.mixtures("test", 100).shape[1:] == (1, SAMPLES)


def test_a_run_on_own_sounds_as_they_are_has_no_stems_to_be_scored_by(tmp_path):
    root = write_tones(tmp_path / "mine", [f"rec {i}" for i in range(60)])
    args = ["--dataset", "sounds", "--size", 64, "--cells", 16, "--N", 3, "--channels", 8, "--D", 3, "--batch", 4]
    args += ["--device", "cpu", "--steps", 1]
    train(*args, "--data-root", root, "--out", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"mse", "log_likelihood", "kl", "lsd", "mixtures"} <= metrics.keys() and "si_sdr_gained" not in metrics
    assert (tmp_path / "run" / "figures" / "separation.png").is_file()
    heard = {path.name for path in (tmp_path / "run" / "sounds").iterdir()}
    slots = [f"-slot{k}-masked" for k in range(3)]
    assert heard == {f"mixture{b}{slot}.wav" for b in range(2) for slot in ("", *slots)}
    config, model = json.loads((tmp_path / "run" / "config.json").read_text()), train_mvae.load(tmp_path / "run")
    assert (config["data"]["name"], config["data"]["source"]) == ("sounds", "own sounds, folder mine")
    assert model.sound and train_mvae.describe(model)["kind"] == "mvae-sound"
    model.config["valid"] = {}  # as where curve.json is gone
    assert "unlike" not in train_mvae.describe(model)


# ---------------------------------------------------------------- Levels, masks, scores


def test_bands_average_stand_at_equal_steps_of_pitch_and_are_undone_where_they_are_flat():
    levels = SoundLevels(192)
    torch.testing.assert_close(levels.bank().sum(1), torch.ones(192))
    heaviest = levels.bank().argmax(1) * 16000 / 4096
    ratio = heaviest[150:].diff() / heaviest[150:-1]
    assert (ratio - (2 ** (math.log2(8000 / 32.7) / 192) - 1)).abs().max() < 0.01
    flat = levels.to_stft_magnitude(torch.full((1, FRAMES, 192, 1), math.log(1 + 100 * 3.0)))
    torch.testing.assert_close(flat[:, 20:-20], torch.full_like(flat[:, 20:-20], 3.0))


def test_levels_have_one_loudness_and_show_a_tone_in_its_band():
    levels = SoundLevels(192)
    one, louder = levels(tones(440.0)), levels(tones(440.0, amplitude=0.9))
    torch.testing.assert_close(one, louder, atol=1e-4, rtol=1e-4)
    assert one.shape == (1, FRAMES, 192, 1)
    band = int(one[0, 10, :, 0].argmax())
    assert abs(32.7 * 2 ** (band * math.log2(8000 / 32.7) / 192) / 440 - 1) < 0.03
    assert levels.to_stft_magnitude(one).shape == (1, 2049, 64)


@torch.no_grad()
def test_slots_of_sounds_are_encoded_again_from_what_their_masks_leave():
    torch.manual_seed(0)
    about = {"cells": 16, "d": 4, "channels": 8, "op": "sum", "compose_at": "data", "detail": 0, "prior": "set"}
    model = MVAE(size=64, n_slots=2, dataset="nsynth-duo", **about)
    level = torch.rand(3, FRAMES, 64, 1, generator=random_generator("levels"))
    first, again = model.encode(level, again=False), model.encode(level)
    assert torch.equal(first.cell, again.cell) and torch.equal(first.kl, again.kl)
    power = model.decode(first.mu, first.cell).exp().square()
    for k in range(2):
        share = power[:, k] / power.sum(1)
        mu, logvar = model.encoder((1 + level.expm1() * share).log())[:2]  # level is log(1 + 100 m)
        cell = ((first.cell[:, k, 0] + 1) * 8).long()
        for found, wanted in ((again.mu, mu), (again.logvar, logvar)):
            torch.testing.assert_close(found[:, k], wanted[torch.arange(3), :, cell, 0], atol=1e-4, rtol=1e-3)
    alone = model.encode(level, slots=torch.arange(1)).mu  # one slot owns all there is
    torch.testing.assert_close(alone, model.encode(level, slots=torch.arange(1), again=False).mu)


def test_si_sdr_is_that_of_torchmetrics():
    generator = random_generator("si-sdr")
    target = torch.randn(5, 400, generator=generator)
    estimate = 0.3 * target + torch.randn(5, 400, generator=generator) * torch.tensor([0.01, 0.1, 0.3, 1, 9])[:, None]
    oracle = ScaleInvariantSignalDistortionRatio()
    expected = [oracle(one, other).item() for one, other in zip(estimate, target, strict=True)]
    assert judges.si_sdr(estimate, target).tolist() == pytest.approx(expected, abs=1e-3)
    stems = torch.stack([target, torch.roll(target, 7, 1)], dim=1)  # (5, 2, 400)
    mixed = [oracle(one, other).item() for one, other in zip(stems.sum(1), target, strict=True)]
    _, gained = train_mvae.assign(torch.stack([estimate, stems[:, 1]], dim=1), stems)
    assert (gained[:, 0] + torch.tensor(mixed)).tolist() == pytest.approx(expected, abs=1e-3)


def test_slots_go_to_stems_by_the_best_permutation():
    stems = torch.eye(2, 4)[None]  # (1, S, samples), without a common sample
    share = torch.tensor([[0.9, 0.1, 0, 0], [0.6, 0.4, 0, 0]])  # 0.9 of one is nearer to stem 0 than 0.6, but
    slot, gained = train_mvae.assign(share[None], stems)
    assert slot.tolist() == [[0, 1]] and gained[0, 0] == pytest.approx(20 * math.log10(9), abs=1e-3)
    assert train_mvae.assign(share.flip(0)[None], stems)[0].tolist() == [[1, 0]]
    three = torch.cat([torch.tensor([[0, 0, 1.0, 0.3]]), share])[None]
    assert train_mvae.assign(three, stems)[0].tolist() == [[1, 2]]


def stft_magnitude(waveform):
    """(n, SAMPLES) -> torchaudio's magnitudes (n, 2049, 63)."""
    return torchaudio.transforms.Spectrogram(4096, hop_length=1024, power=1)(waveform)


class Knowing(torch.nn.Module):
    """Stands in for a trained model: its slots are the two stems' own levels, in the wrong order."""

    def __init__(self, levels, stems):
        super().__init__()
        self.layer = (
            levels.as_loud(stems.flatten(0, 1)).unflatten(0, stems.shape[:2]).flip(1)
        )  # (B, 2, FRAMES, bands, 1)

    def encode(self, level):
        return train_mvae.Encoding(self.layer, *7 * [None])

    def decode(self, z, cell):
        return z

    def compose(self, layer, background=None):
        return layer.sum(1)

    def alone(self, layer, background=None):
        return layer


@torch.no_grad()
def test_slots_that_are_stems_are_nearest_to_their_own_and_remix_as_these(duos, monkeypatch):
    notes = [tones(440.0, 623.0), tones(311.0, 1200.0), tones(880.0, 270.0)]
    stems = LOUDNESS / 0.1 * torch.stack(notes)  # (3, 2, samples)
    model, plain = Knowing(duos.levels, stems), slots.separate_by_stems
    model.compose = lambda layer, background=None: log_compress(log_expand(layer).sum(1))
    data = SimpleNamespace(mixtures=lambda *_: stems, levels=duos.levels, device=torch.device("cpu"))
    scores = slots.score_remixes(model, data, "test", 3)
    assert scores["own_instrument"] == 1 and scores["lsd_recomposed"] < 0.2 * scores["lsd_recomposed_baseline"]

    def exchanged(*args):
        level, layer, alone, gained = plain(*args)
        return level, layer, alone.flip(1), gained

    monkeypatch.setattr(slots, "separate_by_stems", exchanged)
    assert slots.score_remixes(model, data, "test", 3)["own_instrument"] == 0


@torch.no_grad()
def test_scores_of_sounds_are_what_they_are_called(duos, monkeypatch):
    stems = (LOUDNESS / 0.1 * tones(440.0, 623.0) * torch.tensor([[1.0], [0.5]]))[None]
    model, nats = Knowing(duos.levels, stems), torch.tensor([7.0])
    encoding = train_mvae.Encoding(model.layer, None, None, torch.tensor([[20.0, 5.0]]), None, None, None, nats)
    monkeypatch.setattr(model, "encode", lambda level: encoding)
    data = SimpleNamespace(mixtures=lambda *_: stems, levels=duos.levels, device=torch.device("cpu"), parts=2)
    scores = train_mvae.evaluate_sounds(model, data, "test", 1, 0.1)
    level, mean, *_, parts = train_mvae.separate(model, duos.levels, stems.sum(1))
    gained, off = train_mvae.assign(parts, stems)[1], mean - level
    assert scores["si_sdr_gained"] == pytest.approx(gained.mean().item(), rel=1e-5)
    assert scores["si_sdr_gained_median"] == pytest.approx(np.median(gained), rel=1e-5)
    assert (scores["slot_count_error"], scores["kl"], scores["mixtures"]) == (1, 7, 1)
    assert scores["mse"] == pytest.approx(off.square().mean().item(), rel=1e-5)
    decibels = 20 / math.log(10) * off[0, :, :, 0]  # (FRAMES, bands)
    assert scores["lsd"] == pytest.approx(decibels.square().mean(1).sqrt().mean().item(), rel=1e-5)


@torch.no_grad()
def test_slots_that_know_their_stems_part_two_tones(duos):
    stems = (LOUDNESS / 0.1 * tones(440.0, 623.0))[None]  # (1, 2, SAMPLES)
    parts = train_mvae.separate(Knowing(duos.levels, stems), duos.levels, stems.sum(1)).parts
    torch.testing.assert_close(parts.sum(1), stems.sum(1), atol=1e-6, rtol=0)  # masks sum to one
    slot, gained = train_mvae.assign(parts, stems)
    assert slot.tolist() == [[1, 0]] and gained.min() > 15
    expected = ScaleInvariantSignalDistortionRatio()(parts[0, [1, 0]], stems[0]).item()
    assert gained.mean().item() == pytest.approx(expected, abs=0.5)  # of stems as loud as each other: 0 dB before


@torch.no_grad()
def test_a_stem_that_is_silent_takes_no_slot_from_others_and_has_no_score(duos):
    tone = LOUDNESS / 0.1 * tones(440.0, 623.0)
    stems = torch.stack([tone[0], 0 * tone[0], tone[1]])[None]  # (1, 3, SAMPLES)
    parts = train_mvae.separate(Knowing(duos.levels, stems), duos.levels, stems.sum(1)).parts
    slot, gained = train_mvae.assign(parts, stems)
    assert slot.tolist() == [[2, 1, 0]] and gained[0].isnan().tolist() == [False, True, False]
    assert gained[0, [0, 2]].min() > 15


# ---------------------------------------------------------------- Vocoder


def test_the_vocoder_gives_numbers_for_silence_noise_and_full_scale():
    magnitude = stft_magnitude(tones(440.0))[:, :, :16]
    silent_end = magnitude.clone()
    silent_end[..., -6:] = 0
    noise = torch.rand(magnitude.shape, generator=random_generator("noise"))
    vocoder = GriffinLim(4096)
    for spectrogram in (silent_end, 0 * magnitude, noise, 1000 * magnitude / magnitude.max()):
        waveform = vocoder(spectrogram)
        assert waveform.isfinite().all()
        if not spectrogram.any():
            assert not waveform.any()


# ---------------------------------------------------------------- Model


def sound_model(**changes):
    wide = {
        "size": 64, "cells": 16, "n_slots": 2, "op": "sum", "dataset": "nsynth-duo", "detail": 0,
    }  # fmt: skip
    return build(**wide | changes)


@pytest.mark.parametrize(("op", "by_hand"), [("sum", 1.0), ("mean", 0.5), ("max", 0.7), ("min", 0.3)])
def test_layers_are_combined_as_magnitudes(op, by_hand):
    model = sound_model(op=op)
    layer = torch.tensor([0.3, 0.7]).log()[None, :, None, None, None].expand(1, 2, FRAMES, 64, 1)
    level = model.compose(layer)
    torch.testing.assert_close(level, torch.full_like(level, math.log(1 + 100 * by_hand)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", ["sum", "mean", "max", "min"])
@torch.no_grad()
def test_all_operators_start_from_the_mean_of_the_data(op):
    model = sound_model(op=op)
    mean = torch.linspace(0, 2, FRAMES)[:, None, None].expand(-1, 64, 1)  # and silence at the first time
    model.start_at_mean(mean)
    model.slot_decoder.out.weight.zero_()
    layer = model.decode(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2))
    level = model.compose(layer)[0, :, 0, 0]
    assert torch.isfinite(layer).all()
    torch.testing.assert_close(level[1:], mean[1:, 0, 0], atol=1e-3, rtol=1e-3)
    assert level[0] < 0.05


def test_a_model_of_sounds_is_the_same_class_and_all_of_it_learns():
    model = sound_model()
    level = torch.rand(3, FRAMES, 64, 1, generator=random_generator("l"))
    encoding, mean, _ = model(level, noise_for(model, 3))
    assert encoding.kl_map.shape == (3, 16, 1) and mean.shape == level.shape
    (mean.square().sum() + encoding.kl_map.sum()).backward()
    trained = [p for name, p in model.named_parameters() if not name.startswith("prior.")]  # which is fitted later
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


# ---------------------------------------------------------------- The run


def test_a_run_on_sounds_leaves_scores_figures_and_sounds(duo_run):
    metrics = json.loads((duo_run / "metrics.json").read_text())
    assert (metrics["split"], metrics["mixtures"]) == ("test", 6) and metrics["data"] == "built-in additive synthesiser"
    names = "si_sdr_gained si_sdr_gained_median lsd slot_count_error kl step_0/si_sdr_gained"
    assert set(names.split()) <= metrics.keys()
    assert {p.stem for p in (duo_run / "figures").iterdir()} - {"remix"} == {"separation"}  # of an experiment's test
    mixture, rate = soundfile.read(duo_run / "sounds" / "mixture0.wav")
    parts = [soundfile.read(duo_run / "sounds" / f"mixture0-slot{k}-masked.wav")[0] for k in range(2)]
    assert rate == 16000
    np.testing.assert_allclose(sum(parts), mixture, atol=1e-3)  # masks sum to one; 16 bits a sample


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "alpha"], "--op alpha and --compose feature are for pictures"),
        (["--compose", "feature"], "--op alpha and --compose feature are for pictures"),
        (["--objects", "1", "2"], "--objects does not belong to"),
        (["--voices", "1", "2"], "1 is not in the range"),
        (["--voices", "3", "2", "--N", "4"], "--voices: expected the fewest first"),
        (["--voices", "2", "5", "--N", "4"], "at most --N, 4: a slot for each"),
        (["--N", "1"], "at most --N, 1: a slot for each"),
        (["--families", "mallet,bass"], "others need --data-root"),
        (["--data-root", "nowhere"], "no such folder"),
        (["--dataset", "sounds", "--data-root", ".", "--voices", "2", "3", "--N", "3"], "--voices is for --mix"),
        (["--dataset", "sounds"], "--dataset sounds: expected --data-root, a folder of your own"),
        (["--dataset", "sounds", "--data-root", "nowhere", "--N", "1"], "nowhere: no such folder"),
        (["--mix"], "--mix does not belong to --dataset nsynth-duo"),
    ],
)
def test_wrong_options_of_sounds_end_in_one_clear_line(args, message):
    result = CliRunner().invoke(train_mvae.main, ["--dataset", "nsynth-duo", "--steps", "1", *args])
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output

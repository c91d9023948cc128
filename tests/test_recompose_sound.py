"""Recomposition of sounds: the same as PyTorch makes, of any rate and length, edits, every kind of mistake.

After a new export of the shipped model, `python -m tests.test_recompose_sound` prints its GOLDEN numbers.
"""

import math
import shutil
import struct
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from conftest import give_nan
from PIL import Image

import recompose
import train_mvae
from tests.experiments.separation import apply_masks

pytestmark = pytest.mark.usefixtures("kept_sessions")
SAMPLES, RATE = 64000, 16000
SHIPPED = recompose.SHIPPED["mvae-sound"]
# Nats of the slots, first those of a.flac; root mean squares x 1000: slot 0 of a with slot 1 of b, and a, b vocoded.
GOLDEN = {"nats": [48.336, 42.66, 75.68, 33.094], "masked": [120.395], "vocoded": [39.822, 56.548]}


def tones(*frequencies, amplitude=0.1):
    """A chord of sines: (SAMPLES,)."""
    t = np.arange(SAMPLES) / RATE
    return amplitude * sum(np.sin(2 * math.pi * frequency * t) for frequency in frequencies)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """a.wav, of four seconds, and b.flac, shorter."""
    folder = tmp_path_factory.mktemp("sounds")
    soundfile.write(folder / "a.wav", tones(220, 277, amplitude=0.02), RATE)
    soundfile.write(folder / "b.flac", tones(330, 495, 990, amplitude=0.02)[:40000], RATE)
    return folder


def run(*args):
    return CliRunner().invoke(recompose.main, [str(a) for a in args])


def recomposed(*args, out):
    """What is written: samples (n, channels), and their rate."""
    result = run(*args, "--out", out)
    assert result.exit_code == 0, result.output
    return soundfile.read(out, always_2d=True)


def refused(result, message, code=2):
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output, result.exception
    assert result.exit_code == code and message in result.output, result.output


def root_mean_square(samples):
    return np.sqrt(np.square(samples).mean())


def ratio_db(signal, other):
    """How far below a signal its difference from another is."""
    return 20 * np.log10(root_mean_square(signal) / max(root_mean_square(signal - other), 1e-12))


def melody(rate, channels, seconds=9.5):
    """Notes that begin at 0, 2.7 and 6.1 s, another in every channel: (n, channels), and when they begin."""
    onsets, t = (0.0, 2.7, 6.1), np.arange(round(seconds * rate)) / rate
    waveform = np.zeros((len(t), channels))
    for k, onset in enumerate(onsets):
        since = np.maximum(t - onset, 0)
        for c in range(channels):
            harmonics = sum(np.sin(2 * np.pi * (1 + h) * (220 + 70 * k + 40 * c) * since) / (1 + h) for h in range(5))
            waveform[:, c] += 0.1 * (t >= onset) * np.exp(-1.5 * since) * harmonics
    return waveform + 1e-4 * np.random.default_rng(0).standard_normal(waveform.shape), onsets


def test_stft_and_its_inverse_are_those_of_torch():
    waveform = tones(440, 623)
    mine, window = recompose.stft(waveform, 4096, 1024), torch.hann_window(4096, dtype=torch.float64)
    whole = torch.nn.functional.pad(torch.from_numpy(waveform), (0, -SAMPLES % 1024))
    np.testing.assert_allclose(mine, torch.stft(whole, 4096, 1024, window=window, return_complex=True), atol=1e-6)
    np.testing.assert_allclose(recompose.inverse_stft(mine, 4096, 1024, SAMPLES), waveform, atol=1e-6)


def test_masks_are_shares_of_power_after_a_gain_for_every_bin_that_the_mixture_asks_for():
    slots = np.random.default_rng(0).random((3, 20, 5))
    mixture, shares = np.sqrt(np.square(slots).sum(0)), np.square(slots) / np.square(slots).sum(0)
    np.testing.assert_allclose(recompose.soft_masks(slots, mixture), shares, atol=1e-9)  # as it is: no gain
    for other in (7 * mixture, 1e-3 * mixture, 0 * mixture):  # nor for another loudness, or for silence
        np.testing.assert_allclose(recompose.soft_masks(slots, other), shares, atol=1e-5)
    other = np.random.default_rng(1).random((20, 5))
    some = recompose.soft_masks(slots, other)
    np.testing.assert_allclose(some.sum(0), 1)
    padded = recompose.soft_masks(np.pad(slots, ((0, 0), (0, 0), (0, 3)), "edge"), np.pad(other, ((0, 0), (0, 3))))
    np.testing.assert_allclose(padded[:, :, :5], some, atol=1e-9)  # zero-padding says nothing
    # Two slots say the same of two bins, one of them early, one late; but the second bin sounds late alone.
    slots = np.array([[[1.0, 1, 0.2, 0.2]] * 2, [[0.2, 0.2, 1, 1]] * 2])
    mixture = np.array([[1.02, 1.02, 1.02, 1.02], [0.0, 0.0, 1.02, 1.02]])
    masks = recompose.soft_masks(slots, mixture)
    assert masks[0, :, 2].tolist() == pytest.approx([0.04 / 1.04, 0.04**2 / (1 + 0.04**2)], rel=1e-3)


def golden_numbers():
    """The shipped model's answers on the shipped sounds, as the README's command gives them."""
    names = [SHIPPED / "a.flac", SHIPPED / "b.flac"]
    model = recompose.Model(SHIPPED, "mvae-sound", others=["vocoder"])
    waveform = np.stack([recompose.read_sound(path)[0][:, 0] for path in names])
    masked, _, _ = recompose.recompose_sounds(model, names, [{0: {}}, {1: {}}])
    encoded = model.run("encoder", waveform=waveform)
    spectrogram = model.compose(model.run("decoder", z=encoded["mu"], cell=encoded["cell"])["layer"])
    vocoded = model.run("vocoder", spectrogram=spectrogram)["waveform"]
    loudness = [[1e3 * root_mean_square(one) for one in sounds] for sounds in (masked, vocoded)]
    numbers = {"nats": encoded["kl"].flatten(), "masked": loudness[0], "vocoded": loudness[1]}
    return {name: [round(float(value), 3) for value in values] for name, values in numbers.items()}


def test_the_shipped_model_gives_its_golden_numbers():
    found = golden_numbers()
    for name, values in GOLDEN.items():
        np.testing.assert_allclose(found[name], values, rtol=0.01, err_msg=f"now {found}")


def test_all_slots_of_a_sound_are_the_sound(duo_run, sounds, tmp_path):
    for name in ("a.wav", "b.flac"):
        result = run(sounds / name, "--model", duo_run / "export", "--out", tmp_path / name)
        assert result.exit_code == 0 and "2 of 2 slots;" in result.output, result.output
        whole, back = soundfile.read(sounds / name)[0], soundfile.read(tmp_path / name)
        assert back[1] == RATE and len(back[0]) == len(whole)
        np.testing.assert_allclose(back[0], whole, atol=1e-4)
        assert (tmp_path / f"{name[0]}_figure.png").is_file()


@torch.no_grad()
def test_a_slot_of_each_sound_is_what_pytorch_makes(duo_run, sounds, tmp_path):
    args = [sounds / "a.wav", sounds / "b.flac", "--slots", "1", "--slots", "0", "--model", duo_run / "export"]
    assert run(*args, "--out", tmp_path / "m.wav").exit_code == 0
    model, levels, expected = train_mvae.load(duo_run), train_mvae.SoundLevels(64), torch.zeros(SAMPLES)
    for name, slot in (("a.wav", 1), ("b.flac", 0)):
        found = torch.from_numpy(recompose.read_sound(sounds / name)[0].T)  # (1, n)
        waveform = torch.nn.functional.pad(found, (0, SAMPLES - found.shape[1]))
        encoding = model.encode(levels(waveform))
        layer = model.decode(encoding.mu, encoding.cell)
        alone = torch.cat([levels.to_stft_magnitude(model.compose(layer[:, k : k + 1])) for k in range(2)])[None]
        expected[: found.shape[1]] += apply_masks(waveform, alone)[0, slot][: found.shape[1]]
    np.testing.assert_allclose(soundfile.read(tmp_path / "m.wav")[0], expected.numpy(), atol=1e-4)


def test_by_the_vocoder_a_slot_is_as_loud_as_its_mask_leaves_it(duo_run, sounds, tmp_path):
    args = ["--slots", "1", "--model", duo_run / "export"]
    masked, _ = recomposed(sounds / "a.wav", *args, out=tmp_path / "o.wav")
    soundfile.write(tmp_path / "soft.wav", 0.1 * soundfile.read(sounds / "a.wav")[0], RATE, subtype="FLOAT")
    vocoded, _ = recomposed(tmp_path / "soft.wav", *args, "--vocoder", out=tmp_path / "o.wav")
    assert root_mean_square(vocoded) == pytest.approx(0.1 * root_mean_square(masked), rel=0.01)
    assert ratio_db(0.1 * masked, vocoded) < 20, "they are not the same"


def test_a_vocoder_that_gives_nan_writes_nothing(duo_run, sounds, tmp_path):
    shutil.copytree(duo_run / "export", tmp_path / "m")
    give_nan(tmp_path / "m" / "vocoder.onnx")
    (tmp_path / "out").mkdir()
    result = run(sounds / "a.wav", "--vocoder", "--model", tmp_path / "m", "--out", tmp_path / "out" / "o.wav")
    refused(result, "vocoder.onnx gives values that are not finite; nothing is written", 1)
    assert result.output.count("\n") == 1 and not list((tmp_path / "out").iterdir())


def test_a_sound_beyond_full_scale_is_made_softer_and_that_is_said(duo_run, sounds, tmp_path, monkeypatch):
    for peak, said in ((2.0, "made 6.0 dB softer"), (1.001, "")):
        monkeypatch.setattr(recompose, "inverse_stft", lambda *_, peak=peak: peak * tones(440, amplitude=1)[None])
        args = ["--slots", "0", "--model", duo_run / "export", "--out", tmp_path / "o.wav"]
        result = run(sounds / "a.wav", *args)
        assert result.exit_code == 0 and said in result.output and ("dB" in result.output) == bool(said)
        assert np.abs(soundfile.read(tmp_path / "o.wav")[0]).max() == pytest.approx(1, abs=1e-3)


def test_a_sound_that_cannot_be_written_ends_in_one_clear_line(duo_run, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(recompose.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    result = run(sounds / "a.wav", "--model", duo_run / "export", "--out", tmp_path / "o.wav")
    assert result.exit_code == 1 and "cannot be written: No space left" in result.output
    assert not list(tmp_path.glob("o.wav*"))


# ---------------------------------------------------------------- Any rate, channels, length


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_all_slots_of_a_long_sound_are_the_sound(duo_run, tmp_path, rate, channels):
    whole, _ = melody(rate, channels, 7.0)
    soundfile.write(tmp_path / "i.wav", whole, rate, subtype="FLOAT")
    back, found = recomposed(tmp_path / "i.wav", "--model", duo_run / "export", out=tmp_path / "o.wav")
    assert found == rate and back.shape == whole.shape
    assert ratio_db(whole, back) > 40


def test_slots_of_a_long_sound_add_up_to_it(duo_run, tmp_path):
    whole, _ = melody(RATE, 1, 7.0)
    soundfile.write(tmp_path / "i.wav", whole, RATE, subtype="FLOAT")
    args = [tmp_path / "i.wav", "--model", duo_run / "export"]
    one, other = (recomposed(*args, "--slots", k, out=tmp_path / "o.wav")[0] for k in (0, 1))
    assert ratio_db(whole, one + other) > 40 and ratio_db(whole, one) < 30


@pytest.mark.parametrize(
    ("samples", "rate", "channels"),
    [(1, 16000, 1), (1, 192000, 1), (64001, 16000, 1), (48000, 192000, 1), (24000, 24000, 8), (9001, 4000, 1)],
)
def test_sounds_of_any_form_come_back_whole(duo_run, tmp_path, samples, rate, channels):
    whole = melody(rate, channels, samples / rate)[0] if samples > 1 else np.full((1, channels), 0.5)
    soundfile.write(tmp_path / "i.wav", whole, rate, subtype="FLOAT")
    back, found = recomposed(tmp_path / "i.wav", "--model", duo_run / "export", out=tmp_path / "o.wav")
    assert found == rate and back.shape == whole.shape == (samples, channels)
    assert ratio_db(whole, back) > 40
    assert Image.open(tmp_path / "o_figure.png").height > 2 * recompose.TILE


def test_rate_and_channels_are_those_of_the_first_input(duo_run, sounds, tmp_path):
    wide, _ = melody(44100, 2, 2.0)
    soundfile.write(tmp_path / "wide.wav", wide, 44100, subtype="FLOAT")
    args = ["--model", duo_run / "export"]
    both, rate = recomposed(tmp_path / "wide.wav", sounds / "b.flac", *args, out=tmp_path / "o.wav")
    assert rate == 44100 and both.shape == (2.5 * 44100, 2)  # b.flac lasts 2.5 s
    np.testing.assert_allclose(both[2 * 44100 :, 0], both[2 * 44100 :, 1], atol=1e-4)
    both, rate = recomposed(sounds / "b.flac", tmp_path / "wide.wav", *args, out=tmp_path / "o.wav")
    assert rate == RATE and both.shape == (40000, 1)
    here, there = (wide[int(0.5 * 44100) : int(1.5 * 44100)].mean(1), both[8000:24000, 0])
    alone = soundfile.read(sounds / "b.flac")[0][8000:24000]
    assert root_mean_square(there - alone) == pytest.approx(root_mean_square(here), rel=0.01)


def test_other_kinds_of_files_are_written_and_read_again(duo_run, sounds, tmp_path):
    whole, _ = melody(44100, 2, 2.3)
    for name, least in (("o.wav", 60), ("o.flac", 60), ("o.ogg", 15), ("o.mp3", 15)):
        recompose.save_sound(tmp_path / name, whole.T, 44100)
        back, rate = recompose.read_sound(tmp_path / name)
        assert rate == 44100 and back.shape == whole.shape and ratio_db(whole, back) > least
    plain, coded = (
        recomposed(sounds / "a.wav", "--model", duo_run / "export", out=tmp_path / name)[0]
        for name in ("plain.wav", "coded.mp3")
    )
    assert plain.shape == coded.shape and 15 < ratio_db(plain, coded) < 60


def test_a_kind_of_file_that_does_not_hold_the_sound_is_refused_in_one_line(duo_run, tmp_path):
    soundfile.write(tmp_path / "i.wav", melody(8000, 3, 0.5)[0], 8000)
    result = run(tmp_path / "i.wav", "--model", duo_run / "export", "--out", tmp_path / "o.mp3")
    refused(result, "no MP3 file has 3 channels at 8000 Hz; write a .wav file", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["i.wav"]


def cut(path, share):
    """A copy of a file's first bytes, for a share of 1 all but its last Ogg page."""
    whole = path.read_bytes()
    end = whole.rfind(b"OggS") if share == 1 else int(share * len(whole))
    (path.parent / f"cut-{path.name}").write_bytes(whole[:end])
    return path.parent / f"cut-{path.name}"


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("i.wav", 0.7, "cut off after 1.05 s"),
        ("i.aiff", 0.7, "cut off after 1.05 s"),
        ("i.caf", 0.7, "damaged"),
        ("i.flac", 0.7, "damaged"),
        ("i.mp3", 0.7, "cut off after 0.9"),
        ("i.ogg", 0.7, "cut off after"),
        ("i.ogg", 0.999, "cut off after"),
        ("i.ogg", 1, "cut off after"),
        ("i.opus", 0.7, "cut off after"),
    ],
)
def test_files_that_are_cut_off_are_refused(tmp_path, name, share, message):
    whole, kind = melody(48000, 1, 1.5)[0], {".opus": ("OGG", "OPUS")}.get(name[1:], (name[2:].upper(), None))
    soundfile.write(tmp_path / name, whole, 48000, format=kind[0], subtype=kind[1])
    assert len(recompose.read_sound(tmp_path / name)[0]) == len(whole)
    result = run(cut(tmp_path / name, share), "--out", tmp_path / "o.wav")
    refused(result, message)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"cut-{name}"}


@pytest.mark.parametrize("fault", ["a stream's, without an end", "the size of the whole file", "of a sampler"])
def test_a_wav_whose_header_is_odd_is_whole(tmp_path, fault):
    whole = melody(48000, 1, 1.5)[0]
    soundfile.write(tmp_path / "i.wav", whole, 48000)
    content = bytearray((tmp_path / "i.wav").read_bytes())
    if fault == "of a sampler":  # a chunk "smpl" that says it has 8 more bytes, as libsndfile's log notes
        chunk = b"smpl" + struct.pack("<I", 36) + struct.pack("<9I", 0, 0, 20833, 60, 0, 0, 0, 0, 8)
        content[36:36] = chunk
        content[4:8] = struct.pack("<I", len(content) - 8)
    elif fault == "the size of the whole file":
        content[4:8] = struct.pack("<I", len(content))
    else:
        content[4:8] = content[40:44] = b"\xff" * 4
    (tmp_path / "i.wav").write_bytes(content)
    with soundfile.SoundFile(tmp_path / "i.wav") as file:
        assert "(should be" in file.extra_info
    assert len(recompose.read_sound(tmp_path / "i.wav")[0]) == len(whole)


# ---------------------------------------------------------------- Windows, and what goes on through them


def test_windows_begin_at_onsets():
    waveform, onsets = melody(RATE, 1, 9.5)
    cuts = recompose.split_at_onsets(waveform[:, 0], RATE, 4.0)
    assert cuts[0] == 0 and cuts[-1] == 9.5
    for onset in onsets[1:]:
        assert min(abs(time - onset) for time in cuts) < 0.03


@pytest.mark.parametrize("seconds", [1 / RATE, 4.0, 4 + 1 / RATE, 4.1, 8.1, 23.4, 61.0])
def test_windows_cover_all_and_are_hardly_longer_than_the_model_hears(seconds):
    n = round(seconds * RATE)
    t, random = np.arange(n) / RATE, np.random.default_rng(n)
    bursts = sum((t > start) * np.exp(-3 * np.maximum(t - start, 0)) for start in random.uniform(0, seconds, 5))
    for waveform in (np.sin(2000 * t), bursts * random.standard_normal(n), 1e-3 * random.standard_normal(n)):
        cuts = recompose.split_at_onsets(waveform, RATE, 4.0)
        lengths = [b - a for a, b in pairwise(cuts)]
        assert cuts[0] == 0 and cuts[-1] == n / RATE and max(lengths) <= 4 + recompose.FADE + 1e-9
        assert len(lengths) == 1 or min(lengths) > 0.29
    assert len(recompose.split_at_onsets(np.sin(2000 * t), RATE, 4.0)) == 1 + max(1, math.ceil(seconds / 4.02))


def instruments(windows, apart, seed=0):
    """Two made-up instruments whose slots swap at random: mu, cell, kl of `follow`, and which slot is the first's."""
    random = np.random.default_rng(seed)
    timbre = np.stack([np.zeros(6), np.full(6, apart)])
    mu = np.concatenate(
        [timbre + 0.3 * random.standard_normal((windows, 2, 6)), random.normal(0, 2, (windows, 2, 2))], 2
    )
    cell = np.stack([random.uniform(-1, 1, (windows, 2)), np.zeros((windows, 2))], axis=2)
    kl = np.stack([random.uniform(30, 60, windows), random.uniform(20, 50, windows)], axis=1)
    first = random.integers(0, 2, windows)
    order = np.stack([first, 1 - first], axis=1)
    mu, cell, kl = (values[np.arange(windows)[:, None], order] for values in (mu, cell, kl))
    return mu.astype(np.float32), cell.astype(np.float32), kl.astype(np.float32), first


def test_slots_go_on_with_the_same_instrument_though_they_swap():
    for seed in range(3):
        mu, cell, kl, first = instruments(40, 1.0, seed)
        order = recompose.follow(mu, cell, kl)
        assert (np.sort(order, axis=1) == [0, 1]).all()
        assert (order[:, 0] == first).all() or (order[:, 0] == 1 - first).all()
        total = np.take_along_axis(kl, order, 1).sum(0)
        assert total[0] >= total[1], "the slots are in falling order of their KL"


def test_a_slot_that_holds_nothing_leaves_the_others_where_they_are():
    mu, cell, kl, first = instruments(40, 1.0)
    silent = np.arange(10, 40, 5)
    mu[silent, 1 - first[silent]], kl[silent, 1 - first[silent]] = -3, 0.1  # of a timbre that is not the second's
    order = recompose.follow(mu, cell, kl)
    assert (order[:, 0] == first).all() or (order[:, 0] == 1 - first).all()


def test_slots_stay_where_they_are_where_timbre_hardly_tells_them_apart():
    for seed in range(3):
        mu, cell, kl, first = instruments(30, 0.2, seed)
        cell[np.arange(30), first], cell[np.arange(30), 1 - first] = (0.25, 0), (-0.5, 0)
        assert (recompose.follow(mu, cell, kl)[:, 0] == first).mean() in (0, 1)
        moving = np.random.default_rng(seed).uniform(-1, 1, cell.shape).astype(np.float32)
        assert (recompose.follow(mu, moving, kl)[:, 0] == first).mean() not in (0, 1)


def test_masks_share_all_and_go_on_beyond_their_highest_bin():
    given = [np.random.default_rng(0).random(shape) for shape in ((3, 9, 4), (9, 4))]
    masks = recompose.soft_masks(*given)
    np.testing.assert_allclose(masks.sum(0), 1)
    wide = recompose.soft_masks(*given, (14, 6))
    assert wide.shape == (3, 14, 6)
    np.testing.assert_allclose(wide.sum(0), 1)
    np.testing.assert_array_equal(wide[:, :9, :4], masks)
    np.testing.assert_allclose(wide[:, 9:, :4], masks[:, 4:].mean(1, keepdims=True).repeat(5, 1))
    np.testing.assert_array_equal(wide[:, :, 4:], wide[:, :, 3:4].repeat(2, 2))
    np.testing.assert_array_equal(recompose.soft_masks(*given, (5, 2)), masks[:, :5, :2])


# ---------------------------------------------------------------- Slots at run time, and edits


def test_a_model_takes_sounds_apart_into_as_many_slots_as_it_is_asked_for(duo_run, sounds, tmp_path):
    args, whole = [sounds / "a.wav", "--model", duo_run / "export"], soundfile.read(sounds / "a.wav", always_2d=True)[0]
    for n in (1, 5):
        back, _ = recomposed(*args, "--n-slots", n, out=tmp_path / "o.wav")
        np.testing.assert_allclose(back, whole, atol=1e-4)
    refused(run(*args, "--n-slots", 1, "--slots", 1, "--out", tmp_path / "o.wav"), "from 0 to 0")


def test_gain_makes_a_slot_so_many_decibels_louder(duo_run, sounds, tmp_path):
    args, out = [sounds / "a.wav", "--model", duo_run / "export"], tmp_path / "o.wav"
    one, other = (recomposed(*args, "--slots", k, out=out)[0] for k in (0, 1))
    changed, _ = recomposed(*args, "--gain", "0:-6", "--gain", "0.1:+7.5", out=out)
    np.testing.assert_allclose(changed, 10 ** (-6 / 20) * one + 10 ** (7.5 / 20) * other, atol=2e-4)


def shift_in_semitones(before, after):
    """By how much a sound is higher than another: where their spectra, over the logarithm of frequency, fit best."""
    steps, frequency = np.arange(-120, 121), 60 * 2 ** (np.arange(1200) / 120)  # tenths of a semitone, from 60 Hz on
    spectra = [np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 2**18)) for sound in (before, after)]
    one, other = (np.interp(frequency, np.fft.rfftfreq(2**18, 1 / RATE), np.log1p(10 * s)) for s in spectra)
    fits = [np.corrcoef(one[120:-120], np.roll(other, -step)[120:-120])[0, 1] for step in steps]
    return steps[int(np.argmax(fits))] / 10


def test_a_transposed_slot_is_so_many_semitones_higher_and_as_loud(tmp_path, monkeypatch):
    args, out = [SHIPPED / "a.flac", "--slots", "1"], tmp_path / "o.wav"
    captions, draw = [], recompose.contact_sheet
    monkeypatch.setattr(recompose, "contact_sheet", lambda *a: captions.append(a[0][-1][0].caption) or draw(*a))
    before, _ = recomposed(*args, out=out)
    after, _ = recomposed(*args, "--transpose", "0.1:-4.5", out=out)
    assert shift_in_semitones(before[:, 0], after[:, 0]) == pytest.approx(-4.5, abs=0.35)
    assert root_mean_square(after) == pytest.approx(root_mean_square(before), rel=0.01)
    assert captions == ["of the framed slots", "of the framed slots; slot 1 -4.5 semitones"]
    assert np.abs(after[:100]).max() < np.abs(after).max() / 2, "Griffin-Lim's click at the beginning is faded out"


# ---------------------------------------------------------------- Mistakes


def test_what_is_no_sound_or_no_edit_is_refused_in_one_line(duo_run, sounds, tmp_path):
    wave = 0.1 * np.sin(np.arange(SAMPLES))
    soundfile.write(tmp_path / "slow.wav", wave, 3999)
    soundfile.write(tmp_path / "fast.wav", wave, 384_000)
    soundfile.write(tmp_path / "silent.wav", 0 * wave, RATE)
    soundfile.write(tmp_path / "opposed.wav", np.stack([wave, -wave], axis=1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", wave[:0], RATE)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(SAMPLES) == 7, np.nan, wave), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "inf.wav", np.where(np.arange(SAMPLES) == 7, np.inf, wave), RATE, subtype="FLOAT")
    (tmp_path / "half.wav").write_bytes((tmp_path / "silent.wav").read_bytes()[:20])
    (tmp_path / "song.mp3").write_bytes(b"ID3 something")
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    given, a = {path.name for path in tmp_path.iterdir()}, sounds / "a.wav"
    for args, message in (
        ([tmp_path / "slow.wav"], "64000 x 1 samples, 3999 Hz; expected at most ten minutes of stereo, 4 to 192 kHz"),
        ([tmp_path / "fast.wav"], "384000 Hz; expected at most ten minutes of stereo, 4 to 192 kHz"),
        ([tmp_path / "silent.wav"], "silent"),
        ([tmp_path / "opposed.wav"], "silent"),
        ([tmp_path / "empty.wav"], "empty"),
        ([tmp_path / "nan.wav"], "samples must be finite"),
        ([tmp_path / "inf.wav"], "samples must be finite"),
        ([tmp_path / "half.wav"], "damaged"),
        ([tmp_path / "none.wav"], "does not exist"),
        ([tmp_path / "song.mp3"], "damaged, or no sound that is read; try ffmpeg -i song.mp3 a.wav"),
        ([tmp_path / "song.m4a"], "damaged, or no sound that is read; try ffmpeg -i song.m4a a.wav"),
        ([a, tmp_path / "nan.wav"], "samples must be finite"),
        ([a, tmp_path / "p.png"], "cannot be recomposed together"),
        ([a, "--slots", "2"], "expected different slots, from 0 to 1"),
        ([a, "--out", tmp_path / "x.png"], "ends in .wav or .flac or .ogg or .mp3"),
        ([a, "--out", a], "would overwrite an input"),
        ([a, "--model", recompose.SHIPPED["mvae-image"]], "expected graphs of kind 'mvae-sound'"),
        ([tmp_path / "p.png", "--vocoder", "--out", tmp_path / "q.png"], "--vocoder is for sounds"),
        ([a, "--move", "0:1,0"], "--move is for pictures"),
        ([a, "--gain", "0"], "--gain 0: expected [I.]K:X, K being a slot of input I (of 0, if left out) that is kept"),
        ([a, "--gain", "0:loud"], "--gain 0:loud: expected [I.]K:X"),
        ([a, "--gain", "0:200"], "numbers within 100"),
        ([a, "--gain", "1.0:3"], "--gain 1.0:3: expected [I.]K:X"),
        ([a, "--slots", "0", "--transpose", "1:3"], "--transpose 1:3: expected [I.]K:X"),
    ):
        result = run(*args, *([] if "--out" in args else ["--out", tmp_path / "o.wav"]))
        refused(result, message)
        assert {path.name for path in tmp_path.iterdir()} == given, args


def test_a_sound_that_is_too_long_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(recompose, "LONGEST", 1000)
    soundfile.write(tmp_path / "i.wav", np.full((501, 2), 0.1), RATE)
    refused(
        run(tmp_path / "i.wav", "--out", tmp_path / "o.wav"), "501 x 2 samples, 16000 Hz; expected at most ten minutes"
    )
    soundfile.write(tmp_path / "i.wav", np.full((500, 2), 0.1), RATE)
    assert recompose.read_sound(tmp_path / "i.wav")[0].shape == (500, 2)


if __name__ == "__main__":
    print(f"GOLDEN = {golden_numbers()}")

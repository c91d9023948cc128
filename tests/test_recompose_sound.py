"""Recomposition of sounds: the same as PyTorch makes, inputs kept whole, every kind of mistake.

After a new export of the shipped model, `python -m tests.test_recompose_sound` prints its GOLDEN numbers.
"""

import math

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from PIL import Image

import recompose
import train_mvae
from tests.experiments.separation import apply_masks

SAMPLES, RATE = 64000, 16000
SHIPPED = recompose.SHIPPED["mvae-sound"]
# Nats of the slots, first those of a.flac; root mean squares x 1000: slot 0 of a with slot 1 of b, and a, b vocoded.
GOLDEN = {"nats": [49.483, 38.881, 68.352, 36.088], "masked": [120.418], "vocoded": [0.637, 0.724]}


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


def test_stft_and_its_inverse_are_those_of_torch():
    waveform = tones(440, 623)
    mine, window = recompose.stft(waveform, 4096, 1024), torch.hann_window(4096, dtype=torch.float64)
    whole = torch.nn.functional.pad(torch.from_numpy(waveform), (0, -SAMPLES % 1024))
    np.testing.assert_allclose(mine, torch.stft(whole, 4096, 1024, window=window, return_complex=True), atol=1e-6)
    np.testing.assert_allclose(recompose.inverse_stft(mine, 4096, 1024, SAMPLES), waveform, atol=1e-6)
    masks = recompose.soft_masks(np.random.default_rng(0).random((3, 20, 5)))
    np.testing.assert_allclose(masks.sum(0), 1)


def golden_numbers():
    """The shipped model's answers on the shipped sounds, as the README's command gives them."""
    names = [SHIPPED / "a.flac", SHIPPED / "b.flac"]
    model = recompose.Model(SHIPPED, "mvae-sound", (*recompose.GRAPHS, "vocoder"))
    waveform = np.stack([recompose.load_sound(path, RATE, SAMPLES) for path in names])
    masked, _, _ = recompose.recompose_sounds(model, names, [[0], [1]], False)
    encoded = model.run("encoder", waveform=waveform)
    layer = model.run("decoder", z=encoded["mu"], cell=encoded["cell"])["layer"]
    vocoded = model.vocode(model.compose(layer))
    loudness = [1e3 * np.sqrt(np.square(sound).mean(-1, keepdims=True)).ravel() for sound in (masked, vocoded)]
    numbers = {"nats": encoded["kl"].flatten(), "masked": loudness[0], "vocoded": loudness[1]}
    return {name: [round(float(value), 3) for value in values] for name, values in numbers.items()}


def test_the_shipped_model_gives_its_golden_numbers():
    found = golden_numbers()
    for name, values in GOLDEN.items():
        np.testing.assert_allclose(found[name], values, rtol=0.01, err_msg=f"now {found}")


def test_all_slots_of_a_sound_are_the_sound(duo_run, sounds, tmp_path):
    for name in ("a.wav", "b.flac"):
        result = run(sounds / name, "--model", duo_run / "export", "--out", tmp_path / name)
        assert result.exit_code == 0 and "2 slots of 1 input;" in result.output, result.output
        whole = soundfile.read(sounds / name)[0]
        back, rate = soundfile.read(tmp_path / name)
        assert rate == RATE and len(back) == SAMPLES
        np.testing.assert_allclose(back[: len(whole)], whole, atol=1e-4)
        assert (tmp_path / f"{name[0]}_figure.png").is_file()


@torch.no_grad()
def test_a_slot_of_each_sound_is_what_pytorch_makes(duo_run, sounds, tmp_path):
    args = [sounds / "a.wav", sounds / "b.flac", "--slots", "1", "--slots", "0", "--model", duo_run / "export"]
    assert run(*args, "--out", tmp_path / "m.wav").exit_code == 0
    model, levels, expected = train_mvae.load(duo_run), train_mvae.SoundLevels(64), 0
    for name, slot in (("a.wav", 1), ("b.flac", 0)):
        waveform = torch.from_numpy(recompose.load_sound(sounds / name, RATE, SAMPLES))[None]
        encoding = model.encode(levels(waveform))
        layer = model.decode(encoding.mu, encoding.cell)
        alone = torch.cat([levels.to_stft_magnitude(model.compose(layer[:, k : k + 1])) for k in range(2)])[None]
        expected = expected + apply_masks(waveform, alone)[0, slot]
    np.testing.assert_allclose(soundfile.read(tmp_path / "m.wav")[0], expected.numpy(), atol=1e-4)
    assert run(*args, "--vocoder", "--out", tmp_path / "v.wav").exit_code == 0
    loud = [np.square(soundfile.read(tmp_path / f"{name}.wav")[0]).mean() for name in "mv"]
    assert loud[1] == pytest.approx(loud[0], rel=0.01)


def test_by_the_vocoder_inputs_keep_their_levels(duo_run, sounds, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(recompose.Model, "vocode", lambda self, shown: heard.append(shown) or np.ones((1, SAMPLES)))
    soft = 1e-3 * soundfile.read(sounds / "b.flac")[0]
    soundfile.write(tmp_path / "soft.wav", soft, RATE, subtype="FLOAT")
    args = ["--vocoder", "--model", duo_run / "export", "--out", tmp_path / "o.wav"]
    one, other = sounds / "a.wav", sounds / "b.flac"
    for inputs in ([one], [one, tmp_path / "soft.wav"], [one, other]):
        assert run(*inputs, *args).exit_code == 0
    alone, with_soft, with_loud = (spectrum.sum() for spectrum in heard)
    assert with_soft == pytest.approx(alone, rel=0.01) and with_loud > 1.3 * alone


def test_a_vocoder_that_gives_nan_writes_nothing(duo_run, sounds, tmp_path, monkeypatch):
    spoilt = np.where(np.arange(SAMPLES) < 9, np.nan, 0.1)[None]
    monkeypatch.setattr(recompose.Model, "vocode", lambda self, spectrum: spoilt)
    result = run(sounds / "a.wav", "--vocoder", "--model", duo_run / "export", "--out", tmp_path / "o.wav")
    assert result.exit_code == 1 and "not finite; nothing is written" in result.output
    assert result.output.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_sound_beyond_full_scale_is_made_softer_and_that_is_said(duo_run, sounds, tmp_path, monkeypatch):
    for peak, said in ((2.0, "made 6.0 dB softer"), (1.001, "")):
        monkeypatch.setattr(recompose, "inverse_stft", lambda *_, peak=peak: peak * tones(440, amplitude=1))
        result = run(sounds / "a.wav", "--model", duo_run / "export", "--out", tmp_path / "o.wav")
        assert result.exit_code == 0 and said in result.output and ("dB" in result.output) == bool(said)
        assert np.abs(soundfile.read(tmp_path / "o.wav")[0]).max() == pytest.approx(1, abs=1e-3)


def test_a_sound_that_cannot_be_written_ends_in_one_clear_line(duo_run, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(recompose.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    result = run(sounds / "a.wav", "--model", duo_run / "export", "--out", tmp_path / "o.wav")
    assert result.exit_code == 1 and "cannot be written: No space left" in result.output
    assert not list(tmp_path.glob("o.wav*"))


def test_what_is_no_sound_for_this_model_is_refused_in_one_line(sounds, tmp_path):
    wave = 0.1 * np.sin(np.arange(SAMPLES))
    soundfile.write(tmp_path / "rate.wav", wave, 44100)
    soundfile.write(tmp_path / "long.wav", np.concatenate([wave, wave]), RATE)
    soundfile.write(tmp_path / "silent.wav", 0 * wave, RATE)
    soundfile.write(tmp_path / "opposed.wav", np.stack([wave, -wave], axis=1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", wave[:0], RATE)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(SAMPLES) == 7, np.nan, wave), RATE, subtype="FLOAT")
    (tmp_path / "half.wav").write_bytes((tmp_path / "long.wav").read_bytes()[:20])
    (tmp_path / "song.mp3").write_bytes(b"ID3 something")
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    for args, message in (
        ([tmp_path / "rate.wav"], "44100 Hz; this model takes 16000 Hz"),
        ([tmp_path / "long.wav"], "8.00 s; this model takes up to 4 s"),
        ([tmp_path / "silent.wav"], "silent"),
        ([tmp_path / "opposed.wav"], "silent"),
        ([tmp_path / "empty.wav"], "empty"),
        ([tmp_path / "nan.wav"], "samples must be finite"),
        ([tmp_path / "half.wav"], "damaged"),
        ([tmp_path / "none.wav"], "no such file"),
        ([tmp_path / "song.mp3", "--out", tmp_path / "o.png"], "nor WAV or FLAC sound"),
        ([sounds / "a.wav", tmp_path / "p.png"], "cannot be recomposed together"),
        ([sounds / "a.wav", "--slots", "2"], "this model has slots 0 to 1"),
        ([sounds / "a.wav", "--out", tmp_path / "x.png"], "ends in .wav or .flac"),
        ([sounds / "a.wav", "--out", sounds / "a.wav"], "would overwrite an input"),
        ([sounds / "a.wav", "--model", recompose.SHIPPED["mvae-image"]], "kind 'mvae-image'; expected 'mvae-sound'"),
        ([tmp_path / "p.png", "--vocoder", "--out", tmp_path / "q.png"], "--vocoder is for sounds"),
    ):
        result = run(*args, *([] if "--out" in args else ["--out", tmp_path / "o.wav"]))
        assert result.exit_code == 2 and message in result.output, (args, result.output)
        assert not (tmp_path / "o.wav").exists()


if __name__ == "__main__":
    print(f"GOLDEN = {golden_numbers()}")

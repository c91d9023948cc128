"""Spectrograms and Griffin-Lim: both forms against torch, torchaudio and librosa, inverses, compression, distances."""

import math

import librosa
import numpy as np
import pytest
import torch
import torchaudio

from common import RATE, Vocoder, log_compress, log_expand, log_spectral_distance, random_generator
from export import GriffinLim, RealSTFT
from train_vae_audio import Spectrogram, spectral_convergence, stft_magnitude


def noise(*shape):
    return torch.randn(*shape, generator=random_generator("noise", *shape))


def chord(samples=16000):
    t = torch.arange(samples) / RATE
    return torch.stack([sum(torch.sin(2 * math.pi * f * h * t) / h for h in range(1, 6)) for f in (110, 330)]) * 0.2


@pytest.mark.parametrize("n_fft", [64, 128, 1024, 4096])
def test_the_stft_in_real_arithmetic_is_that_of_torch(n_fft):
    x = noise(2, 8 * n_fft)
    expected = torch.stft(x, n_fft, n_fft // 4, window=torch.hann_window(n_fft), return_complex=True)
    stft = RealSTFT(n_fft)
    torch.testing.assert_close(stft(x), expected.abs(), atol=1e-3, rtol=1e-3)
    re, im = stft.transform(x).chunk(2, dim=3)
    value = torch.complex(re, stft.sign * im).flatten(2).transpose(1, 2)  # bins above n_fft / 2 are conjugates
    torch.testing.assert_close(value, expected[:, stft.bins], atol=1e-3, rtol=1e-3)
    assert set(stft.bins.tolist()) == set(range(n_fft // 2 + 1))


def test_its_inverse_gives_the_signal_back():
    stft, x = RealSTFT(256), noise(3, 64 * 20)
    back, ones = (stft.inverse(stft.transform(signal)) for signal in (x, torch.ones(1, 64 * 20)))
    torch.testing.assert_close(back / ones, x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_forms_of_griffin_lim_converge_alike_and_well():
    magnitude = stft_magnitude(chord())
    theirs = librosa.griffinlim(magnitude.numpy(), n_iter=32, hop_length=256, momentum=0.99, init=None)
    waveforms = Vocoder(1024)(magnitude), GriffinLim(1024)(magnitude), torch.from_numpy(theirs)
    scores = [spectral_convergence(stft_magnitude(waveform), magnitude) for waveform in waveforms]
    assert (scores[1] < scores[0]).all()
    assert (scores[0] - scores[2]).max() < 1, "librosa's padding differs, and its last dB with it"
    assert scores[0].max() < -12
    one, few = (spectral_convergence(stft_magnitude(GriffinLim(1024, n)(magnitude)), magnitude) for n in (1, 8))
    assert (scores[1] < few).all() and (few < one).all()


@torch.no_grad()
def test_griffin_lim_takes_other_lengths_and_batches_and_silence():
    for frames, batch in ((8, 1), (33, 3)):
        magnitude = noise(batch, 129, frames).abs()
        assert GriffinLim(256, 2)(magnitude).shape == Vocoder(256, 2)(magnitude).shape == (batch, 64 * (frames - 1))
        for silent in (0, frames - 6):  # all of it, or the last six frames
            magnitude[:, :, silent:] = 0
            assert torch.isfinite(GriffinLim(256, 8)(magnitude)).all()
        assert not GriffinLim(256, 2)(torch.zeros_like(magnitude)).any()


def test_compression_inverts():
    magnitude = noise(2, 33, 9).abs() * 50
    torch.testing.assert_close(log_expand(log_compress(magnitude)), magnitude, rtol=1e-4, atol=1e-5)
    assert log_expand(torch.tensor(-3.0)) == 0


def test_mel_bands_are_librosas_and_invert_as_torchaudios():
    waveform, spectrogram = chord(), Spectrogram("mel", 1024, 64)
    bank = librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=64, norm=None)  # Slaney's scale, triangles of height 1
    np.testing.assert_allclose(spectrogram.bank.numpy(), bank, atol=1e-4)
    bands = log_expand(spectrogram(waveform))
    reference = np.stack([
        librosa.feature.melspectrogram(y=w, sr=RATE, n_fft=1024, hop_length=256, power=1, n_mels=64, norm=None,
                                       pad_mode="reflect")
        for w in waveform.numpy()
    ])  # fmt: skip
    np.testing.assert_allclose(bands.numpy(), reference, rtol=1e-3, atol=1e-2)
    inverse = torchaudio.transforms.InverseMelScale(513, 64, RATE, mel_scale="slaney", driver="gelsd")(bands[:, :, ::8])
    torch.testing.assert_close(spectrogram.to_stft_magnitude(bands[:, :, ::8]), inverse, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="too many"):
        Spectrogram("mel", 256, 128)


def test_distances_against_hand_computed_ones():
    reference = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
    assert spectral_convergence(reference * 1.1, reference).item() == pytest.approx(-20, abs=1e-3)
    level = torch.zeros(1, 2, 3)
    ten_times = level + math.log(10)
    assert log_spectral_distance(ten_times, level).item() == pytest.approx(20, abs=1e-3)
    half = level.clone()
    half[:, 0, 0] = math.log(10)  # one of two bins, in one of three frames
    assert log_spectral_distance(half, level).item() == pytest.approx(20 / math.sqrt(2) / 3, abs=1e-3)

"""Spectrograms and Griffin-Lim: both forms against torch and torchaudio, inverses, compression, distances."""

import math

import pytest
import torch
import torchaudio

from common import (
    RATE,
    BlockSTFT,
    GriffinLim,
    Spectrogram,
    griffin_lim,
    log_compress,
    log_expand,
    log_spectral_distance,
    random_generator,
    spectral_convergence,
)


def noise(*shape):
    return torch.randn(*shape, generator=random_generator("noise", *shape))


def chord(samples=16000):
    t = torch.arange(samples) / RATE
    return torch.stack([sum(torch.sin(2 * math.pi * f * h * t) / h for h in range(1, 6)) for f in (110, 330)]) * 0.2


@pytest.mark.parametrize("n_fft", [64, 256, 4096])
def test_the_block_stft_is_that_of_torch(n_fft):
    x = noise(2, 8 * n_fft)
    expected = torch.stft(x, n_fft, n_fft // 4, window=torch.hann_window(n_fft), return_complex=True)
    stft = BlockSTFT(n_fft)
    torch.testing.assert_close(stft.magnitude(x), expected.abs(), atol=1e-4, rtol=1e-4)
    # the phases too, but for the half sample that they count from
    blocks = stft.reflect(torch.nn.functional.pad(stft.to_blocks(x), (0, 0, 2, 2)))
    groups = stft(blocks, stft.matrices()[0])
    value = torch.complex(torch.cat(groups[0::2], 2), torch.cat(groups[1::2], 2)).transpose(1, 2)
    turn = torch.polar(torch.ones(len(stft.bins)), -math.pi / n_fft * stft.bins)
    torch.testing.assert_close(value, expected[:, stft.bins] * turn[:, None], atol=1e-3, rtol=1e-3)


def test_the_inverse_of_the_block_stft_gives_the_signal_back():
    stft, x = BlockSTFT(256), noise(3, 64 * 20)
    blocks = stft.reflect(torch.nn.functional.pad(stft.to_blocks(x), (0, 0, 2, 2)))
    forward, inverse = stft.matrices()
    back = stft.inverse(stft(blocks, forward), inverse) / stft.overlap(torch.zeros(1, 21))
    torch.testing.assert_close(stft.to_waveform(back[:, :, 2:-2]), x, atol=1e-4, rtol=1e-4)


def test_blocks_and_waveforms_are_two_views_of_one_signal():
    stft, x = BlockSTFT(64), noise(2, 16 * 7)
    assert torch.equal(stft.to_waveform(stft.to_blocks(x)), x)
    mirrored = torch.nn.functional.pad(x[:, None], (32, 32), mode="reflect")[:, 0]
    framed = stft.reflect(torch.nn.functional.pad(stft.to_blocks(x), (0, 0, 2, 2)))
    torch.testing.assert_close(stft.to_waveform(framed), mirrored)
    with pytest.raises(ValueError, match="multiple of 8"):
        BlockSTFT(100)


@torch.no_grad()
def test_both_forms_of_griffin_lim_converge_alike_and_well():
    spectrogram = Spectrogram("stft", 1024, 0)
    magnitude = spectrogram.magnitude(chord())
    scores = [
        spectral_convergence(spectrogram.magnitude(waveform), magnitude)
        for waveform in (griffin_lim(magnitude), GriffinLim(1024)(magnitude))
    ]
    torch.testing.assert_close(*scores, atol=0.1, rtol=0)
    assert scores[0].max() < -12
    one, few = (spectral_convergence(spectrogram.magnitude(GriffinLim(1024, n)(magnitude)), magnitude) for n in (1, 8))
    assert (scores[1] < few).all() and (few < one).all()


@torch.no_grad()
def test_griffin_lim_takes_other_lengths_and_batches():
    for frames, batch in ((8, 1), (33, 3)):
        magnitude = noise(batch, 129, frames).abs()
        assert GriffinLim(256, 2)(magnitude).shape == griffin_lim(magnitude, 2).shape == (batch, 64 * (frames - 1))
        assert torch.isfinite(GriffinLim(256, 2)(torch.zeros_like(magnitude))).all()


def test_compression_and_scaling_invert():
    magnitude = noise(2, 33, 9).abs() * 50
    torch.testing.assert_close(log_expand(log_compress(magnitude)), magnitude, rtol=1e-4, atol=1e-5)
    assert log_expand(torch.tensor(-3.0)) == 0
    spectrogram = Spectrogram("stft", 64, 0)
    spectrogram.mean.uniform_(0, 3)
    spectrogram.std.fill_(1.7)
    level = log_compress(magnitude)
    torch.testing.assert_close(spectrogram.unscale(spectrogram.scale(level)), level)


def test_mel_bands_are_torchaudios_and_invert_as_there():
    waveform, spectrogram = chord(), Spectrogram("mel", 1024, 64)
    reference = torchaudio.transforms.MelSpectrogram(
        RATE, 1024, hop_length=256, power=1, n_mels=64, mel_scale="slaney"
    )(waveform)
    bands = log_expand(spectrogram(waveform))
    torch.testing.assert_close(bands, reference, rtol=1e-3, atol=1e-3)
    inverse = torchaudio.transforms.InverseMelScale(513, 64, RATE, mel_scale="slaney", driver="gelsd")(bands[:, :, ::8])
    torch.testing.assert_close(spectrogram.stft_of(bands[:, :, ::8]), inverse, rtol=1e-2, atol=1e-2)
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

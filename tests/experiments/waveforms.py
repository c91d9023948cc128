"""What sound loses in a code of so many values a second: runs of train_vae_audio.py, linear codes, Griffin-Lim.

python -m tests.experiments.waveforms runs/vae-notes-waveform-none-D128-beta0.1-seed0 --data-root nsynth

Of every test note, decoded from posterior means: the log-spectral distance of its sound at n_fft 1024, as in
docs/audio.md; a distance over several resolutions, the mean over n_fft 2048 to 256 of spectral convergence (a ratio)
and of the mean difference of levels (in nats), as Yamamoto et al. 2020; spectral convergence in dB; and SI-SDR (Le Roux
et al. 2019) after the shift of at most 50 ms that correlates most. Step 0 is the start of a run, a PCA. Linear codes
are principal components of single frames of training notes, 62.5 a second, or of whole notes, heard through
Griffin-Lim. The last column is how many principal components of a vector of latents carry 95 % of the variance of
posterior means (Caillon & Esling 2021).
"""

import click
import torch
import torch.nn.functional as F

import train_vae_audio as audio
from common import FOLDER, RATE, SAMPLES, TIMBRES, Vocoder, load_notes, log_compress, log_expand, log_spectral_distance
from train_vae_audio import RESOLUTIONS, Spectrogram, STFTMagnitude, principal, spectral_convergence, stft_magnitude

JUDGED, LEARNT, FRAMES = 500, 1000, 62.5  # test notes; training notes of linear codes; frames a second
COMPONENTS = {"frame": (4, 16, 64, 128), "note": (16, 64)}  # of linear codes
SHIFT = RATE // 20  # samples that sound may be late or early


def multi_resolution(sound, reference):
    """(B, samples) twice -> the distance of each, (B,)."""
    total = 0.0
    for n_fft in RESOLUTIONS:
        a, b = (STFTMagnitude(n_fft)(x) for x in (sound, reference))
        levels = (log_compress(a) - log_compress(b)).abs().mean((1, 2))
        total = total + 10 ** (spectral_convergence(a, b) / 20) + levels
    return total / len(RESOLUTIONS)


def si_sdr(sound, reference):
    """(B, samples) twice -> the scale-invariant ratio of signal to distortion, in dB, at the best shift: (B,)."""
    size = 2 * reference.shape[1]
    spectra = torch.fft.rfft(sound, size), torch.fft.rfft(reference, size)
    correlation = torch.fft.irfft(spectra[0] * spectra[1].conj(), size).roll(SHIFT, 1)[:, : 2 * SHIFT + 1]
    late = correlation.abs().argmax(1) - SHIFT
    pairs = zip(F.pad(sound, (SHIFT, SHIFT)), late.tolist(), strict=True)
    aligned = torch.stack([x[SHIFT + k :][: reference.shape[1]] for x, k in pairs])
    share = (aligned * reference).sum(1, keepdim=True) / reference.square().sum(1, keepdim=True)
    error = (aligned - share * reference).square().sum(1).clamp(min=1e-12)
    return 10 * torch.log10(((share * reference).square().sum(1) / error).clamp(min=1e-6))


@torch.no_grad()
def scores(split, index, sound_of):
    """Means of the distances of `sound_of`(waveforms, numbers) from the notes at `index`, in the table's order."""
    found = []
    for some in index.split(audio.CHUNK):
        waveform = split.waveform(some)
        sound = sound_of(waveform, some)[:, :SAMPLES]
        sound = F.pad(sound, (0, SAMPLES - sound.shape[1]))
        heard, reference = stft_magnitude(sound), stft_magnitude(waveform)
        lsd = log_spectral_distance(log_compress(heard), log_compress(reference))
        rest = multi_resolution(sound, waveform), spectral_convergence(heard, reference), si_sdr(sound, waveform)
        found.append(torch.stack([lsd, *rest]))
    return torch.cat(found, dim=1).mean(1).tolist()


@torch.no_grad()
def carrying(model, split, share=0.95):
    """How many principal components of the vectors of latents carry that share of the variance of posterior means."""
    index, means = split.spread(LEARNT), []
    for some in index.split(audio.CHUNK):
        waveform, label = audio.note_batch(model, split, some)
        mu, _ = model.encode(model.front(waveform), label)
        means.append(mu if mu.ndim == 2 else mu.transpose(1, 2).flatten(0, 1))  # (n, D)
    _, scales, _ = principal(torch.cat(means), model.d)
    carried = scales.square().cumsum(0) / scales.square().sum()
    return int((carried < share).sum()) + 1


def of_run(folder, data_root):
    """Rows of a run and of its start, which saw transposed notes where the run does."""
    model = audio.load(folder)
    splits, _ = audio.load_splits(model.config["options"] | {"data_root": data_root, "download": False})
    start, test = audio.start_at_notes(audio.build(model.config["options"]), splits["train"]).eval(), splits["test"]
    values = f"{torch.tensor(model.latents).prod() / (SAMPLES / RATE):.0f}"
    for name, net in ((folder.name, model), (f"{folder.name}, step 0", start)):

        def sound_of(waveform, some, net=net):
            label = net.label(test.pitch[some], test.family[some])
            return net.sound(net.reconstruct(net.front(waveform), label)[0])

        yield name, values, sound_of, str(carrying(net, splits["train"]))


def of_lines(splits):
    """Rows of linear codes of frames and of whole notes, and, without a code, of what Griffin-Lim makes of the notes'
    own spectrograms."""
    index = splits["train"].spread(LEARNT)
    for name, spectrogram in (("STFT", Spectrogram("stft", 1024, 0)), ("mel", Spectrogram("mel", 1024, 192))):
        vocoder = Vocoder(1024, to_stft_magnitude=spectrogram.to_stft_magnitude)
        for unit, components in COMPONENTS.items():
            notes = (
                spectrogram(splits["train"].waveform(some)).mT for some in index.split(audio.CHUNK)
            )  # (B, T, bins)
            own = torch.cat([level.flatten(0, 1) if unit == "frame" else level.flatten(1) for level in notes])
            mean, _, directions = principal(own, max(components))
            del own
            for k in components:

                def sound_of(waveform, _, few=directions[:, :k], mean=mean, spectrogram=spectrogram, vocoder=vocoder):
                    level = spectrogram(waveform).mT
                    code = (level.reshape(-1, len(mean)) - mean) @ few  # (B T, k) or (B, k)
                    return vocoder(log_expand((code @ few.T + mean).view(level.shape).mT))

                values = k * (FRAMES if unit == "frame" else RATE / SAMPLES)
                yield f"{name}, {k} components a {unit}", f"{values:.0f}", sound_of, ""

        def sound_of(waveform, _, spectrogram=spectrogram, vocoder=vocoder):
            return vocoder(log_expand(spectrogram(waveform)))

        yield f"{name}, Griffin-Lim alone", f"{FRAMES * spectrogram.bins:.0f}", sound_of, ""


@click.command(context_settings={"show_default": True})
@click.argument("runs", nargs=-1, type=FOLDER)
@click.option("--data-root", type=FOLDER, help="NSynth's folders; without, the built-in notes.")
@click.option("--notes", type=click.IntRange(1), default=JUDGED, help="Test notes.")
def main(runs, data_root, notes):
    """Judge RUNS beside linear codes; prints a table."""
    families = audio.load(runs[0]).config["options"]["families"] if runs else list(TIMBRES)
    splits, source = load_notes({"data_root": data_root, "families": families, "download": False})
    rows = []
    for folder in runs:
        config = audio.load(folder).config
        seen = config["data"]["source"], config["options"]["families"]
        if seen != (source, families):
            raise click.UsageError(f"{folder} was trained on {seen}; expected {source}, {families}")
        rows.append(of_run(folder, data_root))
    index = splits["test"].spread(notes)
    click.echo(f"data: {source}; {len(index)} test notes")
    click.echo("| code | values a second | LSD, dB | several resolutions | convergence, dB | SI-SDR, dB | carry 95 % |")
    click.echo("|-|-|-|-|-|-|-|")
    for row in [*rows, of_lines(splits)]:
        for name, values, sound_of, carried in row:
            lsd, several, convergence, ratio = scores(splits["test"], index, sound_of)
            click.echo(
                f"| {name} | {values} | {lsd:.2f} | {several:.3f} | {convergence:.1f} | {ratio:.1f} | {carried} |"
            )


if __name__ == "__main__":
    main()

"""Whether an adversarial second phase pays for a model of waveforms, as RAVE has one (Caillon & Esling 2021).

python -m tests.experiments.adversarial runs/vae-notes-waveform-none-D128-beta0.1-seed0 --data-root nsynth --minutes 10

The encoder is frozen and the decoder trained on for the same minutes, by the objective alone, or with
discriminators of three scales beside it (hinge loss and feature matching, Kumar et al. 2019). Rows: the run, and it
after either. Columns: distances of test notes as tests/experiments/waveforms.py has them, and `told apart`: of test
notes and their reconstructions, seconds of which a new discriminator has learnt to tell apart on training notes, the
share that it calls right; 50 % would be sound that it cannot tell from notes.
"""

import copy
import time

import click
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train_vae_audio as audio
from common import FOLDER, RATE, SAMPLES, load_notes, random_generator
from tests.experiments.waveforms import scores

BATCH, RATES, UPDATES = (
    16,
    (1e-4, 1e-4),
    200,
)  # notes; of decoder and discriminators; updates of the one that tells apart
ADVERSARIAL, MATCHING = 0.1, 1.0  # weights beside the objective, which is in nats a value
TOLD = 128  # test notes told apart


class Scale(nn.Module):
    """A discriminator of one scale: waveforms (B, 1, samples) -> features of every layer, scores last."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv1d(1, 16, 15, padding=7)]
        for a, b in ((16, 64), (64, 128), (128, 256)):
            layers.append(nn.Conv1d(a, b, 41, stride=4, padding=20, groups=a // 4))
        self.layers = nn.ModuleList([*layers, nn.Conv1d(256, 256, 5, padding=2), nn.Conv1d(256, 1, 3, padding=1)])

    def forward(self, x):
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return [*features, self.layers[-1](x)]


class Discriminator(nn.Module):
    """Three scales: waveforms (B, samples) -> for each the features of every layer, scores last."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ModuleList(Scale() for _ in range(3))

    def forward(self, waveform):
        return [scale(F.avg_pool1d(waveform[:, None], 2**k)) for k, scale in enumerate(self.scales)]


def hinge(real, decoded):
    """The discriminator's loss, of what it says of notes and of decoded sound."""
    return sum(F.relu(1 - a[-1]).mean() + F.relu(1 + b[-1]).mean() for a, b in zip(real, decoded, strict=True))


def matching(real, decoded):
    """The mean difference of features, relative to their size: as much for every layer."""
    pairs = [(a.detach(), b) for one, other in zip(real, decoded, strict=True) for a, b in zip(one, other, strict=True)]
    return sum((a - b).abs().mean() / a.abs().mean().clamp(min=1e-4) for a, b in pairs) / len(pairs)


def crops(model, split, key):
    """Random seconds of notes: waveforms (BATCH, model.crop)."""
    generator = random_generator("adversarial", *key)
    index = torch.randint(len(split.notes), (BATCH,), generator=generator)
    begin = torch.randint(SAMPLES - model.crop + 1, (BATCH, 1), generator=generator)
    return split.waveform(torch.tensor(split.usable(index.tolist()))).gather(1, begin + torch.arange(model.crop))


def go_on(model, split, minutes, adversarial):
    """A copy of the model whose decoder is trained on; and in how many steps."""
    model, discriminator = copy.deepcopy(model).train(), Discriminator()
    parts = (model.latent_layer, model.decoder, model.loudness, model.shift)
    decoder = [parameter for part in parts for parameter in part.parameters()]
    optimizers = [torch.optim.Adam(decoder, RATES[0], (0.5, 0.9), eps=1e-6)]
    optimizers.append(torch.optim.Adam(discriminator.parameters(), RATES[1], (0.5, 0.9)))
    start, step = time.perf_counter(), 0
    progress = tqdm(desc="adversarial" if adversarial else "objective alone", disable=None)
    while (spent := (time.perf_counter() - start) / 60 / minutes) < 1:
        x = crops(model, split, (step,))
        with torch.no_grad():
            mu, _ = model.encode(x, None)
        step += 1
        loss = 0.5 * torch.stack([(a - b).square().mean().log() for a, b in model.compared(x, mu, None)]).mean()
        if adversarial:
            decoded = model.decode(mu, None)
            said = hinge(discriminator(x), discriminator(decoded.detach()))
            optimizers[1].zero_grad()
            said.backward()
            optimizers[1].step()
            heard = discriminator(decoded)
            loss = loss + MATCHING * matching(discriminator(x), heard) - ADVERSARIAL * sum(h[-1].mean() for h in heard)
        optimizers[0].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder, audio.CLIP)
        optimizers[0].param_groups[0]["lr"] = RATES[0] * (1 - 0.95 * spent)
        optimizers[0].step()
        progress.update()
    return model.eval(), step


def told_apart(model, splits):
    """The share of notes of the test split, and of their reconstructions, that a new discriminator calls right."""
    torch.manual_seed(0)
    judge = Discriminator()
    optimizer = torch.optim.Adam(judge.parameters(), 3e-4, (0.5, 0.9))
    for step in tqdm(range(UPDATES), desc="judge", disable=None):
        x = crops(model, splits["train"], ("judge", step))
        with torch.no_grad():
            decoded = model.reconstruct(x, None)[0]
        optimizer.zero_grad()
        hinge(judge(x), judge(decoded)).backward()
        optimizer.step()
    right, index = [], splits["test"].spread(TOLD)
    with torch.no_grad():
        for some in index.split(audio.CHUNK):
            x = splits["test"].waveform(some)
            for sound, sign in ((x, 1), (model.reconstruct(x, None)[0], -1)):
                said = judge(sound[:, : 2 * RATE])
                right.append(sign * sum(s[-1].mean((1, 2)) for s in said) > 0)
    return torch.cat(right).float().mean().item()


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option("--data-root", type=FOLDER, help="NSynth's folders that the run was trained on; none: built-in notes.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, help="Of either second phase.")
@click.option("--notes", type=click.IntRange(1), default=100, help="Test notes of the distances.")
def main(run_dir, data_root, minutes, notes):
    """Train the decoder of a run of waveforms without a label on, in two ways; prints a table."""
    model = audio.load(run_dir)
    if not isinstance(model, audio.WaveVAE) or model.condition != "none":
        raise click.UsageError(f"{run_dir} is no run of waveforms without a label")
    families = model.config["options"]["families"]
    splits, source = load_notes({"data_root": data_root, "families": families, "download": False})
    index = splits["test"].spread(notes)
    click.echo(f"data: {source}; {len(index)} test notes; {minutes:g} minutes")
    click.echo(
        "| | steps | LSD, dB | several resolutions | convergence, dB | SI-SDR, dB | told apart |\n|-|-|-|-|-|-|-|"
    )
    for name, adversarial in (("the run", None), ("objective alone", False), ("adversarial", True)):
        torch.manual_seed(0)
        net, steps = (model, "") if adversarial is None else go_on(model, splits["train"], minutes, adversarial)
        lsd, several, convergence, ratio = scores(
            splits["test"], index, lambda x, _, net=net: net.reconstruct(x, None)[0]
        )
        told = told_apart(net, splits)
        click.echo(f"| {name} | {steps} | {lsd:.2f} | {several:.3f} | {convergence:.1f} | {ratio:.1f} | {told:.1%} |")


if __name__ == "__main__":
    main()

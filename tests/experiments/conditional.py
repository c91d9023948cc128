"""Whether samples have one pitch each, and of a conditional run the pitch and the family that they are asked for.

python -m tests.experiments.conditional runs/vae-notes-stft-both-D16-beta100-seed0 --data-root nsynth

One pitch: YIN's periodicity is above that of the least periodic tenth of real notes of the test split, of which 90 %
have it thereby. Pitch: within 50 cents, by YIN. Family: agreement of a classifier trained on the run's training notes.
Columns: samples from the fitted prior and from N(0, I), of the trained model and of its start (step 0: the PCA that
training sets out from, its prior fitted as well); and real notes of the test split, which say how far the judges can be
trusted.
"""

from functools import partial

import click
import torch

import train_vae_audio as audio
from common import FOLDER, random_generator
from tests.experiments.judges import HIGHEST_PITCH, LOWEST_PITCH, train_classifier, yin

JUDGED = 500  # samples, and at most as many real notes


def sampled_sounds(model, pitch, family, fitted):
    """Samples with labels pitch and family (n,), a chunk at a time: (waveforms (B, samples), pitch, family)."""
    for k, label in enumerate(zip(pitch.split(audio.CHUNK), family.split(audio.CHUNK), strict=True)):
        yield model.sound(audio.sample(model, *label, "judged", k, fitted=fitted)), *label


def real_notes(split, index):
    for some in index.split(audio.CHUNK):
        yield split.waveform(some), split.pitch[some], split.family[some]


@torch.no_grad()
def judge(notes, classifier, least):
    """(waveforms, pitch, family) of many chunks -> shares of notes of one pitch, and, with a classifier, of pitches
    within 50 cents and of families agreed on."""
    single, within, agreed = [], [], []
    for waveform, pitch, family in notes:
        can = (pitch >= LOWEST_PITCH) & (pitch <= HIGHEST_PITCH)
        found, periodicity = yin(waveform).unbind(1)
        single.append(periodicity > least)
        within.append((found - pitch)[can].abs() < 0.5)
        agreed.append(classifier(waveform) == family if classifier else torch.zeros(0))
    shares = {"one pitch": single, "pitch within 50 cents": within, "family agreement": agreed}
    kept = list(shares)[: 3 if classifier else 1]
    return {name: torch.cat(shares[name]).float().mean().item() for name in kept}


def judge_run(folder, data_root, samples):
    """{column: scores} of a run folder; raises click.UsageError where it is no run on those notes."""
    model = audio.load(folder)
    options = model.config["options"] | {"data_root": data_root, "download": False}
    splits, source = audio.load_splits(options)
    if source != model.config["data"]["source"]:
        raise click.UsageError(f"{folder} was trained on {model.config['data']['source']}; --data-root gives {source}")
    train, test = splits["train"], splits["test"]
    start = audio.start_at_notes(audio.build(options), train).eval()
    audio.fit_prior(start, train)
    asked = torch.randint(len(train.notes), (samples,), generator=random_generator("asked"))
    label = train.pitch[asked], train.family[asked]
    columns = {
        "fitted prior": sampled_sounds(model, *label, fitted=True),
        "N(0, I)": sampled_sounds(model, *label, fitted=False),
        "step 0, fitted prior": sampled_sounds(start, *label, fitted=True),
        "step 0, N(0, I)": sampled_sounds(start, *label, fitted=False),
        "real notes": real_notes(test, test.spread(samples)),
    }
    classifier = train_classifier(train, len(options["families"])) if options["condition"] == "both" else None
    periodicity = torch.cat([yin(waveform)[:, 1] for waveform, *_ in real_notes(test, test.spread(samples))])
    scores = partial(judge, classifier=classifier, least=periodicity.quantile(0.1))
    return {name: scores(notes) for name, notes in columns.items()}


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option(
    "--data-root", type=FOLDER, help="NSynth's folders that the run was trained on; none: the built-in notes."
)
@click.option("--samples", type=click.IntRange(1), default=JUDGED, help="Samples of each kind, and real notes.")
def main(run_dir, data_root, samples):
    """Judge the samples of a conditional run of train_vae_audio.py; prints a table."""
    columns = judge_run(run_dir, data_root, samples)
    click.echo(f"| | {' | '.join(columns)} |\n|-|{'-|' * len(columns)}")
    for name in next(iter(columns.values())):
        click.echo(f"| {name} | {' | '.join(f'{scores[name]:.1%}' for scores in columns.values())} |")


if __name__ == "__main__":
    main()

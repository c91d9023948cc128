"""Whether samples of a conditional run have the pitch and the family that they are asked for.

python -m tests.experiments.conditional runs/vae-notes-stft-both-D16-beta100-seed0 --data-root nsynth

Pitch: within 50 cents, by YIN. Family: agreement of a classifier trained on the run's training notes. Columns: samples
from the fitted prior and from N(0, I), of the trained model and of its start (step 0: the PCA that training sets out
from, its prior fitted as well); and real notes of the test split, which say how far the judges can be trusted.
"""

import click
import torch

import train_vae_audio as audio
from common import FOLDER, random_generator
from tests.experiments.judges import HIGHEST_PITCH, LOWEST_PITCH, detect_pitch, train_classifier

JUDGED = 500  # samples, and at most as many real notes


def sampled_sounds(model, pitch, family, fitted):
    """Samples with labels pitch and family (n,), a chunk at a time: (waveforms (B, samples), pitch, family)."""
    for k, label in enumerate(zip(pitch.split(audio.CHUNK), family.split(audio.CHUNK), strict=True)):
        level = audio.sample(model, *label, "judged", k, fitted=fitted)
        yield audio.sound(model, level), *label


def real_notes(split, index):
    for some in index.split(audio.CHUNK):
        yield split.waveform(some), split.pitch[some], split.family[some]


@torch.no_grad()
def judge(notes, classifier):
    """(waveforms, pitch, family) of many chunks -> shares of pitches within 50 cents, and of families agreed on."""
    within, agreed = [], []
    for waveform, pitch, family in notes:
        can = (pitch >= LOWEST_PITCH) & (pitch <= HIGHEST_PITCH)
        within.append((detect_pitch(waveform[can]) - pitch[can]).abs() < 0.5)
        agreed.append(classifier(waveform) == family)
    return {
        "pitch within 50 cents": torch.cat(within).float().mean().item(),
        "family agreement": torch.cat(agreed).float().mean().item(),
    }


def judge_run(folder, data_root, samples):
    """{column: scores} of a run folder; raises click.UsageError where it is no conditional run on those notes."""
    model = audio.load(folder)
    options = model.config["options"] | {"data_root": data_root, "download": False}
    if options["condition"] != "both":
        raise click.UsageError(f"{folder} is a run with --condition {options['condition']}; expected both")
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
    classifier = train_classifier(train, len(options["families"]))
    return {name: judge(notes, classifier) for name, notes in columns.items()}


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

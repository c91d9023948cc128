"""Whether samples have one pitch each, and of a conditional run the pitch and the family that they are asked for.

python -m tests.experiments.conditional runs/vae-notes-stft-both-D16-beta100-seed0 --data-root nsynth

One pitch: YIN's periodicity is above that of the least periodic tenth of real notes of the test split, of which 90 %
have it thereby. Pitch: within 50 cents, by YIN. Family: agreement of a classifier trained on the run's training notes.
Columns: samples from the fitted prior, from one Gaussian fitted to the same notes, and from N(0, I); what is decoded
from posterior means of test notes; samples of the model's start (step 0: the PCA that training sets out from, its prior
fitted as well); and real notes of the test split, which say how far the judges can be trusted. Log p: of test notes'
latents, one draw of every posterior, under what the column's samples are from, in nats (of a waveform's latents, of the
principal components that the fitted prior knows).
"""

import copy
import math
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


def encoded(model, split, index):
    """Posteriors of notes, a chunk at a time: (mu, logvar, label)."""
    for some in index.split(audio.CHUNK):
        waveform, label = audio.note_batch(model, split, some)
        yield *model.encode(model.front(waveform), label), label


def reconstructed(model, split, index):
    """What is decoded from posterior means, a chunk at a time: (waveforms (B, samples), pitch, family)."""
    for some, (mu, _, label) in zip(index.split(audio.CHUNK), encoded(model, split, index), strict=True):
        yield model.sound(model.decode(mu, label)), split.pitch[some], split.family[some]


def scores_of(model, split, index):
    """Posterior means and variances of notes in the fitted prior's coordinates: two of (n, d)."""
    mu, logvar = (torch.cat(part).flatten(1) for part in list(zip(*encoded(model, split, index), strict=True))[:2])
    return (mu - model.prior.typical) @ model.prior.directions, logvar.exp() @ model.prior.directions.square()


@torch.no_grad()
def one_gaussian(model, split):
    """The model with the likeliest Gaussian of the notes' latents instead of one around each of them."""
    model, (scores, variance) = copy.deepcopy(model), scores_of(model, split, split.spread(audio.EXEMPLARS))
    model.prior.scores[:] = scores.mean(0)
    model.prior.factor[:] = torch.linalg.cholesky(scores.T.cov(correction=0) + variance.mean(0).diag())
    return model


def standard(prior):
    """N(0, I) in the coordinates of a fitted prior."""
    normal = audio.ExemplarPrior((prior.d,), conditional=False)
    normal.scores[:] = -prior.typical @ prior.directions
    return normal


def log_prob(prior, z, pitch, family):
    """log p(z | y) in nats of z in the coordinates of a fitted prior, (n, d) -> (n,)."""
    white = (torch.linalg.solve_triangular(prior.factor, x.T, upper=False).T for x in (z, prior.scores))
    weight = prior.log_weights(pitch * prior.conditional, family * prior.conditional).log_softmax(1)
    constant = prior.factor.diagonal().log().sum() + prior.d / 2 * math.log(2 * math.pi)
    return (weight - 0.5 * torch.cdist(*white).square()).logsumexp(1) - constant


@torch.no_grad()
def mean_log_prob(model, priors, split, index):
    """{name: mean log p(z | y) in nats} by priors {name: prior} of z, a draw from the posterior of each note."""
    mean, variance = scores_of(model, split, index)
    z = mean + variance.sqrt() * torch.randn(mean.shape, generator=random_generator("latents"))
    label = split.pitch[index], split.family[index]
    return {name: log_prob(prior, z, *label).mean().item() for name, prior in priors.items()}


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
    """{column: {score: text}} of a run folder; raises click.UsageError where it is no run on those notes."""
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
    index = test.spread(samples)
    gaussian = one_gaussian(model, train)
    columns = {
        "fitted prior": sampled_sounds(model, *label, fitted=True),
        "one Gaussian": sampled_sounds(gaussian, *label, fitted=True),
        "N(0, I)": sampled_sounds(model, *label, fitted=False),
        "reconstructions": reconstructed(model, test, index),
        "step 0, fitted prior": sampled_sounds(start, *label, fitted=True),
        "step 0, N(0, I)": sampled_sounds(start, *label, fitted=False),
        "real notes": real_notes(test, index),
    }
    classifier = train_classifier(train, len(options["families"])) if options["condition"] == "both" else None
    periodicity = torch.cat([yin(waveform)[:, 1] for waveform, *_ in real_notes(test, index)])
    scores = partial(judge, classifier=classifier, least=periodicity.quantile(0.1))
    judged = {name: {k: f"{share:.1%}" for k, share in scores(notes).items()} for name, notes in columns.items()}
    known = {"fitted prior": model.prior, "one Gaussian": gaussian.prior, "N(0, I)": standard(model.prior)}
    start_knows = {"step 0, fitted prior": start.prior, "step 0, N(0, I)": standard(start.prior)}
    nats = mean_log_prob(model, known, test, index) | mean_log_prob(start, start_knows, test, index)
    for name, value in nats.items():
        judged[name]["log p, nats"] = f"{value:.1f}"
    return judged


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
        click.echo(f"| {name} | {' | '.join(scores.get(name, '') for scores in columns.values())} |")


if __name__ == "__main__":
    main()

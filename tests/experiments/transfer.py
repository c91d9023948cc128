"""A CLEVR run on scenes that it was not trained on: other data, other numbers of objects, other numbers of slots.

    python -m tests.experiments.transfer runs/mvae-clevr-alpha-N6-seed0 --objects 7 10 --n-slots 10   # built-in scenes
    python -m tests.experiments.transfer runs/mvae-clevr-alpha-N6-seed0 --data-root CLEVR_v1.0

Prints the scores of a test split, of the trained model and of the same at step 0, as a table's rows.
"""

from pathlib import Path

import click
import torch

import train_mvae
from common import FOLDER
from tests.experiments.slots import load_run, load_start, score_masks

SCORES = ("ari_fg", "ari_fg_slots", "miou", "slot_count_error", "duplicates", "mse", "mse_baseline")


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=FOLDER)
@click.option("--data-root", type=FOLDER, show_default="built-in scenes", help="CLEVR's folder, with masks.")
@click.option("--trained-on", type=FOLDER, help="The run's data, where they are not where its config.json has them.")
@click.option("--objects", type=click.IntRange(1, 10), nargs=2, default=(3, 6), help="In a scene: fewest, and most.")
@click.option("--n-slots", type=click.IntRange(1), show_default="as in training")
@click.option("--scenes", type=click.IntRange(1), default=train_mvae.SCENES)
def main(run_dir, data_root, trained_on, objects, n_slots, scenes):
    """Score RUN_DIR, a run of train_mvae.py on CLEVR, on other scenes."""
    model, own = load_run(run_dir, trained_on)
    options = model.config["options"]
    if options["dataset"] != "clevr":
        raise click.UsageError(f"{run_dir}: a run on {options['dataset']}; expected one on CLEVR")
    asked = options | {"data_root": data_root and Path(data_root), "objects": objects, "download": False}
    data = train_mvae.load_data(asked, torch.device("cpu"))
    click.echo(f"{data.source}, {objects[0]} to {objects[1]} objects, test split\n| | {' | '.join(SCORES)} |")
    click.echo("|-" * (len(SCORES) + 1) + "|")
    for name, one in (("trained", model), ("step 0", load_start(model, own))):
        one.n_slots = n_slots or one.n_slots
        found = train_mvae.evaluate_pictures(one, data, "test", scenes, options["sigma"])
        found |= score_masks(one, data, "test", scenes)
        values = (f"{found[score]:.5f}" if score in found else "" for score in SCORES)
        click.echo(f"| {name}, {one.n_slots} slots, {found['scenes']} scenes | {' | '.join(values)} |")


if __name__ == "__main__":
    main()

"""Seconds of one training step, stage by stage, on built-in data, in the checkout that it is run from.

    python -m tests.benchmarks.steps
    cd ANOTHER_CHECKOUT && python .../tests/benchmarks/steps.py --digits .../data    # the same of another commit

Runs the real commands; a hook that PyTorch calls after every step of an optimizer takes the time from one to the next,
so it knows nothing of the scripts. The first steps are left out: notes are synthesised and read in them. The median of
the rest leaves out the steps in which scenes are drawn; the mean has them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

COMMANDS = {
    "MNIST conv": "train_vae_mnist.py --arch conv --channels 16 --D 32 --batch 100",
    "notes": "train_vae_audio.py --D 16",
    "sprites": "train_mvae.py --dataset sprites",
    "CLEVR": "train_mvae.py --dataset clevr",
    "duo": "train_mvae.py --dataset nsynth-duo"
}  # fmt: skip
# Runs a script, notes when every step ends, and leaves after so many with what was noted as the last line.
TIMED = """
import json, os, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
count, ends = int(sys.argv[1]), []
def note(*_):
    ends.append(time.perf_counter())
    if len(ends) == count:
        print(json.dumps([b - a for a, b in zip(ends, ends[1:])]), flush=True)
        os._exit(0)
register_optimizer_step_post_hook(note)
sys.path.insert(0, os.getcwd())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def step_times(command, skip, steps, quick):
    """Seconds of so many steps, after the first `skip`; raises click.ClickException where the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        # Many steps: no tenth of the run, when it is scored and saved, is among those timed.
        words = [*command.split(), "--steps", 100 * (skip + steps), *quick, "--device", "cpu", "--out", f"{folder}/run"]
        process = [sys.executable, "-c", TIMED, *map(str, (skip + steps + 1, *words))]
        result = subprocess.run(process, capture_output=True, text=True)
    if result.returncode:
        raise click.ClickException(f"{command}: {result.stderr[-500:]}")
    return sorted(json.loads(result.stdout.splitlines()[-1])[skip:])


@click.command(context_settings={"show_default": True})
@click.option("--skip", type=int, default=150, help="Steps that are left out.")
@click.option("--steps", type=click.IntRange(1), default=30, help="Steps that are timed.")
@click.option("--only", default="", help="Stages whose name contains it.")
@click.option("--digits", type=click.Path(path_type=Path), help="Folder of MNIST; by default it is fetched into data/.")
def main(skip, steps, only, digits):
    """Time one training step of every stage, in the current folder's checkout."""
    # Scores at step 0 would take minutes; older checkouts have no such scores.
    quick = ["--eval", "quick"] if '"--eval"' in Path("common.py").read_text() else []
    click.echo("| one step, ms | median | mean |\n|-|-|-|")
    for name, command in COMMANDS.items():
        if only in name:
            root = f" --data-root {digits.absolute()}" if digits and "mnist" in command else ""
            times = step_times(command + root, skip, steps, quick)
            click.echo(f"| {name} | {1000 * times[len(times) // 2]:.1f} | {1000 * sum(times) / len(times):.1f} |")


if __name__ == "__main__":
    main()

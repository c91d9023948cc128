"""Every command in the README, the docs and the docstrings is parsed by the command line it names."""

import re
import shlex
from pathlib import Path

import pytest

import common
import export
import recompose
import train_mvae
import train_vae_audio
import train_vae_mnist

ROOT = Path(common.__file__).parent
COMMANDS = {
    "train_vae_mnist.py": train_vae_mnist.main,
    "train_vae_audio.py": train_vae_audio.main,
    "train_mvae.py": train_mvae.main,
    "export.py": export.main,
    "recompose.py": recompose.main,
}
SOURCES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.py")]


def documented_commands():
    """(where, script, arguments) of every line `... X.py ...` that is written to be typed."""
    for source in SOURCES:
        for line in source.read_text().splitlines():
            found = re.match(r"\s*(?:[A-Z_]+=\d+ )*(?:python|torchrun --\S+) (\w+\.py)(.*)$", line)
            if found:
                arguments = shlex.split(found[2], comments=True)
                yield pytest.param(found[1], arguments, id=f"{source.name}: {found[1]} {' '.join(arguments)}")


COMMANDS_FOUND = list(documented_commands())


def test_there_are_commands_to_check():
    assert len(COMMANDS_FOUND) > 15


@pytest.mark.parametrize(("script", "arguments"), COMMANDS_FOUND)
def test_a_documented_command_parses(script, arguments, monkeypatch):
    monkeypatch.setattr(common, "load_config", lambda folder: {"options": {}})
    COMMANDS[script].make_context(script, list(arguments))


def test_every_file_the_readme_links_to_is_there():
    for source in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", source.read_text()):
            assert (source.parent / target).exists(), f"{source.name} links to {target}"

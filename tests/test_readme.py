"""The texts: commands are parsed by what they name, links lead somewhere, lines are short; who may import whom."""

import ast
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

import common
import export
import recompose
import train_mvae
import train_vae_audio
import train_vae_mnist

ROOT = Path(common.__file__).parent
SCRIPTS = {
    "train_vae_mnist.py": train_vae_mnist,
    "train_vae_audio.py": train_vae_audio,
    "train_mvae.py": train_mvae,
    "export.py": export,
    "recompose.py": recompose,
}
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("models/*/README.md"))]
CODE = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("tests/**/*.py"))]
COMMAND = re.compile(
    r"""\s*(?:[A-Z_]+=\S+\ )*                                   # OMP_NUM_THREADS=1
    (?:(?:python|torchrun(?:\ +--\S+)+|uv\ run)\ +(\w+\.py)     # python train_mvae.py, torchrun --nproc-per-node=2 ...
    |python\ -m\ (tests\.(?:experiments|benchmarks)\.\w+))      # python -m tests.experiments.beta
    (\s.*)?$""",
    re.VERBOSE,
)


def typed_lines(path):
    """Lines that may be commands: of the code blocks of a text, but those marked as of an older commit (```old), and
    the docstring of a module."""
    if path.suffix == ".py":
        yield from (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        return
    block = None
    for line in path.read_text().replace("\\\n", " ").splitlines():  # a backslash at the end goes on
        if line.startswith("```"):
            block = None if block is not None else line[3:].strip()
        elif block is not None and block != "old":
            yield line


def documented_commands():
    for path in TEXTS + CODE:
        for line in typed_lines(path):
            found = COMMAND.match(line)
            if found:
                arguments = shlex.split(found[3] or "", comments=True)
                what = found[1] or found[2]
                yield pytest.param(what, arguments, id=f"{path.relative_to(ROOT)}: {what} {' '.join(arguments)}")


COMMANDS = list(documented_commands())


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 25
    assert {what for what, _ in (command.values for command in COMMANDS)} >= set(SCRIPTS)


@pytest.mark.parametrize(("what", "arguments"), COMMANDS)
def test_a_documented_command_is_one_that_would_start(what, arguments, monkeypatch, tmp_path):
    """It is parsed, and its options go together; where it names a folder of data, a run or an input, one is there."""
    script = SCRIPTS.get(what) or importlib.import_module(what)
    if not isinstance(script.main, click.Command):  # it takes no arguments
        assert not arguments
        return
    run = {"script": Path(what).stem, "options": {"steps": 100}, "data": {}, "history": []}
    monkeypatch.setattr(common, "load_config", lambda folder: run)
    monkeypatch.chdir(tmp_path)
    for option, value in itertools.pairwise(arguments):
        if option in ("--data-root", "--node-modules"):
            (tmp_path / value).mkdir()
        if option == "--sound":
            (tmp_path / value).touch()
    if what == "tests.experiments.runtimes":  # of an exported folder
        (tmp_path / arguments[0]).mkdir(parents=True)
    for value in arguments if what == "recompose.py" else ():
        if Path(value).suffix in (".png", ".jpg", *recompose.SOUNDS):
            (tmp_path / value).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / value).touch()
    with script.main.make_context(what, arguments) as context:
        if hasattr(script.main, "foreign"):  # a training script
            common.settle_options(context, context.params)
            getattr(script, "check_options", lambda options: None)(context.params)


def test_every_file_that_a_text_links_to_is_there():
    for path in TEXTS:
        for target in re.findall(r"\]\((?!http)([^)#\s]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", TEXTS + CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_have_at_most_120_characters(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [f"{number}: {len(line)}" for number, line in lines if len(line) > 120]


# ---------------------------------------------------------------- The house

LIMITS = {
    "recompose": 600, "common": 800, "train_vae_mnist": 450, "train_vae_audio": 850, "train_mvae": 1150, "export": 400,
}  # fmt: skip
MAY_IMPORT = {"recompose": set(), "common": {"recompose"}, "export": {"common"}}


def test_every_file_is_one_that_a_person_reads_in_one_sitting():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in LIMITS}
    assert {path.stem for path in ROOT.glob("*.py")} == set(LIMITS)
    assert all(lines[name] <= LIMITS[name] for name in LIMITS), lines


@pytest.mark.parametrize("name", LIMITS)
def test_imports_follow_the_rules_of_the_house(name):
    """recompose imports nothing of ours, common only it, a training script these two, export only common by name."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found & {*LIMITS, "tests"} <= MAY_IMPORT.get(name, {"common", "recompose"})


def test_recompose_needs_little():
    """What its own inline metadata lists, for `uv run` (PEP 723), is all it imports beside the standard library."""
    text = (ROOT / "recompose.py").read_text()
    header = re.search(r"^# /// script\n(.*?)^# ///$", text, re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r'"([\w-]+)', re.search(r"dependencies = \[(.*?)\]", header[1], re.DOTALL)[1]))
    assert listed == {"numpy", "scipy", "pillow", "click", "soundfile", "soxr", "onnxruntime"}
    names = set(re.findall(r'import_module\("(\w+)', text))
    for node in ast.walk(ast.parse(text)):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    names = {name.split(".")[0].replace("PIL", "pillow") for name in names}
    assert names - sys.stdlib_module_names == listed

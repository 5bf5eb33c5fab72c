"""What README.md and the pages of docs/ show works: their Python runs, changes are programs on both sides, commands and
options exist, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import yaml

import pages

pytestmark = pytest.mark.one_stack

ROOT = pages.ROOT
TEXTS = {pages.name_of(page): page.read_text(encoding="utf-8") for page in pages.PAGES}
BLOCKS = {name: pages.blocks_of(text) for name, text in TEXTS.items()}
RUN = [name for name, blocks in BLOCKS.items() if {"python", "diff"} & {block.language for block in blocks}]
COMMANDS = [
    (f"{name}:{block.line}", command)
    for name, blocks in BLOCKS.items()
    for block in blocks
    if block.language == "bash"
    for command in pages.commands_of(block)
]
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not any(p[0] == "." for p in path.relative_to(ROOT).parts))
IN_TEXT = [
    *TEXTS.values(),
    *((ROOT / name / "README.md").read_text("utf-8") for name in ("launch", "k8s", "benchmarks")),
]
USES = {use for _, command in COMMANDS for use in pages.uses_of(command)}.union(*map(pages.uses_in_text, IN_TEXT))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What running all pages in one process gave: the error of each, and the help of our Python programs."""
    folder = tmp_path_factory.mktemp("pages")
    programs = sorted({program for program, *_ in USES if program.endswith(".py")})
    runner = [sys.executable, ROOT / "tests" / "docs" / "run_pages.py", folder / "results.json"]
    done = subprocess.run(
        [*map(str, runner), *(str(ROOT / name) for name in RUN), "--help-of", *programs],
        cwd=folder,  # what pages write goes there
        env={**pages.SETTINGS, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=580,
    )
    found = json.loads((folder / "results.json").read_text("utf-8")) if (folder / "results.json").exists() else {}
    return {"errors": {}, "help": {}, **found, "output": done.stdout[-3000:] + done.stderr[-6000:]}


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_is_of_a_known_language(name):
    assert len(BLOCKS[name]) == len(re.findall(r"^ *```", TEXTS[name], re.MULTILINE)) / 2
    assert {block.language for block in BLOCKS[name]} <= pages.LANGUAGES


@pytest.mark.timeout(600)  # of all pages, which the first test runs
@pytest.mark.parametrize("name", RUN)
def test_python_runs(name, results):
    assert name in results["errors"], f"the process ended before this page:\n{results['output']}"
    error = results["errors"][name]
    if "No module named 'horovod'" in error and not os.environ.get("DISTPAD_CI"):
        pytest.skip("Horovod is not installed")
    assert not error, error


DIFFS = [(name, block) for name, blocks in BLOCKS.items() for block in blocks if block.language == "diff"]


@pytest.mark.parametrize(("name", "block"), DIFFS, ids=[f"{name}:{block.line}" for name, block in DIFFS])
def test_both_sides_of_a_change_are_programs(name, block):
    for sign in "-+":
        ast.parse(textwrap.dedent(pages.side_of(block.text, sign)), f"{name}:{block.line} ({sign})")


@pytest.mark.parametrize("name", TEXTS)
def test_configurations_parse(name):
    for block in BLOCKS[name]:
        if block.language in ("yaml", "json"):
            list(yaml.safe_load_all(block.text))


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "command"), COMMANDS, ids=[f"{at} {shlex.join(words)[:60]}" for at, words in COMMANDS])
def test_programs_exist(at, command):
    command = pages.without_settings(command)
    for place in range(len(command)):
        pages.program_of(command[place:])
    if not command or command[0] in pages.PROGRAMS or command[0] == "distpad":
        return
    path = ROOT / command[0]
    assert path.is_file(), f"{command[0]} is neither a file of this project nor a known program"
    assert os.access(path, os.X_OK), f"{command[0]} is not executable"


@pytest.mark.timeout(600)  # of all pages, which the first test runs
@pytest.mark.parametrize("use", sorted(USES), ids=" ".join)
def test_options_exist(use, results):
    program, subcommand, option = use
    text = results["help"].get(program) or pages.help_of(program, subcommand)
    assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{program} --help does not know {option}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_the_text_names_exist(name):
    named = re.findall(
        r"`(?:\./)?((?:benchmarks|distpad|docs|examples|k8s|launch|tests)/[\w./-]+)`", pages.without_blocks(TEXTS[name])
    )
    assert not [path for path in named if not (ROOT / path).exists()]


# -- links and the site -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=pages.name_of)
def test_links_lead_somewhere(document):
    broken = []
    for link in pages.links_of(document.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and not pages.has_anchor(target.read_text(encoding="utf-8"), anchor)):
            broken.append(link)
    assert not broken


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=pages.SETTINGS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\"\s>]+)", page.read_text("utf-8"))
        loaded += re.findall(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect)\"?[^>]*https?:[^>]+>", page.read_text("utf-8")
        )
        assert not loaded, f"{page.relative_to(tmp_path)} loads {loaded}"

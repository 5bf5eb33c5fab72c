"""What README.md shows works: its Python runs, its commands and options exist, its links lead somewhere."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CHECKED, SHOWN = ("python", "bash"), ("diff", "text", "yaml", "json")  # what is shown is no program to run
PROGRAMS = {
    *("apt-get", "cd", "docker", "export", "git", "horovodrun", "kubectl", "mpirun", "pip", "python", "python3"),
    *("sbatch", "source", "srun", "sudo"),
}
SETTINGS = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "MPLBACKEND": "agg",
    "COLUMNS": "200",  # so that no option is cut off in a --help
    "NO_COLOR": "1",
}


class Block(NamedTuple):
    """A fenced block: the line of README.md that it begins on, its language, its text."""

    line: int
    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    found = re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start()) + 2, match[2], match[3]) for match in found]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command: lines that go on are joined, comments and prompts dropped, pipes split."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        parts: list[list[str]] = [[]]
        for word in words:
            if word in ("|", "&&", "||", ";", "&", ">", ">>", "<"):
                parts.append([])
            else:
                parts[-1].append(word.removesuffix(";"))
        commands += [part for part in parts if part]
    return commands


TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks_of(TEXT)
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in commands_of(block)]
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not any(p[0] == "." for p in path.relative_to(ROOT).parts))


def test_every_block_is_known():
    assert len(BLOCKS) == len(re.findall(r"^ *```", TEXT, re.MULTILINE)) / 2
    languages = [block.language for block in BLOCKS]
    assert set(languages) <= {*CHECKED, *SHOWN}
    assert set(languages) >= set(CHECKED)


@pytest.mark.timeout(300)
def test_python_blocks_run_in_order():
    """All in one namespace of one process, as a reader would paste them one after the other."""
    program = "names = {'__name__': '__main__'}\n" + "".join(
        # empty lines in front, so that a traceback shows the line of README.md
        f"exec(compile({chr(10) * (block.line - 1) + block.text!r}, 'README.md', 'exec'), names)\n"
        for block in BLOCKS
        if block.language == "python"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=program, cwd=ROOT, env=SETTINGS, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr


# -- commands ---------------------------------------------------------------------------------------------------------


def program_of(words: list[str]) -> str | None:
    """What a word runs that is this project's: a script's path, or "distpad" for the command line."""
    word = words[0]
    if word == "distpad" or words[:2] == ["-m", "distpad"]:
        return "distpad"
    if word.endswith((".py", ".sh")) and not word.startswith("-"):
        assert (ROOT / word).is_file(), f"README.md names {word}, which does not exist"
        return word
    return None


@functools.cache
def help_of(program: str, subcommand: str) -> str:
    if program == "distpad":
        command = [sys.executable, "-m", "distpad", *filter(None, [subcommand])]
    else:
        command = [sys.executable if program.endswith(".py") else "bash", program]
    done = subprocess.run(
        [*command, "--help"],
        cwd=ROOT,
        env=SETTINGS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{command} --help: {done.stderr}"
    return done.stdout


def uses_of(command: list[str]) -> list[tuple[str, str, str]]:
    """(program, subcommand, option) for each option that stands behind one of this project's programs."""
    uses, program, subcommand = [], None, ""
    for at, word in enumerate(command):
        found = program_of(command[at:])
        if found:
            program, subcommand = found, ""
        elif program == "distpad" and not subcommand and re.fullmatch("[a-z]+", word) and command[at - 1] == "distpad":
            subcommand = word
        elif word == "--":
            program = None  # what follows is another command
        elif program and re.match("--[a-z]", word):
            uses.append((program, subcommand, word.split("=")[0]))
    return uses


def without_settings(command: list[str]) -> list[str]:
    while command and re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    return command


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: shlex.join(command)[:70])
def test_programs_exist(command):
    command = without_settings(command)
    for at in range(len(command)):
        program_of(command[at:])
    if not command or command[0] in PROGRAMS or command[0] == "distpad":
        return
    path = ROOT / command[0]
    assert path.is_file(), f"{command[0]} is neither a file of this project nor a known program"
    assert os.access(path, os.X_OK), f"{command[0]} is not executable"


@pytest.mark.parametrize("use", sorted({use for command in COMMANDS for use in uses_of(command)}), ids=" ".join)
def test_options_exist(use):
    program, subcommand, option = use
    assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(program, subcommand)), f"--help does not know {option}"


# -- links ------------------------------------------------------------------------------------------------------------


def anchors_of(text: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    broken = []
    for link in links:
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken

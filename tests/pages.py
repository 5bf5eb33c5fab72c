"""Markdown as the tests read it: fenced blocks, the sides of a diff, commands and their options, links and anchors."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"bash", "diff", "json", "python", "text", "yaml"}
PROGRAMS = {  # of others, which commands may use
    *(
        "apt-get",
        "cat",
        "cd",
        "cp",
        "docker",
        "echo",
        "export",
        "git",
        "horovodrun",
        "kubectl",
        "ls",
        "mkdir",
        "mkdocs",
    ),
    *("mpirun", "nvidia-smi", "pip", "pytest", "python", "python3", "sbatch", "scancel", "scp", "source", "squeue"),
    *("srun", "ssh", "sudo", "tensorboard"),
}
OF_OTHERS = {"--shm-size"}  # options in the text that are docker's
SETTINGS = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "MPLBACKEND": "agg",
    "COLUMNS": "200",  # no option is cut off in a --help
    "NO_COLOR": "1",
}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# -- blocks -----------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block: the line of its page that it begins on, its language, its text without indentation."""

    line: int
    language: str
    text: str


def blocks_of(text: str) -> list[Block]:
    found = re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start()) + 2, match[2], textwrap.dedent(match[3])) for match in found]


def without_blocks(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def side_of(diff: str, sign: str) -> str:
    """The program before a change ("-") or after it ("+"). Lines of the other side are empty, so that numbers stay."""
    lines = diff.splitlines()
    wrong = [line for line in lines if line[:1] not in ("", " ", "+", "-")]
    assert not wrong, f"lines of a diff begin with a space, + or -: {wrong}"
    return "\n".join(line[1:] if line[:1] in (" ", sign) else "" for line in lines) + "\n"


def is_program(text: str) -> bool:
    """Whether a side of a diff runs by itself: it begins with its imports."""
    return bool(re.match(r"\s*(import|from) ", text))


# -- commands ---------------------------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command: lines that go on are joined, comments and prompts dropped, pipes split."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip().removeprefix("$ "))
        parts: list[list[str]] = [[]]
        for word in shlex.split(line, comments=True):
            if word in ("|", "&&", "||", ";", "&", ">", ">>", "<"):
                parts.append([])
            else:
                parts[-1].append(word.removesuffix(";"))
        commands += [part for part in parts if part]
    return commands


def program_of(words: list[str]) -> str | None:
    """The program of this project that a word runs: the path of a script, or "distpad" for the command line."""
    word = words[0]
    if word == "distpad" or words[:2] == ["-m", "distpad"]:
        return "distpad"
    if word.endswith((".py", ".sh")) and not word.startswith("-"):
        if "/" not in word and word.endswith(".py"):
            return None  # the reader's own train.py
        assert (ROOT / word).is_file(), f"{word} does not exist"
        return word
    return None


def uses_of(command: list[str]) -> list[tuple[str, str, str]]:
    """(program, subcommand, option) for each option that follows one of this project's programs."""
    uses, program, subcommand = [], None, ""
    for at, word in enumerate(command):
        found = program_of(command[at:])
        if found:
            program, subcommand = found, ""
        elif program == "distpad" and not subcommand and re.fullmatch("[a-z]+", word) and command[at - 1] == "distpad":
            subcommand = word
        elif word == "--":
            program = None  # another command follows
        elif program and re.match("--[a-z]", word):
            uses.append((program, subcommand, word.split("=")[0]))
    return uses


def uses_in_text(text: str) -> set[tuple[str, str, str]]:
    """As ``uses_of``, for code in lines of text: a lone option is that of the program that its paragraph named last."""
    found = set()
    for paragraph in without_blocks(text).split("\n\n"):
        program: list[str] = []
        for code in re.findall("`([^`]+)`", paragraph):
            words = code.split()
            if words and re.fullmatch(r"(\./)?(launch|tests|examples|benchmarks)/\S+\.(sh|py)", words[0]):
                program = words[:1]
            elif words and words[0] == "distpad":
                program = words[:2]
            elif not (program and words and words[0].startswith("--")):
                continue
            found |= set(uses_of([*program, *(word for word in words if word.startswith("--"))]))
    return {use for use in found if use[-1] not in OF_OTHERS}


def without_settings(command: list[str]) -> list[str]:
    while command and re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    return command


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


# -- links ------------------------------------------------------------------------------------------------------------


def links_of(text: str) -> list[str]:
    """The targets of links and pictures, those of the web aside."""
    text = without_blocks(text)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
    return [link for link in links if not re.match(r"(https?|mailto):", link)]


def has_anchor(text: str, anchor: str) -> bool:
    """Whether a page has a heading of that name, as GitHub makes anchors, an id of its own, or the docstring."""
    text = without_blocks(text)
    headings = re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    found |= set(re.findall(r"\{ *#([\w.-]+)", text))
    documented = re.findall(r"^ *::: (\S+)", text, re.MULTILINE)
    return anchor in found or any(anchor == name or anchor.startswith(f"{name}.") for name in documented)

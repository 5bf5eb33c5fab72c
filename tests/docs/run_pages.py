"""Runs the Python of pages: python tests/docs/run_pages.py RESULTS PAGE... [--help-of PROGRAM...]

A block that imports TensorFlow begins a program. The page's next blocks belong to it, in one namespace. The side of a
diff after its change is a program of its own, where it begins with imports. TensorFlow is imported once: each program
runs in a fork of this process, with an engine of its own on two CPU devices. RESULTS is JSON: for each page an error,
"" if there is none, and the CPU seconds; and for each program of examples/ the --help that it prints.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import io
import json
import linecache
import os
import pathlib
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import distpad
import pages

LIMIT_S = 100  # of a program
Blocks = list[tuple[int, str]]  # the line that each begins on, and its text


def programs_of(page: pathlib.Path, seen: set[str]) -> list[Blocks]:
    """The programs of a page. Of those in diffs, none twice."""
    found: list[Blocks] = []
    goes_on: Blocks = []
    for block in pages.blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "python":
            if not goes_on or re.search("^import (horovod.)?tensorflow", block.text, re.MULTILINE):
                goes_on = []
                found.append(goes_on)
            goes_on.append((block.line, block.text))
        elif block.language == "diff":
            after = pages.side_of(block.text, "+")
            if pages.is_program(after) and (key := "\n".join(after.split())) not in seen:
                seen.add(key)
                found.append([(block.line, after)])
    return found


def run(page: pathlib.Path, blocks: Blocks) -> str:
    """Run a program; returns the error, with the page's line."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})  # for three steps it does not pay
    tf.keras.utils.set_random_seed(0)
    names = {"__name__": "__main__"}
    for line, text in blocks:
        source = "\n" * (line - 1) + text
        # Tracebacks show it, and autograph reads it, from here: around it in the file there is no Python.
        linecache.cache[str(page)] = (len(source), None, source.splitlines(keepends=True), str(page))
        try:
            exec(compile(source, str(page), "exec"), names)
        except BaseException as error:  # also one that exits
            frames = traceback.extract_tb(error.__traceback__)
            at = next((frame.lineno for frame in reversed(frames) if frame.filename == str(page)), line)
            shown = "".join(traceback.format_exception(error))[-6000:]
            return f"{pages.name_of(page)}:{at}: {type(error).__name__}: {error}\n\n{shown}"
    return ""


def help_of(program: str) -> str:
    """What ``python PROGRAM --help`` prints."""
    path, output = pages.ROOT / program, io.StringIO()
    sys.argv, sys.path[:0] = [program, "--help"], [str(path.parent)]
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()


def in_fork(function: Callable[..., str], *arguments: Any) -> tuple[str, float]:
    """What a function returns in a fork of this process, and the CPU seconds that it took."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        with open(write, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(function(*arguments)))
        sys.stdout.flush()
        os._exit(0)  # whichever threads are left
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        given = pipe.read()
    _, status, usage = os.wait4(child, 0)
    ended = f"{arguments[0]}: the process ended with status {status}: it crashed, or took more than {LIMIT_S} s"
    return json.loads(given) if given else ended, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("pages", nargs="*", type=pathlib.Path)
    parser.add_argument("--help-of", nargs="*", default=[])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in distpad.__all__:
        getattr(distpad, name)
    tf.keras.layers.Dense  # noqa: B018 (Keras is imported when it is first used: here, not in each fork)
    gc.freeze()  # or each fork's collections look at all that the imports made
    # tests/single/test_readme_adoption.py runs that one, on several numbers of replicas.
    readme = pages.blocks_of(pages.PAGES[0].read_text(encoding="utf-8"))
    seen = {"\n".join(pages.side_of(block.text, "+").split()) for block in readme if block.language == "diff"}
    results: dict = {"errors": {}, "cpu_s": {}, "help": {}}
    for page in options.pages:
        ran = [in_fork(run, page, blocks) for blocks in programs_of(page, seen)]
        name = pages.name_of(page)
        results["errors"][name] = "\n".join(error for error, _ in ran if error)
        results["cpu_s"][name] = round(sum(seconds for _, seconds in ran), 1)
    results["help"] = {program: in_fork(help_of, program)[0] for program in options.help_of}
    options.results.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

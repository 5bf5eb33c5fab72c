"""Fuzz public functions and parsers with hostile arguments, guided by the coverage of distpad's code (atheris).

    PYTHONPATH="$(tests/nightly/install.sh fuzz):$PYTHONPATH" python tests/faults/fuzz.py --cases 1000000

Prints a table, and exits with 1 where a case raised another exception than the documented ones, took over a second, or
allocated without bound. A case of the table is run again by ``--target NAME --data HEX``.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import resource
import subprocess
import sys
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent), str(pathlib.Path(__file__).resolve().parents[1])]
# the share of all cases; what costs less gets more
SHARES = {"TF_CONFIG": 30, "buckets": 18, "hosts": 15, "sampler": 9, "plan": 8, "padding": 6, "schema": 5}
SHARES |= {"pad_sequences": 5, "config file": 2, "unpad": 2}
GROWTH = 2**29  # bytes by which a target's process may grow
REPORT_EVERY = 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--target", help="one target; default: all of the core")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", help="the bytes of one case, in hexadecimal")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.data is not None:
        import hostile

        error = hostile.run(given.target, bytes.fromhex(given.data)).error
        if error is not None:
            raise error
        return 0
    if given.worker:
        _work(given.target, given.cases, given.seed)
    shares = SHARES if given.target is None else {given.target: 100}
    return _report([_fuzz(name, given.cases * share // 100, given.seed) for name, share in shares.items()])


def _fuzz(target: str, cases: int, seed: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, with a progress bar."""
    import tqdm

    options = ["--worker", "--target", target, "--cases", str(cases), "--seed", str(seed)]
    environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    argv = [sys.executable, __file__, *options]
    found: dict[str, Any] = {
        "target": target,
        "cases": 0,
        "errors": {"the process ended": ""},
        "slowest": 0,
        "growth": 0,
    }
    with (
        tqdm.tqdm(total=cases, desc=target, unit=" cases") as bar,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ) as process,
    ):
        for line in process.stdout or ():
            if line.startswith("{"):
                found = json.loads(line)
                bar.update(found["cases"] - bar.n)
    if found["cases"] < cases:
        found["errors"]["the process ended"] = f"with code {process.returncode}"
    return found


def _work(target: str, cases: int, seed: int) -> None:
    """Run all cases of a target, and print what was found as JSON lines; libFuzzer never returns."""
    import atheris

    out = os.fdopen(os.dup(1), "w")
    with atheris.instrument_imports(include=["distpad"]):
        import hostile
    state = {
        "target": target,
        "cases": 0,
        "errors": {},
        "kinds": collections.Counter(),
        "slowest": 0.0,
        "slow": "",
        "growth": 0,
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(data: bytes) -> None:
        case = hostile.run(target, data)
        state["cases"] += 1
        if case.error is not None:
            kind = f"{type(case.error).__name__}: {str(case.error)[:100]}"
            state["kinds"][type(case.error).__name__] += 1
            state["errors"].setdefault(kind if len(state["errors"]) < 20 else "others", data.hex())
        if case.seconds > state["slowest"]:
            state["slowest"], state["slow"] = case.seconds, data.hex()
        if state["cases"] % REPORT_EVERY == 0 or state["cases"] == cases:
            state["growth"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            print(json.dumps(state), file=out, flush=True)
        if state["cases"] == cases:
            os._exit(0)

    with hostile.bounded_memory():
        atheris.Setup(
            [sys.argv[0], f"-seed={seed}", "-max_len=64", "-len_control=0", "-timeout=60", "-rss_limit_mb=0"], one
        )
        atheris.Fuzz()


def _report(found: list[dict[str, Any]]) -> int:
    """Print the table; 1 if a target failed."""
    import hostile

    print(f"\n{'target':<14} {'cases':>9}  {'errors':>6}  {'slowest':>8}  {'memory':>8}  passed")
    failed = 0
    for each in found:
        passed = not each["errors"] and each["slowest"] <= hostile.MOST_S and each["growth"] <= GROWTH
        failed += not passed
        errors = sum(each.get("kinds", {}).values())
        growth = f"+{each['growth'] / 2**20:.0f} MB"
        row = f"{each['target']:<14} {each['cases']:>9,}  {errors:>6}  {each['slowest']:>6.2f} s  {growth:>8}"
        print(row, "yes" if passed else "NO", sep="  ")
        for kind, data in each["errors"].items():
            print(f"    {kind}\n        --target {each['target']!r} --data {data}")
        if each["slowest"] > hostile.MOST_S:
            print(f"    slowest: --target {each['target']!r} --data {each['slow']}")
    print(f"{sum(each['cases'] for each in found):,} cases, {failed} targets failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

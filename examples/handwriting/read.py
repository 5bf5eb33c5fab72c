#!/usr/bin/env python
"""Read pictures with a reader that train.py saved. Print each file and its text."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN prints its note at any log level
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from handwriting import folder, reading

EXAMPLES = """\
examples:
  read.py runs/demo/samples/*.png
  read.py --model runs/mine photo.jpg
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="read.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--model", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="train.py's --out (default runs/demo)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        reader = reading.TextReader.load(options.model / "reader")
        pictures = [folder.read_picture(path, reader.config.height) for path in options.images]
    except ValueError as error:
        sys.exit(f"read.py: {error}")
    for path, text in zip(options.images, reader.read(pictures)):
        print(f"{path}\t{text}")


if __name__ == "__main__":
    main()

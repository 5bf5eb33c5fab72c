"""``python -m distpad``: the command line without its script."""

from distpad.cli import main

main()

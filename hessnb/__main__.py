"""``python -m hessnb``: the command line."""

from hessnb.cli import main

main(prog_name="hessnb")

"""``hessnb`` and ``python -m hessnb``: the command line."""

import sys


def main() -> None:
    """Load the command line and carry out its command; Ctrl-C while it loads ends it in one line, as it does later."""
    try:
        from hessnb.cli import main as command  # PyTorch takes seconds
    except KeyboardInterrupt:
        sys.stderr.write("hessnb: stopped\n")
        sys.exit(130)
    command(prog_name="hessnb")


if __name__ == "__main__":
    main()

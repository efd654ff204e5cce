"""The command line as ``python -m bench``."""

from bench.cli import entry

if __name__ == "__main__":
    entry()

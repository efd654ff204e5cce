"""``python -m bench`` is ``bench``."""

from bench.cli import entry

if __name__ == "__main__":
    entry()

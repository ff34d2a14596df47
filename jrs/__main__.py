"""``python -m jrs`` is the command ``jrs``."""

from jrs.cli.start import start

if __name__ == "__main__":
    start()

"""``python -m jrs`` is the command ``jrs``."""

from jrs.cli.main import main

if __name__ == "__main__":
    main()

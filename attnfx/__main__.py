"""`python -m attnfx` is the command line `attnfx`."""

from attnfx.cli import main

if __name__ == "__main__":
    main()

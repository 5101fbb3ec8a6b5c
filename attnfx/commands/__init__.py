"""What the command line does, a command a module; :mod:`attnfx.cli` is its door."""

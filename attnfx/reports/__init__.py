"""What :mod:`attnfx.report` holds, as text, as data, as a page, and as pictures."""

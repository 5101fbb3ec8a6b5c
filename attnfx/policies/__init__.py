"""Policies as people write them: files, selectors and conditions, and what is wrong with them. See :mod:`attnfx.policy`."""

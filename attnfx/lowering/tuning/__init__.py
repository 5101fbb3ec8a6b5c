"""The search for the fastest configuration of each kernel on the device at hand, and the file that remembers what was found.

Without a search every kernel runs with the shipped configuration (`configs.py`), unless an earlier search left a better one:
`lookup.tuned` is all that a launch knows of this package. A configuration never changes what a kernel means, only how long it
takes.
"""

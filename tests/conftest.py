"""Test processes side by side take one thread each: more, on as few cores, wait for one another most of the time."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

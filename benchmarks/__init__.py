"""Measurements, and the page of all options; `python -m benchmarks.NAME --help` tells each."""

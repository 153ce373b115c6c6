"""Measurements of quality and cost; `python -m benchmarks.NAME --help` tells each."""

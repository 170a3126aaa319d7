"""Benchmarks of emberfed: `make bench`. Results go to `benchmarks/results/`.

Each compares things that were measured in one run.
"""

"""Benchmarks of emberfed: `make bench`. Results go to `benchmarks/results/`; each compares things measured in one run."""

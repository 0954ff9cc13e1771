"""Benchmarks: `make bench`. Nothing here is a timed test; docs/benchmarks has the figures and the machine."""

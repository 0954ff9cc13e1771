"""Two revisions of meshd, measured in turn in one run: docs/benchmarks/README.md says how to read the figures."""

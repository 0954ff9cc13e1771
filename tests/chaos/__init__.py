"""A run of random faults on a mesh of five hosts, with everything checked after each: `make chaos`."""

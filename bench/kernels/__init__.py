"""Benchmarks of the operators: `python -m bench.kernels --help`, in the root of the repository."""

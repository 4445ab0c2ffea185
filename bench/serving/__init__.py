"""Servers under load: `python -m bench.serving.sweep --help` and `bench.serving.soak`."""

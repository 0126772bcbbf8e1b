"""Measuring code behind scripts/benchmark.py, and scripts that measure one thing each. README.md lists them."""

"""Benchmarks that users can run: ratios within one run, medians, and the machine they ran on."""

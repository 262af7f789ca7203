"""Benchmarks: side by side in one process, medians of interleaved rounds, equal results shown."""

"""Benchmarks at full FLUX.1-dev size on random weights: `python -m benchmarks.run`. Scripts, never timed tests."""

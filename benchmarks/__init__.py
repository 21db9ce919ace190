"""One benchmark per operator, each run as `python -m benchmarks.bench_NAME` from the repository's root."""

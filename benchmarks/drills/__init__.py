"""The faults that `python -m benchmarks.drill` makes, one file per kind."""

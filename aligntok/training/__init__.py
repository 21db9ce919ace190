"""One training loop and its services; the stages and the generator as objectives."""

"""Flow matching: the path and its loss, and the samplers."""

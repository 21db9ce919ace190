"""The rivals behind the one Tokenizer interface: networks, objectives, and converters of their published weights."""

"""What the models are trained on: perceptual distance, adversarial balance, semantic preservation."""

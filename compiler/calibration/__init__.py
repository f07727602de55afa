"""What calibration data says of a model: activations layer by layer, second moments and slopes, distances."""

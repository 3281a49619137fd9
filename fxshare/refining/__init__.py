"""Training the factors of a compiled model towards what the original computes."""

"""Sites: the weights that a configuration matches, and how their rows split into slices."""

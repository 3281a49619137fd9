"""Factorisation: from weights and statistics to bases and coefficients. Functions of tensors."""

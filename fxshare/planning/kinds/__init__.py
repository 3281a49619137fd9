"""Kinds of candidates: which parts of a model one may take, its curve, and its entry in a plan."""

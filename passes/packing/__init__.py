"""Passes that pack a readable graph for speed."""

"""Certificates: what an export computed beside the compiled model, and the files it did it with."""

"""Mutation testing of the parts whose faults no output shows: ``python -m tests.mutation``."""

"""Exports in the engines that run them, each in a process of its own."""

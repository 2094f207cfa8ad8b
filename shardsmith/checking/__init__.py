"""Checks of the arguments of public objects."""

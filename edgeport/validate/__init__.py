"""Measurements on the shipped file."""

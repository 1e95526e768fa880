"""Preparation: changes of a module's weights that keep its function and make it easier to quantize."""

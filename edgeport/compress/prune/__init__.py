"""Pruning: what is removed makes a smaller model of the same kind; zeros are stored as such or refused."""

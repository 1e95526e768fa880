"""Lowering: a Model becomes an Artifact, in the backend's native weight format."""

"""The bundle: manifest, golden vectors and model files in one folder, verified by hash."""

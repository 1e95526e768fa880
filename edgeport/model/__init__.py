"""Load a checkpoint: a Hugging Face folder or hub id, a GGUF file, a torch factory, or a zoo model."""

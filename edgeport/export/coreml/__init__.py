"""Core ML: from a Model to a .mlpackage, with the logical codes and scales in Core ML's own constexpr operators."""

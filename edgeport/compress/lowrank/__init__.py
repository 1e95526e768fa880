"""Low rank: two thin Linear layers for a wide one."""

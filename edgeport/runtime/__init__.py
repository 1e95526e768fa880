"""A Session per runtime."""

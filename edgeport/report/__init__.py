"""One self-contained HTML file about a bundle."""

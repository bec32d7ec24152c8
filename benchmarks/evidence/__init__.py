"""Which selector helps: one protocol, several selectors, real data."""

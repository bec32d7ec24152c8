"""Bytes out: the workspace, its receipts and its tables."""

"""Rows, distilled lines, encoding, packing."""

"""Safetensors files: planned, written by many at once, and read with every claim checked."""

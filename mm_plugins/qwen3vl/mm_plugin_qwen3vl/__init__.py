"""Qwen3-VL for MM Zoo."""

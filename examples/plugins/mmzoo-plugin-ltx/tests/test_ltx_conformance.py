"""The conformance kit on this plugin."""

from __future__ import annotations

from mm_core.testing import conformance

test_conformance = conformance("mmzoo-plugin-ltx")

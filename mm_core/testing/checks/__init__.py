"""The checks, one module a subject. None imports torch or a plugin at its top."""

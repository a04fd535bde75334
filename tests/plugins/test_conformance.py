"""Our own plugins pass the kit that we ask others to pass, and so do the core's generic components."""

from __future__ import annotations

import pytest

from mm_core.testing import conformance

# A worker imports diffusers and runs two ranks; on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(300)

test_core = conformance("mmzoo-core")
test_haar = conformance("mmzoo-plugin-haar")
test_wan22 = conformance("mmzoo-plugin-wan22")

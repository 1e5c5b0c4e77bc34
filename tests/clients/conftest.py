"""Tests with real clients: SDKs, a browser, notebooks. `make test-clients` runs them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))  # the scripted model

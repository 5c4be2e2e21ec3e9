"""The fake device, for tests of what moves off one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("fake_device", Path(__file__).with_name("fake_device.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

fakes, devices = _module.fakes, _module.devices

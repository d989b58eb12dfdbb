"""The first import of PEFT, and with it of bitsandbytes, which warns of a kernel that it does without.

The line alarms whoever imports this package, of which it says nothing: the kernel is for 4-bit weights on a CPU.
"""

from __future__ import annotations

import logging


def _is_no_alarm(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_logger.addFilter(_is_no_alarm)
try:
    import peft as _peft  # noqa: F401
finally:
    _logger.removeFilter(_is_no_alarm)

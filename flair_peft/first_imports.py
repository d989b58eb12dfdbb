"""What bitsandbytes says while PEFT is imported for the first time: it warns of a kernel that it does without.

The line alarms whoever imports this package, of which it says nothing: the kernel is for 4-bit weights on a CPU. It is
kept back until PEFT is imported, by whomever.
"""

from __future__ import annotations

import logging

import wrapt


def _is_no_alarm(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_logger.addFilter(_is_no_alarm)
wrapt.register_post_import_hook(lambda _: _logger.removeFilter(_is_no_alarm), "peft")

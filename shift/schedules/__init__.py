"""Schedules choose the number of loops of each step. All are listed in ``registry``, one idea a file."""

from shift.schedules.base import Decision, Declaration, Family, LoopSchedule
from shift.schedules.registry import SCHEDULES, make_schedule
from shift.schedules.scp import SCP, Look, SCPConfig, Signals

__all__ = [
    "SCHEDULES",
    "SCP",
    "Decision",
    "Declaration",
    "Family",
    "Look",
    "LoopSchedule",
    "SCPConfig",
    "Signals",
    "make_schedule",
]

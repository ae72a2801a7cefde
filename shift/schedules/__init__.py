"""Who decides how many loops a step runs: one protocol, a file an idea, all listed in ``registry``."""

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

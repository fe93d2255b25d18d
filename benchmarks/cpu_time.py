"""The CPU time of a process that a benchmark started."""

import psutil

from headrace.launcher.run.processes import Service


def cpu_seconds(service: Service) -> float:
    """User and system time of the service's process so far, without its children's."""
    times = psutil.Process(service.process.pid).cpu_times()
    return float(times.user + times.system)

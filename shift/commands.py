"""What the console scripts call: a command whose extra is missing says so in one line."""

from functools import partial

from shift_kernels.console import launch

train = partial(launch, "shift-train", "shift.train")
compare = partial(launch, "shift-compare", "shift.compare")
data = partial(launch, "shift-data", "shift.data")
report = partial(launch, "shift-report", "shift.run_report")
evaluate = partial(launch, "shift-eval", "shift.eval")
export = partial(launch, "shift-export", "shift.export")
generate = partial(launch, "shift-generate", "shift.generate")
landscape = partial(launch, "shift-landscape", "shift.landscape.cli")
calibrate = partial(launch, "shift-calibrate", "shift.calibrate")

"""Our kernels beside what people run today. Commands and suites import from here; nothing here is on the way
of a call of the kernels themselves.

    baseline.py   the looped block as people write it, in library calls
    timing.py     calls that take turns; medians and quartiles
    cases.py      what is timed, by whom, and the float64 result that all are held against
    compare.py    one case measured; tables; ``shift-bench``
"""

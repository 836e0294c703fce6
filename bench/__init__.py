"""Benchmarks: how fast fastsm is beside its base, its peers and the bare machine.

    data        seeded keys, values and changes
    harness     timing in interleaved rounds; what a run leaves as JSON
    machine     the machine: what it is, and its own limits, measured
    targets     the rows of docs/benchmarks.md and the numbers to reach
    peers       other stores that do the same work
    bench_*     the suites, by workload: `pytest bench`
    report      tables and pictures of the JSON: `python -m bench report`
    guard       one short suite that runs on any commit
    compare     two commits beside each other: `python -m bench compare BASE HEAD`
    counts      instructions and system calls, without a clock: `python -m bench counts`
    scale       sizes up to 50 million keys: `python -m bench scale`
"""

"""What `fastdpo bench` runs, and the suites of `benchmarks/` with it: the contenders, and how they are measured."""

"""The attacks that come with the benchmark, one file each."""

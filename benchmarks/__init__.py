"""The benchmark suites; docs/benchmarks.md says how to run them and how to read what they print."""

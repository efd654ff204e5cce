"""The gate: results compared with a baseline, example by example, for CI that stops a fall in robustness."""

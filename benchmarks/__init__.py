"""Speed of the attention-cluster operator beside what a user would write without it.

`python -m benchmarks` prints and saves the comparison; `pytest benchmarks` is the same matrix under
pytest-benchmark.
"""

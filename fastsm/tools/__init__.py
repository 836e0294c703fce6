"""What people and the command line use: inspection, dump and load, repair, the demonstration, the benchmark.

It may import everything but `cli`, `integrations` and `testing`.
"""

"""Implements the command line: doctor, self-test, benchmark, demo, and pages about processes."""

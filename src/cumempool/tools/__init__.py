"""The command line: doctor, self-test, benchmark, demo, and pages about running processes."""

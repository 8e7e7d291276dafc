"""Stand-ins for the memory allocators of other projects, one module for each."""

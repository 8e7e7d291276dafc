"""A stand-in for vLLM: as much of its package as an allocator and its plugin meet."""

"""Implements one allocator: its tags, scopes, tensors, transitions, statistics and events."""

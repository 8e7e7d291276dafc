"""One allocator: its tags, scopes, tensors, transitions, statistics and events."""

"""One allocator: its tags, scopes, tensors, transitions and what can be seen of them."""

"""The part of ``torch_memory_saver.hooks`` that programs import."""

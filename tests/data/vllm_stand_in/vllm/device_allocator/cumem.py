"""An allocator that counts the bytes that a test says it holds."""


class CuMemAllocator:
    instance = None
    used = 0

    @staticmethod
    def get_instance():
        CuMemAllocator.instance = CuMemAllocator.instance or CuMemAllocator()
        return CuMemAllocator.instance

    def get_current_usage(self):
        return self.used

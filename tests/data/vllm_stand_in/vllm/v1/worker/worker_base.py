"""A worker, which asks for the allocator once its device is ready."""


class WorkerWrapperBase:
    def __init__(self, vllm_config):
        self.vllm_config = vllm_config

    def init_device(self):
        from vllm.device_allocator import get_mem_allocator_instance

        self.allocator = get_mem_allocator_instance()

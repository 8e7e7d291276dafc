"""Backends by name, loaded when they are asked for."""

import abc
import importlib
from typing import ClassVar


class SleepModeBackend(abc.ABC):
    def __init__(self):
        self._state = "RUNNING"

    @abc.abstractmethod
    def suspend(self, level=1): ...

    @abc.abstractmethod
    def resume(self, tags=None): ...

    def state(self):
        return self._state

    @classmethod
    def is_supported(cls):
        return True

    @classmethod
    def preserves_communicators(cls):
        return False


class SleepModeBackendFactory:
    _registry: ClassVar = {}

    @classmethod
    def register_backend(cls, name, module_path, class_name):
        if name in cls._registry:
            raise ValueError(f"{name} is there already")
        cls._registry[name] = lambda: getattr(importlib.import_module(module_path), class_name)

    @classmethod
    def get_backend_class(cls, name):
        return cls._registry[name]()

    @classmethod
    def create_backend(cls, model_config):
        backend = cls.get_backend_class(model_config.sleep_mode_backend)
        if not backend.is_supported():
            raise ValueError("not supported here")
        return backend()

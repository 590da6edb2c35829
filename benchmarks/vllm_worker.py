"""What vLLM's CPU engines lack: --worker-extension-cls vllm_worker.Reload --scheduler-cls vllm_worker.Waiting.

vLLM 0.32 packs experts once, when it creates its CPU kernel, and copies later weights into the packed storage without
packing them, which corrupts the model. Here the kernels are dropped, so vLLM creates them again and packs the new
weights.

vLLM's processes wait for each other by spinning for up to a second. With more processes than cores, the spinning ones
hold up those that work; here they sleep. This file does not import finback: it runs in vLLM's environment.
"""

import time
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.core.sched.scheduler import Scheduler

SECONDS = 0.0005  # between two looks for a message

SpinCondition.wait = lambda self, timeout_ms=None: time.sleep(SECONDS)


class Waiting(Scheduler):
    """vLLM's scheduler; naming it imports this file into the engine's process, as Reload does in the worker's."""


class Reload:
    """Mixed into vLLM's worker; called by POST /collective_rpc."""

    model_runner: Any
    reload_weights: Any

    def reload_experts(self, weights_path: str) -> None:
        """Like reload_weights, but also for models with experts."""
        for module in self.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None
        self.reload_weights(weights_path=weights_path)
